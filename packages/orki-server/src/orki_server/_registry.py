"""Which task services the fleet serves, under which contracts, and whether a newcomer's contract fits.

An agent's hello brings the digest of every contract that it serves, and its image. A registered digest passes; another
one is judged by `orki_server._admission` against what is live, and is registered beside it where it fits. So several
contracts of a service are in use at once during a rolling upgrade, each agent is offered the tasks of its own one, and
tasks run by the values of `ContractSet`. What other orchestrators register is seen within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

from google.protobuf.message import DecodeError, Message

from orki.control.v1.session_pb2 import ServedService
from orki_contract.errors import InvalidArgument, InvalidContract, OrkiError, UnknownMethod
from orki_contract.images import message_class
from orki_contract.model import TaskMethod
from orki_server._admission import Admission, ContractSet, ServiceContract, off_loop
from orki_server._store.store import Store

_REFRESH_S: Final = 1.0
"""Time between two looks at what other orchestrators have registered."""
_CLEAN_S: Final = 10.0
"""Time between two looks for contracts that are not live any more, and the shortest time that they are kept."""


class ContractRegistry:
    """RegisteredContract services, remembered from the store.

    Args:
        store: Where they are.
        silence_us: Time without a heartbeat after which an agent counts as gone, in microseconds.
        settle: Writes what is known here of agents that left; called before a refusal.
    """

    def __init__(self, store: Store, silence_us: int, settle: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._admission = Admission(store.contracts, store.fleet, self._silent_since, settle)
        self._families: dict[str, ContractSet] = {}
        self._revisions: dict[str, str] = {}
        self._registered: set[str] = set()
        self._refreshed = 0.0
        self._looking = asyncio.Lock()
        self._silence_us = silence_us
        self._watching_since = time.monotonic()
        store.on_change(self._store_changed)

    async def run(self) -> None:
        """Looks again and again what others registered, and forgets what is not live, until it is cancelled."""
        cleaned = time.monotonic()
        while True:
            await asyncio.sleep(_REFRESH_S)
            await self._store.wait_up()
            with contextlib.suppress(OrkiError):
                await self.refresh()
                if time.monotonic() - cleaned >= _CLEAN_S:
                    cleaned = time.monotonic()
                    for service, family in list(self._families.items()):
                        if len(family.contracts) > 1:
                            await self._admission.clean(service, int(_CLEAN_S * 1000))

    async def refresh(self) -> None:
        """Reads what is registered.

        Raises:
            StoreUnavailable: The store is away.
        """
        asked = time.monotonic()
        async with self._looking:
            if self._refreshed > asked:
                # Somebody looked while we waited.
                return
            started = time.monotonic()
            await self._look()
            self._refreshed = started

    async def _look(self) -> None:
        revisions = await self._store.contracts.revisions()
        new = [name for name, revision in revisions.items() if self._revisions.get(name) != revision]
        for service, registered in (await self._store.contracts.registered(new)).items():
            with contextlib.suppress(InvalidContract):
                # An image that cannot be read was written by nobody of us; whoever serves it is told so at its hello.
                if registered:
                    contracts = [ServiceContract.of(each) for each in registered]
                    self._families[service] = await off_loop(partial(ContractSet, contracts))
                    self._registered.add(service)
                    self._revisions[service] = revisions[service]
        for service in self._families.keys() - revisions.keys():
            # Its tasks stay known: the store may have lost them, and then hellos bring them again.
            self._registered.discard(service)
            self._revisions.pop(service, None)

    def forget(self) -> None:
        """The store lost what was registered: what agents bring is registered anew. Methods stay known meanwhile."""
        self._registered.clear()
        self._revisions.clear()

    def overtaken(self, service: str) -> None:
        """What is known of a service here is not what is registered: its contracts are looked at anew."""
        self._registered.discard(service)
        self._revisions.pop(service, None)

    async def method(self, full_name: str) -> TaskMethod:
        """The task `package.Service/Method`, by the values that count now.

        Raises:
            UnknownMethod: Nobody has registered it.
            StoreUnavailable: It is not known here, and the store is away.
        """
        service, _, _ = full_name.partition("/")
        known = self._families.get(service)
        if known is None or full_name not in known.methods:
            await self.refresh()
            known = self._families.get(service)
            if known is None:
                served = ", ".join(sorted(self._families)) or "none yet"
                raise UnknownMethod(
                    f"no agent has registered the service {service!r} (registered: {served}); start one that serves it"
                )
            if full_name not in known.methods:
                raise UnknownMethod(
                    f"the service {service} has no task {full_name!r}; it has {', '.join(sorted(known.methods))}"
                )
        return known.methods[full_name]

    def leading(self, service: str) -> str:
        """Digest of the contract under which tasks of a service are submitted now; empty for an unknown one."""
        known = self._families.get(service)
        return known.leading.digest if known else ""

    def methods_of(self, service: str, digest: str) -> tuple[TaskMethod, ...]:
        """A service's tasks as one of its contracts declares them; none where it is not known."""
        known = self._families.get(service)
        contract = known.contracts.get(digest) if known else None
        return tuple(contract.methods.values()) if contract else ()

    async def admit(self, agent_id: str, services: Iterable[ServedService]) -> None:
        """Judges what an agent serves, and registers what is new.

        Raises:
            InvalidContract: An image is none, lacks its service, or has another digest than was said.
            ContractMismatch: A service is live under a contract with which this one breaks.
            StoreUnavailable: The store is away.
        """
        for served in services:
            known = self._families.get(served.service)
            if known and served.digest in known.contracts and served.service in self._registered:
                continue
            contract = ServiceContract(
                service=served.service, digest=served.digest, image=served.image, version=served.version
            )
            await off_loop(contract.check)
            family = await self._admission.admit(contract, f"agent {agent_id} serves", agent_id=agent_id)
            self._families[served.service] = family
            self._registered.add(served.service)
            # The next look tells what others did meanwhile.
            self._revisions.pop(served.service, None)

    def _store_changed(self, up: bool) -> None:
        if up:
            self._watching_since = time.monotonic()

    def _silent_since(self) -> int:
        """Who said nothing since then is gone; nobody is, while agents may not have had the chance to say anything."""
        if (time.monotonic() - self._watching_since) * 1_000_000 < self._silence_us:
            return 0
        return time.time_ns() // 1000 - self._silence_us


