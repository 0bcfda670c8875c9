"""Which task services the fleet serves, under which contract, and whether a newcomer's contract fits.

An agent's hello brings the digest of every contract that it serves. An equal digest passes, an unknown service is
registered. A different one is refused by name while the registered one is *live*: an agent has a session under it, or
tasks of it have not ended. Once it is not, the newcomer's takes its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from orki.control.v1.session_pb2 import ServedService
from orki.control.v1.task_pb2 import ServiceSnapshot
from orki_contract.errors import ContractMismatch, InvalidContract, UnknownMethod
from orki_contract.images import service_digest
from orki_contract.model import TaskMethod
from orki_contract.read import read_image
from orki_server.store import Store

__all__ = ["Registry"]

_REFRESH_S: Final = 1.0
"""Shortest time between two looks at what other orchestrators have registered."""


@dataclass(frozen=True, slots=True)
class _Service:
    digest: str
    methods: dict[str, TaskMethod]


class Registry:
    """Registered services, remembered from the store.

    Args:
        store: Where they are.
        serving: Agents with a session under a service and digest, by id; other orchestrators' agents need not be known.
    """

    def __init__(self, store: Store, serving: Callable[[str, str], Iterable[str]]) -> None:
        self._store = store
        self._serving = serving
        self._services: dict[str, _Service] = {}
        self._registered: set[str] = set()
        self._refreshed = 0.0

    async def refresh(self) -> None:
        """Reads what is registered.

        Raises:
            StoreUnavailable: The store is away.
        """
        digests = await self._store.fleet.digests()
        new = [name for name, digest in digests.items() if self._digest(name) != digest]
        for snapshot in await self._store.fleet.services(new):
            self._remember(snapshot)
        self._refreshed = time.monotonic()

    def forget(self) -> None:
        """The store lost what was registered: what agents bring is registered anew. Methods stay known meanwhile."""
        self._registered.clear()

    async def method(self, full_name: str) -> TaskMethod:
        """The contract of `package.Service/Method`.

        Raises:
            UnknownMethod: Nobody has registered it.
            StoreUnavailable: It is not known here, and the store is away.
        """
        service, _, _ = full_name.partition("/")
        known = self._services.get(service)
        if known is None or full_name not in known.methods:
            if time.monotonic() - self._refreshed >= _REFRESH_S:
                await self.refresh()
                known = self._services.get(service)
            if known is None:
                served = ", ".join(sorted(self._services)) or "none yet"
                raise UnknownMethod(
                    f"no agent has registered the service {service!r} (registered: {served}); start one that serves it"
                )
            if full_name not in known.methods:
                raise UnknownMethod(
                    f"the service {service} has no task {full_name!r}; it has {', '.join(sorted(known.methods))}"
                )
        return known.methods[full_name]

    def methods_of(self, service: str) -> tuple[str, ...]:
        """Full names of a registered service's tasks."""
        known = self._services.get(service)
        return tuple(known.methods) if known else ()

    async def admit(self, agent_id: str, services: Iterable[ServedService]) -> None:
        """Judges what an agent serves, and registers what is new.

        Raises:
            InvalidContract: An image is none, lacks its service, or has another digest than was said.
            ContractMismatch: A service is live with another contract.
            StoreUnavailable: The store is away.
        """
        for served in services:
            if self._digest(served.service) == served.digest and served.service in self._registered:
                continue
            methods = _judge_image(served)
            standing = (await self._store.fleet.digests()).get(served.service, "")
            if standing not in ("", served.digest):
                await self._refuse_while_live(agent_id, served, standing)
            snapshot = ServiceSnapshot(service=served.service, digest=served.digest, image=served.image)
            stands = await self._store.fleet.register(snapshot, standing, served.version)
            if stands != served.digest:
                # Another orchestrator registered a third contract between our look and our write.
                raise _mismatch(agent_id, served, stands, "an agent has just registered it")
            self._services[served.service] = _Service(served.digest, methods)
            self._registered.add(served.service)

    async def _refuse_while_live(self, agent_id: str, served: ServedService, standing: str) -> None:
        agents = sorted(set(self._serving(served.service, standing)) - {agent_id})
        agents += [
            agent.agent_id
            for agent in await self._store.fleet.agents()
            if agent.connected and served.service in agent.services and agent.agent_id not in (agent_id, *agents)
        ]
        if agents:
            raise _mismatch(agent_id, served, standing, f"agents {', '.join(agents[:5])} serve it")
        unfinished = await self._store.fleet.unfinished(served.service)
        if unfinished:
            raise _mismatch(agent_id, served, standing, f"{unfinished} tasks of it have not ended")

    def _digest(self, service: str) -> str:
        known = self._services.get(service)
        return known.digest if known else ""

    def _remember(self, snapshot: ServiceSnapshot) -> None:
        methods = read_image(snapshot.image).contract.tasks
        named = {each.full_name: each for each in methods if each.service == snapshot.service}
        self._services[snapshot.service] = _Service(snapshot.digest, named)
        self._registered.add(snapshot.service)


def _judge_image(served: ServedService) -> dict[str, TaskMethod]:
    if not served.image:
        raise InvalidContract(
            f"the service {served.service} came without its contract's image; the agent's package lacks contract.binpb"
        )
    digest = service_digest(served.image, served.service)
    if digest != served.digest:
        raise InvalidContract(
            f"the service {served.service}: its image has the digest {digest}, not {served.digest} as the agent said; "
            "generate the package again"
        )
    methods = {
        each.full_name: each for each in read_image(served.image).contract.tasks if each.service == served.service
    }
    if not methods:
        raise InvalidContract(
            f"the service {served.service} declares no task; a tool service is not for the orchestrator"
        )
    return methods


def _mismatch(agent_id: str, served: ServedService, standing: str, why: str) -> ContractMismatch:
    return ContractMismatch(
        f"agent {agent_id} serves {served.service} under the contract {served.digest}, but {standing} is live: {why}. "
        "Stop the agents of the older contract and let its tasks end, or serve the new one under another name"
    )
