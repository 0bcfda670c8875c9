"""Whether a contract of a task service may come into use: judged by findings against every one that is live.

A registered contract is *live* while an agent anywhere in the fleet has a session under it, while tasks that were
submitted under it have not ended, or while it is applied ahead. A newcomer that fits all live ones is registered beside
them, be it older or newer; one that breaks with a live one on the wire is refused by the names of the rules. What is
not live stands in nobody's way: it goes when something else of its service is registered, or when another one of its
service is live and nothing has used it for a while. The last one of a service stays, so that tasks can be submitted
while its agents are away.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Final, TypeVar

from orki_contract.errors import ContractMismatch, InvalidContract, Overloaded
from orki_contract.findings import Fit, service_fit
from orki_contract.images import service_digest
from orki_contract.model import TaskMethod
from orki_contract.read import ReadContract, read_image
from orki_server._store.contracts import ContractChange, Contracts, RegisteredContract
from orki_server._store.fleet import Fleet

_TRIES: Final = 20
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """Why a contract is live.

    Attributes:
        agents: Who serves it.
        tasks: Number of its unfinished tasks.
        ahead: Whether it is applied ahead.
    """

    agents: tuple[str, ...] = ()
    tasks: int = 0
    ahead: bool = False

    def __bool__(self) -> bool:
        return bool(self.agents or self.tasks or self.ahead)

    def __str__(self) -> str:
        if self.agents:
            names = ", ".join(self.agents[:_SHOWN])
            if len(self.agents) == 1:
                return f"agent {names} serves it"
            more = f" and {len(self.agents) - _SHOWN} more" if len(self.agents) > _SHOWN else ""
            return f"agents {names}{more} serve it"
        if self.tasks:
            return "1 task of it has not ended" if self.tasks == 1 else f"{self.tasks} tasks of it have not ended"
        return "it was applied ahead" if self.ahead else "it is not live"


async def no_delay() -> None:
    """What there is to write before a refusal, for those who have nothing to write."""


class Admission:
    """Judges contracts of services, and changes what is registered.

    Args:
        contracts: What is registered.
        fleet: Who serves.
        silent_us: Tells the time of the last sign of life, in microseconds since the Unix epoch, before which an agent
            counts as gone although nobody saw it leave.
        settle: Writes what is known here of agents that left; called before a refusal.
    """

    def __init__(
        self,
        contracts: Contracts,
        fleet: Fleet,
        silent_us: Callable[[], int],
        settle: Callable[[], Awaitable[None]] = no_delay,
    ) -> None:
        self._contracts = contracts
        self._fleet = fleet
        self._silent_us = silent_us
        self._settle = settle

    async def judge(self, newcomer: ServiceContract, who: str) -> None:
        """As `admit`, and changes nothing."""
        seen = await self._seen(newcomer.service)
        live = await self.liveness(newcomer.service, seen)
        standing = {each.digest: ServiceContract.of(each) for each in seen}
        conflict = await off_loop(partial(_conflict, newcomer, standing, live))
        if conflict is not None:
            other, fit = conflict
            raise ContractMismatch(_refusal(newcomer, other, fit, who, live[other.digest]))

    async def admit(
        self, newcomer: ServiceContract, who: str, *, agent_id: str = "", ahead: bool = False
    ) -> ContractSet:
        """Registers a contract beside those that are live.

        Args:
            newcomer: The contract, checked.
            who: Who brings it, for messages, such as `agent a-1 serves`.
            agent_id: The agent that brings it: its own session of before does not count.
            ahead: Whether nobody serves it yet.

        Returns:
            All contracts of the service, the newcomer among them.

        Raises:
            ContractMismatch: It breaks with one that is live.
            InvalidContract: A registered image cannot be read.
            Overloaded: Others changed the service's contracts all the time.
            StoreUnavailable: The store is away.
        """
        settled = False
        for _ in range(_TRIES):
            seen = await self._seen(newcomer.service)
            standing = {each.digest: ServiceContract.of(each) for each in seen}
            known = next((each for each in seen if each.digest == newcomer.digest), None)
            if known is not None and not ahead:
                return await off_loop(partial(ContractSet, standing.values()))
            live = await self.liveness(newcomer.service, seen, agent_id)
            conflict = await off_loop(partial(_conflict, newcomer, standing, live))
            if conflict is not None and not settled:
                settled = True
                await self._settle()
                continue
            if conflict is not None:
                other, fit = conflict
                raise ContractMismatch(_refusal(newcomer, other, fit, who, live[other.digest]))
            if known is not None and (known.ahead or live[known.digest]):
                return await off_loop(partial(ContractSet, standing.values()))
            gone = [each for each in seen if not live[each.digest] and each.digest != newcomer.digest]
            stays = [contract for digest, contract in standing.items() if live[digest]]
            family = await off_loop(partial(ContractSet, [*stays, newcomer]))
            added = RegisteredContract(
                service=newcomer.service,
                digest=newcomer.digest,
                image=newcomer.image,
                version=newcomer.version,
                ahead=ahead,
                since_ms=0,
                admissions=0,
            )
            if await self._change(seen, gone, added, family):
                return family
        raise Overloaded(f"the contracts of {newcomer.service} change all the time; try again")

    async def clean(self, service: str, spared_ms: int) -> bool:
        """Forgets what is not live, where something else of the service is; whether anything went.

        Args:
            service: Full name.
            spared_ms: Contracts that were registered less than this ago stay.

        Raises:
            StoreUnavailable: The store is away.
        """
        seen = await self._seen(service)
        if len(seen) < 2:
            return False
        live = await self.liveness(service, seen)
        recent = time.time() * 1000 - spared_ms
        gone = [each for each in seen if not live[each.digest] and each.since_ms < recent]
        if not gone or len(gone) == len(seen):
            return False
        stays = [ServiceContract.of(each) for each in seen if each not in gone]
        family = await off_loop(partial(ContractSet, stays))
        return await self._change(seen, gone, None, family)

    async def withdraw(self, registered: RegisteredContract) -> bool:
        """Forgets a contract that nobody uses; False where somebody does by now, or others changed the service's.

        Raises:
            StoreUnavailable: The store is away.
        """
        seen = await self._seen(registered.service)
        live = await self.liveness(registered.service, seen)
        at = [each for each in seen if each.digest == registered.digest]
        if not at or live[registered.digest].agents or live[registered.digest].tasks:
            return False
        rest = [ServiceContract.of(each) for each in seen if each not in at]
        return await self._change(seen, at, None, await off_loop(partial(ContractSet, rest)) if rest else None)

    async def in_use(self, contract: ServiceContract) -> bool:
        """Whether agents serve a contract, or tasks of it have not ended.

        Raises:
            StoreUnavailable: The store is away.
        """
        seen = [each for each in await self._seen(contract.service) if each.digest == contract.digest]
        return any(each.agents or each.tasks for each in (await self.liveness(contract.service, seen)).values())

    async def liveness(
        self, service: str, seen: Sequence[RegisteredContract], without: str = ""
    ) -> Mapping[str, Liveness]:
        """Why each registered contract of a service is live, by digest; one agent may be left out.

        Raises:
            StoreUnavailable: The store is away.
        """
        silent = self._silent_us()
        agents = [
            each
            for each in await self._fleet.serving()
            if each.agent.connected and each.agent.last_heartbeat_us >= silent and each.agent.agent_id != without
        ]
        tasks = await self._contracts.unfinished(service) if seen else {}
        return {
            each.digest: Liveness(
                agents=tuple(other.agent.agent_id for other in agents if other.serves(service, each.digest)),
                tasks=tasks.get(each.digest, 0) + tasks.get("", 0),
                ahead=each.ahead,
            )
            for each in seen
        }

    async def _seen(self, service: str) -> list[RegisteredContract]:
        return (await self._contracts.registered([service]))[service]

    async def _change(
        self,
        seen: Sequence[RegisteredContract],
        gone: Sequence[RegisteredContract],
        added: RegisteredContract | None,
        family: ContractSet | None,
    ) -> bool:
        service = (added or seen[0]).service
        leading = family.leading.digest if family else ""
        return await self._contracts.change(
            ContractChange(service=service, seen=seen, gone=gone, added=added, leading=leading)
        )


def _conflict(
    newcomer: ServiceContract, standing: Mapping[str, ServiceContract], live: Mapping[str, Liveness]
) -> tuple[ServiceContract, Fit] | None:
    """The first live contract with which a newcomer breaks."""
    for digest, other in standing.items():
        if not live[digest] or digest == newcomer.digest:
            continue
        fit = service_fit(newcomer.service, other.read, newcomer.read)
        if not fit.compatible:
            return other, fit
    return None


def _refusal(newcomer: ServiceContract, other: ServiceContract, fit: Fit, who: str, live: Liveness) -> str:
    forward = _follows(newcomer, other, fit)
    old, new = (other, newcomer) if forward else (newcomer, other)
    step = "Stop the agents of the other contract and let its tasks end, or serve the new one under another name"
    if live.ahead and not live.agents and not live.tasks:
        step = f"Withdraw that one (orki contract withdraw {other.service} {other.digest}), or serve what fits it"
    return (
        f"{who} {newcomer.service} under the contract {newcomer}, which does not fit {other}, "
        f"and that is live: {live}. From {old} to {new}, {fit.told(forward=forward)}. {step}"
    )


def _follows(newcomer: ServiceContract, other: ServiceContract, fit: Fit) -> bool:
    """Whether a newcomer is the later version: by the numbers, else by the direction in which less breaks."""
    if newcomer.release != other.release and newcomer.release and other.release:
        return newcomer.release > other.release
    return fit.breaks is fit.forward


_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class ServiceContract:
    """One contract of a task service.

    Attributes:
        service: Full name of the service.
        digest: Of the contract: `sha256:` and 64 hex digits.
        image: The contract.
        version: Version of the package that holds it; empty where nobody knows.
    """

    service: str
    digest: str
    image: bytes = field(repr=False)
    version: str = ""

    @classmethod
    def of(cls, registered: RegisteredContract) -> ServiceContract:
        """One that is registered."""
        return cls(
            service=registered.service,
            digest=registered.digest,
            image=registered.image,
            version=registered.version,
        )

    @cached_property
    def read(self) -> ReadContract:
        """The contract; raises InvalidContract where the image is none."""
        return read_image(self.image)

    @cached_property
    def methods(self) -> Mapping[str, TaskMethod]:
        """Its tasks, by full name."""
        return {each.full_name: each for each in self.read.contract.tasks if each.service == self.service}

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers that its version begins with, such as (1, 2, 0); empty where none is known."""
        numbers = re.match(r"\d+(?:\.\d+)*", self.version)
        return tuple(map(int, numbers[0].split("."))) if numbers else ()

    def __str__(self) -> str:
        """Version, where it is known, and the digest's beginning."""
        short = self.digest[: len("sha256:") + _DIGITS]
        return f"{self.version} ({short})" if self.version else short

    def check(self) -> None:
        """Judges what an agent or an operator brings.

        Raises:
            InvalidContract: The image is none, lacks the service or its tasks, or has another digest than was said.
        """
        if not self.image:
            raise InvalidContract(
                f"the service {self.service} came without its contract's image; the package that declares it lacks "
                "contract.binpb"
            )
        digest = service_digest(self.image, self.service)
        if digest != self.digest:
            raise InvalidContract(
                f"the service {self.service}: its image has the digest {digest}, not {self.digest} as was said; "
                "generate the package again"
            )
        if not self.methods:
            raise InvalidContract(
                f"the service {self.service} declares no task; a tool service is not for the orchestrator"
            )


