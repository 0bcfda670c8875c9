"""Contracts of a task service: those in use together, and whether a new one may be added.

A registered contract is *live* while an agent of the fleet has a session under it, while tasks that were submitted
under it have not ended, or while it is applied *ahead*: registered by a command before any agent serves it. A new
contract that is compatible with all live ones, older or newer, is registered beside them; an incompatible one is
refused with the names of the violated rules. A contract that is not live is removed when another one of its service is
registered, or after a while if another one is live. The last contract of a service stays, so that tasks can be
submitted while its agents are disconnected.

Of any two contracts in use, one is a compatible evolution of the other. So one is an evolution of all others: it is the
*leading* contract, which declares every task of the others. While several contracts are in use, the most patient value
of each timeout, number of attempts, grace and back-off applies to a task. A task keeps the values of its submission.
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
from orki_contract.model import TASK_MESSAGES, Budget, TaskMethod
from orki_contract.read import ReadContract, read_image
from orki_server._store.contracts import Contracts, RegisteredContract
from orki_server._store.fleet import Fleet

T = TypeVar("T")

_TRIES: Final = 20
_SHOWN_AGENTS: Final = 5
_SHOWN_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class ServiceContract:
    """One contract of a task service.

    Attributes:
        service: Full name of the service.
        digest: Digest of the contract: `sha256:` and 64 hex digits.
        version: Version of its package; empty if unknown.
    """

    service: str
    digest: str
    image: bytes = field(repr=False)
    version: str = ""

    @classmethod
    def of(cls, registered: RegisteredContract) -> ServiceContract:
        return cls(
            service=registered.service,
            digest=registered.digest,
            image=registered.image,
            version=registered.version,
        )

    @cached_property
    def read(self) -> ReadContract:
        """The model of the contract; raises InvalidContract if the image is malformed."""
        return read_image(self.image)

    @cached_property
    def methods(self) -> Mapping[str, TaskMethod]:
        return {each.full_name: each for each in self.read.contract.tasks if each.service == self.service}

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers at the beginning of its version, such as (1, 2, 0); empty if unknown."""
        numbers = re.match(r"\d+(?:\.\d+)*", self.version)
        return tuple(map(int, numbers[0].split("."))) if numbers else ()

    def __str__(self) -> str:
        """Return the version, if known, and the beginning of the digest."""
        short = self.digest[: len("sha256:") + _SHOWN_DIGITS]
        return f"{self.version} ({short})" if self.version else short

    def check(self) -> None:
        """Check the contract that an agent or an operator brings.

        Raises:
            InvalidContract: The image is missing or malformed, lacks the service or its tasks, or has another digest
                than declared.
        """
        if not self.image:
            raise InvalidContract(
                f"the service {self.service} came without the image of its contract; its package has no contract.binpb"
            )
        digest = service_digest(self.image, self.service)
        if digest != self.digest:
            raise InvalidContract(
                f"the service {self.service}: its image has the digest {digest}, not {self.digest} as declared; "
                "generate the package again"
            )
        if not self.methods:
            raise InvalidContract(
                f"the service {self.service} declares no task; agents serve tool services without the orchestrator"
            )


class ContractSet:
    """The contracts of one service that are in use together.

    Attributes:
        contracts: The contracts, by digest.
        methods: Tasks by full name, with the values that apply.
    """

    def __init__(self, contracts: Iterable[ServiceContract]) -> None:
        """Create the set of at least one contract."""
        self.contracts = {each.digest: each for each in contracts}
        self.leading = _leading(list(self.contracts.values()))
        named: dict[str, list[TaskMethod]] = {}
        for each in self.contracts.values():
            for name, method in each.methods.items():
                named.setdefault(name, []).append(method)
        self.methods = {name: most_patient(found) for name, found in sorted(named.items())}


def most_patient(methods: Sequence[TaskMethod]) -> TaskMethod:
    """Merge versions of one task: the most patient value of each setting, and the messages of any version.

    Args:
        methods: At least one version. A stall or total timeout of 0 means no limit, which is the most patient.
    """

    def limit(values: Iterable[float]) -> float:
        found = list(values)
        return 0 if 0 in found else max(found)

    backoff = max((each.backoff for each in methods), key=lambda each: (each.maximum, each))
    return replace(
        methods[0],
        **{name: max(getattr(each, name) for each in methods) for name in TASK_MESSAGES},
        heartbeat_timeout=max(each.heartbeat_timeout for each in methods),
        attempt_timeout=max(each.attempt_timeout for each in methods),
        stall_timeout=limit(each.stall_timeout for each in methods),
        total_timeout=limit(each.total_timeout for each in methods),
        max_attempts=max(each.max_attempts for each in methods),
        backoff=backoff,
        cancel_grace=max(each.cancel_grace for each in methods),
        # Of the texts, `replicas:N` is the greatest, and `fsync` is greater than none.
        durability=max(each.durability.removeprefix("memory") for each in methods),
        budget=Budget(
            tokens=int(limit(each.budget.tokens for each in methods)),
            cost_micros=int(limit(each.budget.cost_micros for each in methods)),
            calls=int(limit(each.budget.calls for each in methods)),
        ),
        progress_policy=min(each.progress_policy for each in methods),
    )