_MOST_CLASSES: Final = 256
"""Message classes that are kept: each costs milliseconds to build, and some memory."""


class PayloadCheck:
    """Parses payloads by the contract that leads: whatever fits one of a service's live contracts fits that one.

    Args:
        store: Has the contracts' images.
        registry: Knows which contract leads.
    """

    def __init__(self, store: Store, registry: ContractRegistry) -> None:
        self._store = store
        self._registry = registry
        self._looking = asyncio.Lock()
        self._classes: OrderedDict[tuple[str, str], type[Message] | None] = OrderedDict()

    async def request(self, method: TaskMethod, payload: bytes) -> None:
        """Checks a request.

        Raises:
            InvalidArgument: It is no message of the method's class.
            StoreUnavailable: The contract is not known here yet, and the store is away.
        """
        await self._check("request", method, method.request, payload)

    async def directive(self, method: TaskMethod, payload: bytes) -> None:
        """Checks a directive; otherwise as `request`."""
        await self._check("payload", method, method.directive, payload)

    async def _check(self, field: str, method: TaskMethod, name: str, payload: bytes) -> None:
        kind = await self._class(method.service, name)
        if kind is None or not payload:
            return
        try:
            kind.FromString(payload)
        except DecodeError:
            # The bytes may be secret: their number is all that is shown.
            raise InvalidArgument(
                f"{field}: {len(payload)} bytes that are no {name}, which {method.full_name} takes; "
                "serialise that message, as protobuf's binary format"
            ) from None

    async def _class(self, service: str, name: str) -> type[Message] | None:
        """The class of a message; None where no image is at hand, and the agent has to judge."""
        key = (self._registry.leading(service), name)
        if key not in self._classes:
            # A call may bring a thousand submissions: one of them looks, the others wait.
            async with self._looking:
                return self._classes[key] if key in self._classes else await self._look(service, *key)
        self._classes.move_to_end(key)
        return self._classes[key]

    async def _look(self, service: str, digest: str, name: str) -> type[Message] | None:
        contracts = (await self._store.contracts.registered([service])).get(service, [])
        image = next((each.image for each in contracts if each.digest == digest), b"")
        if not image:
            # Another orchestrator has just changed what leads, or the store has lost it: the next call looks again.
            return None
        try:
            kind = message_class(image, name)
        except InvalidContract:
            kind = None
        self._classes[digest, name] = kind
        if len(self._classes) > _MOST_CLASSES:
            self._classes.popitem(last=False)
        return kind
