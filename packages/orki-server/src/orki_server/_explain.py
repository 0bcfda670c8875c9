"""Explains what a task waits for, from the store and the fleet: the same through any orchestrator."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import BudgetBalance
from orki_server._registry import ContractRegistry
from orki_server._store.budget import used_up
from orki_server._store.fleet import AgentContracts
from orki_server._store.lifecycle import TERMINAL, Life
from orki_server._store.limits import read_limits
from orki_server._store.operations import Operation, shard_of
from orki_server._store.store import Store

_HELD: Final = (Life.OFFERED, Life.RUNNING, Life.CANCELLING_OFFER, Life.CANCELLING)
_MAX: Final = 20
"""Maximum number of explanations of a task."""
_ORDER: Final = (pb.CAUSE_ASSIGNABLE, pb.CAUSE_NO_FREE_SLOT, pb.CAUSE_LABELS, pb.CAUSE_CONTRACT_MISMATCH)
"""The agents of a queued task: those come first that can take it soonest."""


@dataclass(frozen=True, slots=True)
class TaskWaits:
    """What a task waits for. Times are in microseconds since the Unix epoch; 0 for none.

    Attributes:
        life: State of its life.
        paused: Whether its method or service is paused.
        retry_us: When it is queued again.
        offer_us: When its offer expires.
        lease_us: When its lease expires.
    """

    life: Life
    paused: bool
    retry_us: int
    offer_us: int
    lease_us: int


def _task_waits(reply: list[bytes]) -> TaskWaits | None:
    """Decode the reply of `waits`; None for an unknown task."""
    if not reply:
        return None
    state, paused, retry_us, offer_us, lease_us = reply
    return TaskWaits(Life[state.decode()], paused == b"1", int(retry_us), int(offer_us), int(lease_us))


def read_waits(task_id: str) -> Operation[TaskWaits | None]:
    """Read what a task waits for. The outcome is None without such a task."""
    return Operation("waits", shard_of(task_id), (task_id,), _task_waits, patient=False)


class Explainer:
    """Explains tasks.

    `agents` returns the agents of the fleet as they are now, and `budgets` those that a task is charged to.
    """

    def __init__(
        self,
        store: Store,
        registry: ContractRegistry,
        agents: Callable[[], Awaitable[list[AgentContracts]]],
        budgets: Callable[[str], Awaitable[list[BudgetBalance]]],
    ) -> None:
        self._budgets = budgets
        self._store = store
        self._registry = registry
        self._agents = agents

    async def explain(self, task: pb.TaskSnapshot, waits: TaskWaits) -> pb.ExplainResponse:
        """Return the causes of a task's state.

        Raises:
            StoreUnavailable: The store is down.
        """
        task.ClearField("response")
        return pb.ExplainResponse(task=task, explanations=(await self._causes(task, waits))[:_MAX])

    async def _causes(self, task: pb.TaskSnapshot, waits: TaskWaits) -> Sequence[pb.Explanation]:
        if task.state in TERMINAL:
            return [pb.Explanation(cause=pb.CAUSE_ENDED, agent_id=task.agent_id, detail="the task has ended")]
        if waits.life not in _HELD and (clause := used_up(await self._budgets(task.task_id))):
            return [_cause(pb.CAUSE_BUDGET, f"paused: {clause}")]
        if waits.life is Life.WAITING:
            if task.attempt.attempt:
                return [_cause(pb.CAUSE_RETRY, "the task waits for its next attempt", until_us=waits.retry_us)]
            return [_cause(pb.CAUSE_DELAYED, "the task waits for its start", until_us=task.start_us)]
        if waits.life is Life.SUSPENDED and task.over_budget:
            return [_cause(pb.CAUSE_BUDGET, "the budget of the task was raised, and it is about to be queued")]
        if waits.life is Life.SUSPENDED:
            asked = task.suspension
            until_us = asked.suspended_us + asked.deadline_ms * 1000 if asked.deadline_ms else 0
            return [_cause(pb.CAUSE_SUSPENDED, f"the task waits for an answer: {asked.question}", until_us=until_us)]
        agents = await self._agents()
        if waits.life is not Life.QUEUED:
            return [_holder(task, waits, agents)]
        if waits.paused:
            return [_cause(pb.CAUSE_PAUSED, f"{task.method} or its service is paused")]
        full = await self._full_limits(task) if task.limits else []
        service = task.method.partition("/")[0]
        serving = [each for each in agents if each.agent.connected and service in each.agent.services]
        if not serving:
            return [_cause(pb.CAUSE_NO_AGENT, f"no connected agent serves {service}")]
        await self._registry.refresh()
        found = [self._agent_cause(task, service, each) for each in serving]
        if full:
            found = [each for each in found if each.cause != pb.CAUSE_ASSIGNABLE]
        return full + sorted(found, key=lambda each: _ORDER.index(each.cause))

    async def _full_limits(self, task: pb.TaskSnapshot) -> list[pb.Explanation]:
        return [
            _cause(pb.CAUSE_LIMIT, f"the limit {each.key} allows {each.concurrency} attempts, which are taken")
            for each in await self._store.apply(read_limits())
            if each.key in task.limits and 0 < each.concurrency <= each.used
        ]

    def _agent_cause(self, task: pb.TaskSnapshot, service: str, serving: AgentContracts) -> pb.Explanation:
        agent, method = serving.agent, task.method
        digest = serving.digests.get(service, "")
        methods = [each.full_name for each in self._registry.methods_of(service, digest)]
        if methods and method not in methods:
            return _cause(
                pb.CAUSE_CONTRACT_MISMATCH,
                f"agent {agent.agent_id} serves {service} by a contract that does not declare {method}",
                agent,
            )
        missing = [name for name, value in sorted(task.labels.items()) if agent.labels.get(name) != value]
        if missing:
            text = f"agent {agent.agent_id} has no label {missing[0]}={task.labels[missing[0]]}"
            return _cause(pb.CAUSE_LABELS, text, agent)
        if agent.draining:
            return _cause(pb.CAUSE_NO_FREE_SLOT, f"agent {agent.agent_id} drains and takes no more tasks", agent)
        if len(agent.attempts) >= agent.slots:
            return _cause(pb.CAUSE_NO_FREE_SLOT, f"all {agent.slots} slots of agent {agent.agent_id} are taken", agent)
        return _cause(pb.CAUSE_ASSIGNABLE, f"agent {agent.agent_id} has a free slot and gets the task next", agent)


def _holder(task: pb.TaskSnapshot, waits: TaskWaits, agents: Sequence[AgentContracts]) -> pb.Explanation:
    """Explain the state of a task that was offered, runs, or is being cancelled."""
    agent = next((each.agent for each in agents if each.agent.agent_id == task.agent_id), None)
    if agent is None or not agent.connected:
        agent = pb.AgentSnapshot(agent_id=task.agent_id)
    where = f"agent {task.agent_id}"
    where += f" at orchestrator {agent.orchestrator_id}" if agent.orchestrator_id else ", which has no session now,"
    if waits.life in (Life.OFFERED, Life.CANCELLING_OFFER):
        return _cause(pb.CAUSE_OFFERED, f"{where} has not answered the offer yet", agent, waits.offer_us)
    return _cause(pb.CAUSE_LEASE_HELD, f"{where} holds the lease of the attempt", agent, waits.lease_us)


def _cause(
    cause: pb.Cause.ValueType, detail: str, agent: pb.AgentSnapshot | None = None, until_us: int = 0
) -> pb.Explanation:
    return pb.Explanation(
        cause=cause,
        agent_id=agent.agent_id if agent else "",
        orchestrator_id=agent.orchestrator_id if agent else "",
        until_us=until_us,
        detail=detail,
    )