class ContractSet:
    """Contracts of one service.

    Attributes:
        contracts: By digest.
        leading: The one that leads.
        methods: Tasks by full name, with the values that count.
    """

    def __init__(self, contracts: Iterable[ServiceContract]) -> None:
        """Args: contracts: at least one."""
        self.contracts = {each.digest: each for each in contracts}
        self.leading = _leading(list(self.contracts.values()))
        named: dict[str, list[TaskMethod]] = {}
        for each in self.contracts.values():
            for name, method in each.methods.items():
                named.setdefault(name, []).append(method)
        self.methods = {name: most_patient(found) for name, found in sorted(named.items())}


def most_patient(methods: Sequence[TaskMethod]) -> TaskMethod:
    """One task out of several versions of it: every value as the most patient has it, and news and directives if any.

    Args:
        methods: At least one, all of one name; 0 as a stall or total timeout is no limit, and so the most patient.
    """

    def limit(values: Iterable[float]) -> float:
        found = list(values)
        return 0 if 0 in found else max(found)

    backoff = max((each.backoff for each in methods), key=lambda each: (each.maximum, each))
    return replace(
        methods[0],
        progress=max(each.progress for each in methods),
        directive=max(each.directive for each in methods),
        heartbeat_timeout=max(each.heartbeat_timeout for each in methods),
        attempt_timeout=max(each.attempt_timeout for each in methods),
        stall_timeout=limit(each.stall_timeout for each in methods),
        total_timeout=limit(each.total_timeout for each in methods),
        max_attempts=max(each.max_attempts for each in methods),
        backoff=backoff,
        cancel_grace=max(each.cancel_grace for each in methods),
    )


def _leading(contracts: list[ServiceContract]) -> ServiceContract:
    """The one that evolves most of the others; of equals the one with the highest digest, so that all agree."""

    def evolved(each: ServiceContract) -> tuple[int, str]:
        others = [other for other in contracts if other.digest != each.digest]
        return sum(not _fit(other, each).forward for other in others), each.digest

    return max(contracts, key=evolved) if len(contracts) > 1 else contracts[0]


def _fit(first: ServiceContract, second: ServiceContract) -> Fit:
    return service_fit(first.service, first.read, second.read)


T = TypeVar("T")


async def off_loop(work: Callable[[], T]) -> T:
    """Runs `work` while the event loop goes on; reading and comparing large contracts takes a second and more.

    Raises:
        Exception: What `work` raises.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="orki off loop") as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