def _leading(contracts: list[ServiceContract]) -> ServiceContract:
    """Return the contract that is an evolution of most others; among equals, the one with the highest digest."""

    def evolved(each: ServiceContract) -> tuple[int, str]:
        others = [other for other in contracts if other.digest != each.digest]
        return sum(not service_fit(each.service, other.read, each.read).forward for other in others), each.digest

    return max(contracts, key=evolved) if len(contracts) > 1 else contracts[0]


async def run_in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own: reading and comparing large contracts takes up to seconds.

    Raises:
        Exception: Any exception of `work`.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="orki contracts") as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """Why a contract is live.

    Attributes:
        agents: Agents that serve it.
        tasks: Number of its unfinished tasks.
        ahead: Whether the contract is applied ahead.
    """

    agents: tuple[str, ...] = ()
    tasks: int = 0
    ahead: bool = False

    @property
    def used(self) -> bool:
        return bool(self.agents or self.tasks)

    def __bool__(self) -> bool:
        return self.used or self.ahead

    def __str__(self) -> str:
        if self.agents:
            names = ", ".join(self.agents[:_SHOWN_AGENTS])
            if len(self.agents) == 1:
                return f"agent {names} serves it"
            more = f" and {len(self.agents) - _SHOWN_AGENTS} more" if len(self.agents) > _SHOWN_AGENTS else ""
            return f"agents {names}{more} serve it"
        if self.tasks:
            return "1 task of it has not ended" if self.tasks == 1 else f"{self.tasks} tasks of it have not ended"
        return "it was applied ahead" if self.ahead else "it is not live"


