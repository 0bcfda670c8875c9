"""The registered task services, and the check that a payload is a message of the class that its method declares.

A hello brings the digest and the image of every contract that the agent serves. A registered digest passes; another one
is checked against the contracts that are live, and is registered if it is compatible. So several contracts of a service
are in use during a rolling upgrade: each agent is offered the tasks of its own contract, and tasks run with the values
of the `ContractSet`. Contracts that other orchestrators register are seen within a second.
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
from orki_contract.errors import InvalidArgument, InvalidContract, OrkiError
from orki_contract.images import message_class
from orki_contract.model import TaskMethod
from orki_server._admission import Admission, ContractSet, ServiceContract, run_in_thread
from orki_server._identity import unknown_method
from orki_server._store.connection import StoreConnection
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import Fleet

_REFRESH_INTERVAL: Final = 1.0
"""Time between two reads of the contracts that other orchestrators registered."""
_CLEAN_INTERVAL: Final = 10.0
"""Time between two removals of contracts that are no longer live, and the minimum age of a removed contract."""
_MAX_CLASSES: Final = 256
"""Maximum number of cached message classes; building one takes milliseconds."""


class ContractRegistry:
    """Registered services, cached from the store.

    An agent without heartbeat for `silence_timeout` counts as disconnected. `flush` stores which agents have
    disconnected. It is called before a contract is refused, because the contracts of these agents are not live.
    """

    def __init__(
        self,
        connection: StoreConnection,
        contracts: Contracts,
        fleet: Fleet,
        silence_timeout: float,
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        self._connection = connection
        self._contracts = contracts
        self._admission = Admission(contracts, fleet, self._silent_since, flush)
        self._services: dict[str, ContractSet] = {}
        self._revisions: dict[str, str] = {}
        self._registered: set[str] = set()
        self._refreshed = 0.0
        self._refreshing = asyncio.Lock()
        self._silence_timeout = silence_timeout
        self._up_since = time.monotonic()
        connection.on_change(self._store_changed)

    async def run(self) -> None:
        """Refresh the cache and remove contracts that are no longer live, until cancelled."""
        cleaned = time.monotonic()
        while True:
            await asyncio.sleep(_REFRESH_INTERVAL)
            await self._connection.up.wait()
            with contextlib.suppress(OrkiError):
                await self.refresh()
                if time.monotonic() - cleaned >= _CLEAN_INTERVAL:
                    cleaned = time.monotonic()
                    for service, contracts in list(self._services.items()):
                        if len(contracts.contracts) > 1:
                            await self._admission.clean(service, _CLEAN_INTERVAL)

    async def refresh(self) -> None:
        """Read the registered contracts.

        Raises:
            StoreUnavailable: The store is down.
        """
        requested = time.monotonic()
        async with self._refreshing:
            # A refresh that began while this call waited is recent enough.
            if self._refreshed <= requested:
                started = time.monotonic()
                await self._read()
                self._refreshed = started

    async def _read(self) -> None:
        revisions = await self._contracts.revisions()
        changed = [name for name, revision in revisions.items() if self._revisions.get(name) != revision]
        for service, registered in (await self._contracts.registered(changed)).items():
            # No orchestrator writes an unreadable image; an agent that serves it is refused with the details.
            with contextlib.suppress(InvalidContract):
                if registered:
                    contracts = [ServiceContract.of(each) for each in registered]
                    self._services[service] = await run_in_thread(partial(ContractSet, contracts))
                    self._registered.add(service)
                    self._revisions[service] = revisions[service]
        for service in self._services.keys() - revisions.keys():
            # The service's methods stay known: if the store lost the service, hellos register it again.
            self.invalidate(service)

    def invalidate_all(self) -> None:
        """Forget which services are registered, so that hellos register them again. Their methods stay known."""
        self._registered.clear()
        self._revisions.clear()

    def invalidate(self, service: str) -> None:
        """Read the contracts of a service again, because the cache is out of date."""
        self._registered.discard(service)
        self._revisions.pop(service, None)

    async def method(self, full_name: str) -> TaskMethod:
        """Return the task `package.Service/Method` with the values that apply now.

        Raises:
            UnknownMethod: The method is not registered.
            StoreUnavailable: The method is not cached, and the store is down.
        """
        service, _, _ = full_name.partition("/")
        known = self._services.get(service)
        if known is None or full_name not in known.methods:
            await self.refresh()
            known = self._services.get(service)
            if known is None:
                served = ", ".join(sorted(self._services)) or "none yet"
                raise unknown_method(
                    full_name,
                    f"no agent has registered the service {service!r} (registered: {served}); "
                    "start an agent that serves it",
                )
            if full_name not in known.methods:
                raise unknown_method(
                    full_name,
                    f"the service {service} has no task {full_name!r}; it has {', '.join(sorted(known.methods))}",
                )
        return known.methods[full_name]

    def cached(self, full_name: str) -> TaskMethod | None:
        """Return a task with the values that apply now; None if it is not cached."""
        known = self._services.get(full_name.partition("/")[0])
        return known.methods.get(full_name) if known else None

    def leading(self, service: str) -> str:
        """Return the digest of the contract under which tasks of a service are submitted; empty if it is unknown."""
        known = self._services.get(service)
        return known.leading.digest if known else ""

    def methods_of(self, service: str, digest: str) -> tuple[TaskMethod, ...]:
        """Return a service's tasks as one of its contracts declares them; none for an unknown contract."""
        known = self._services.get(service)
        contract = known.contracts.get(digest) if known else None
        return tuple(contract.methods.values()) if contract else ()

    async def admit(self, agent_id: str, services: Iterable[ServedService]) -> None:
        """Check the services of an agent, and register new contracts.

        Raises:
            InvalidContract: An image is malformed, lacks its service, or has another digest than declared.
            ContractMismatch: A live contract of a service is incompatible with this one.
            StoreUnavailable: The store is down.
        """
        for served in services:
            known = self._services.get(served.service)
            if known and served.digest in known.contracts and served.service in self._registered:
                continue
            contract = ServiceContract(
                service=served.service, digest=served.digest, image=served.image, version=served.version
            )
            await run_in_thread(contract.check)
            self._services[served.service] = await self._admission.admit(
                contract, f"agent {agent_id} serves", agent_id=agent_id
            )
            self._registered.add(served.service)
            # The next refresh reads the changes that others made meanwhile.
            self._revisions.pop(served.service, None)

    def _store_changed(self, up: bool) -> None:
        if up:
            self._up_since = time.monotonic()

    def _silent_since(self) -> float:
        """Return a time: agents whose last heartbeat is older count as disconnected; 0 soon after an outage."""
        if time.monotonic() - self._up_since < self._silence_timeout:
            return 0.0
        return time.time() - self._silence_timeout


class PayloadCheck:
    """Checks that payloads are messages of the declared class, before an agent spends an attempt on them.

    Payloads are bytes, and a caller without generated code may send anything. They are parsed by the leading contract:
    a payload that fits any live contract of a service fits that one.
    """

    def __init__(self, contracts: Contracts, registry: ContractRegistry) -> None:
        self._contracts = contracts
        self._registry = registry
        self._building = asyncio.Lock()
        self._classes: OrderedDict[tuple[str, str], type[Message] | None] = OrderedDict()

    async def request(self, method: TaskMethod, payload: bytes) -> None:
        """Check a request.

        Raises:
            InvalidArgument: The payload is not a message of the method's class.
            StoreUnavailable: The contract is not cached, and the store is down.
        """
        await self._check("request", method, method.request, payload)

    def request_cached(self, method: TaskMethod, payload: bytes) -> bool:
        """Check a request if its class is cached; returns whether it is. Raises InvalidArgument as `request`."""
        key = (self._registry.leading(method.service), method.request)
        if key not in self._classes:
            return False
        self._classes.move_to_end(key)
        _parse("request", method, method.request, self._classes[key], payload)
        return True

    async def directive(self, method: TaskMethod, payload: bytes) -> None:
        """Check a directive. Raises the same errors as `request`."""
        await self._check("payload", method, method.directive, payload)

    async def answer(self, method: TaskMethod, payload: bytes) -> None:
        """Check the answer to a suspended task. Raises the same errors as `request`."""
        await self._check("payload", method, method.answer, payload)

    async def _check(self, field: str, method: TaskMethod, name: str, payload: bytes) -> None:
        _parse(field, method, name, await self._class(method.service, name), payload)

    async def _class(self, service: str, name: str) -> type[Message] | None:
        """Return the class of a message; None if no image is available: the agent then checks the payload."""
        key = (self._registry.leading(service), name)
        if key not in self._classes:
            # A call may have a thousand submissions: one of them builds the class, the others wait.
            async with self._building:
                return self._classes[key] if key in self._classes else await self._build(service, *key)
        self._classes.move_to_end(key)
        return self._classes[key]

    async def _build(self, service: str, digest: str, name: str) -> type[Message] | None:
        contracts = (await self._contracts.registered([service])).get(service, [])
        image = next((each.image for each in contracts if each.digest == digest), b"")
        if not image:
            # Another orchestrator just changed the leading contract, or the store lost it: the next call tries again.
            return None
        try:
            kind = message_class(image, name)
        except InvalidContract:
            kind = None
        self._classes[digest, name] = kind
        if len(self._classes) > _MAX_CLASSES:
            self._classes.popitem(last=False)
        return kind


def _parse(field: str, method: TaskMethod, name: str, kind: type[Message] | None, payload: bytes) -> None:
    if kind is None or not payload:
        return
    try:
        kind.FromString(payload)
    except DecodeError:
        # The bytes may be secret, so the message shows only their number.
        raise InvalidArgument(
            f"{field}: {len(payload)} bytes that are not a {name}, which {method.full_name} takes; "
            "serialize that message in protobuf's binary format"
        ) from None