class Admission:
    """Checks contracts of services, and changes the registered ones. Raises StoreUnavailable if the store is down."""

    def __init__(
        self,
        contracts: Contracts,
        fleet: Fleet,
        silent_since: Callable[[], float],
        flush: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Create the admission.

        Args:
            contracts: The registered contracts.
            fleet: The agents.
            silent_since: Returns the time, in seconds since the Unix epoch, before which a last heartbeat means that
                the agent is disconnected.
            flush: Stores which agents have disconnected; called before a contract is refused.
        """
        self._contracts = contracts
        self._fleet = fleet
        self._silent_since = silent_since
        self._flush = flush

    async def check(self, contract: ServiceContract, subject: str) -> None:
        """Check a contract as `admit` does, without changes. `subject` begins the message of a refusal.

        Raises:
            ContractMismatch: A live contract is incompatible.
        """
        seen = await self._registered(contract.service)
        live = await self.liveness(contract.service, seen)
        known = {each.digest: ServiceContract.of(each) for each in seen}
        if (conflict := await run_in_thread(partial(_conflict, contract, known, live))) is not None:
            raise _refusal(contract, *conflict, subject, live)

    async def admit(
        self, contract: ServiceContract, subject: str, *, agent_id: str = "", ahead: bool = False
    ) -> ContractSet:
        """Register a contract beside those that are live.

        Args:
            contract: The contract, checked.
            subject: Begins the message of a refusal, such as `agent a-1 serves`.
            agent_id: The agent that serves the contract; its earlier session makes no contract live.
            ahead: Whether the contract is registered before any agent serves it.

        Returns:
            All contracts of the service, including this one.

        Raises:
            ContractMismatch: A live contract is incompatible.
            InvalidContract: A registered image is malformed.
            Overloaded: Other processes keep changing the service's contracts.
        """
        flushed = False
        for _ in range(_TRIES):
            seen = await self._registered(contract.service)
            known = {each.digest: ServiceContract.of(each) for each in seen}
            registered = next((each for each in seen if each.digest == contract.digest), None)
            if registered is not None and not ahead:
                return await run_in_thread(partial(ContractSet, known.values()))
            live = await self.liveness(contract.service, seen, agent_id)
            conflict = await run_in_thread(partial(_conflict, contract, known, live))
            if conflict is not None and not flushed:
                flushed = True
                if self._flush is not None:
                    await self._flush()
                continue
            if conflict is not None:
                raise _refusal(contract, *conflict, subject, live)
            if registered is not None and (registered.ahead or live[registered.digest]):
                return await run_in_thread(partial(ContractSet, known.values()))
            removed = [each for each in seen if not live[each.digest] and each.digest != contract.digest]
            kept = [each for digest, each in known.items() if live[digest]]
            contracts = await run_in_thread(partial(ContractSet, [*kept, contract]))
            added = RegisteredContract(
                service=contract.service,
                digest=contract.digest,
                image=contract.image,
                version=contract.version,
                ahead=ahead,
                registered=0.0,
                admissions=0,
            )
            if await self._contracts.change(
                contract.service, seen=seen, removed=removed, added=added, leading=contracts.leading.digest
            ):
                return contracts
        raise Overloaded(f"the contracts of {contract.service} keep changing; try again")

    async def clean(self, service: str, min_age: float) -> bool:
        """Remove contracts that are not live if another one of the service is. Return whether any was removed.

        Contracts that were registered less than `min_age` seconds ago stay.
        """
        seen = await self._registered(service)
        if len(seen) < 2:
            return False
        live = await self.liveness(service, seen)
        recent = time.time() - min_age
        removed = [each for each in seen if not live[each.digest] and each.registered < recent]
        if not removed or len(removed) == len(seen):
            return False
        kept = [ServiceContract.of(each) for each in seen if each not in removed]
        leading = (await run_in_thread(partial(ContractSet, kept))).leading.digest
        return await self._contracts.change(service, seen=seen, removed=removed, added=None, leading=leading)

    async def withdraw(self, contract: RegisteredContract) -> bool:
        """Remove an unused contract. Return False if it is now in use, or if the service's contracts have changed."""
        seen = await self._registered(contract.service)
        live = await self.liveness(contract.service, seen)
        removed = [each for each in seen if each.digest == contract.digest]
        if not removed or live[contract.digest].used:
            return False
        kept = [ServiceContract.of(each) for each in seen if each not in removed]
        leading = (await run_in_thread(partial(ContractSet, kept))).leading.digest if kept else ""
        return await self._contracts.change(contract.service, seen=seen, removed=removed, added=None, leading=leading)

    async def in_use(self, contract: ServiceContract) -> bool:
        """Whether agents serve a contract, or it has unfinished tasks."""
        seen = [each for each in await self._registered(contract.service) if each.digest == contract.digest]
        return any(each.used for each in (await self.liveness(contract.service, seen)).values())

    async def liveness(
        self, service: str, seen: Sequence[RegisteredContract], without: str = ""
    ) -> Mapping[str, Liveness]:
        """Return why each registered contract of a service is live, by digest. The agent `without` does not count."""
        silent_since_us = self._silent_since() * 1_000_000
        agents = [
            each
            for each in await self._fleet.agents()
            if each.agent.connected
            and each.agent.last_heartbeat_us >= silent_since_us
            and each.agent.agent_id != without
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

    async def _registered(self, service: str) -> list[RegisteredContract]:
        return (await self._contracts.registered([service]))[service]


def _conflict(
    contract: ServiceContract, known: Mapping[str, ServiceContract], live: Mapping[str, Liveness]
) -> tuple[ServiceContract, Fit] | None:
    """Return the first live contract that is incompatible with a new one."""
    for digest, other in known.items():
        if not live[digest] or digest == contract.digest:
            continue
        fit = service_fit(contract.service, other.read, contract.read)
        if not fit.compatible:
            return other, fit
    return None


def _refusal(
    contract: ServiceContract, other: ServiceContract, fit: Fit, subject: str, live: Mapping[str, Liveness]
) -> ContractMismatch:
    liveness = live[other.digest]
    forward = _follows(contract, other, fit)
    old, new = (other, contract) if forward else (contract, other)
    step = "Stop the agents of the other contract and let its tasks end, or serve the new one under another name"
    if not liveness.used:
        step = f"Withdraw that one (orki contract withdraw {other.service} {other.digest}), or serve a compatible one"
    return ContractMismatch(
        f"{subject} {contract.service} under the contract {contract}, which is incompatible with {other}, "
        f"and that is live: {liveness}. From {old} to {new}, {fit.describe(forward=forward)}. {step}"
    )


def _follows(contract: ServiceContract, other: ServiceContract, fit: Fit) -> bool:
    """Whether a new contract is the later version, by version numbers, else by the direction that breaks less."""
    if contract.release != other.release and contract.release and other.release:
        return contract.release > other.release
    return fit.breaks is fit.forward
