"""Budgets of trees of tasks: pauses tasks whose budget is used up, and lets them go on when it is raised.

A task may be on another shard than the budgets that it is charged to. So each step is two operations, ordered so that a
crash between them can only repeat the first: usage is charged before the result that carries it is accepted, a task is
noted as waiting before it is suspended, and is forgotten as waiting after it was queued.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki.control.v1.task_pb2_grpc import TaskServiceServicer
from orki_contract.errors import InvalidArgument, OrkiError, UnknownTask
from orki_control.session import AttemptKey
from orki_server._calls import Context, typed
from orki_server._identity import Action
from orki_server._session import AgentSession, ChargedTo, SessionRegistry
from orki_server._store.budget import (
    Admitted,
    admit,
    admitted,
    balance,
    check_amounts,
    lineage_of,
    over_budget,
    raise_budget,
    resume_budget,
    used_up,
)
from orki_server._store.operations import OfferedAttempt, shard_of
from orki_server._store.replies import ReportReply
from orki_server._store.store import Store

_POLL: Final = 1.0
"""Time after which running attempts learn that others have used up their budget."""
_RETRY: Final = 0.5
_log = logging.getLogger("orki.server.budgets")


class Budgets:
    """The budgets of the attempts on the sessions of this orchestrator.

    It calls `on_queued` with shard and method of a task that is queued again, and `on_change` with a task that changed,
    and False as it has not ended.
    """

    def __init__(
        self,
        store: Store,
        sessions: SessionRegistry,
        on_queued: Callable[[int, str], None],
        on_change: Callable[[str, bool], None],
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._on_queued = on_queued
        self._on_change = on_change
        self._raised: set[int] = set()
        self._wake = asyncio.Event()

    # --- Offers. ---

    async def admit_offers(
        self, sessions: Sequence[AgentSession], offers: Sequence[OfferedAttempt]
    ) -> dict[AttemptKey, list[BudgetBalance]]:
        """Read the budgets of assigned tasks. Those whose budget is used up are suspended, and have no entry."""
        found: dict[AttemptKey, list[BudgetBalance]] = {}
        read = [self._admit_offer(sessions[each.recipient], each, found) if each.accounts else None for each in offers]
        for each in offers:
            if not each.accounts:
                found[each.attempt] = []
        await asyncio.gather(*filter(None, read))
        return found

    async def _admit_offer(
        self, session: AgentSession, offered: OfferedAttempt, found: dict[AttemptKey, list[BudgetBalance]]
    ) -> None:
        key = offered.attempt
        try:
            balances = await self._store.apply(balance(offered.accounts, key, waits=True))
            clause = used_up(balances)
            if not clause:
                session.budgets[key] = ChargedTo(offered.accounts)
                found[key] = balances
                return
            reply = await self._store.apply(over_budget(session.agent_id, key, f"paused: {clause}", unsent=True))
        except OrkiError as error:
            # The offer expires, and the task is offered again.
            _log.warning("%s is not offered: its budgets cannot be read: %s", key, error.message)
            return
        self.settled(key, reply)

    def settled(self, key: AttemptKey, reply: ReportReply) -> None:
        self._on_change(key.task_id, False)
        if reply.retry_after is not None:
            self._on_queued(shard_of(key.task_id), reply.method)

    # --- Running attempts. ---

    def charged(self, session: AgentSession, key: AttemptKey, total: Budget, balances: list[BudgetBalance]) -> None:
        """Usage was charged: tell the attempts that are charged to the same budgets, if one of them is used up."""
        if (charged_to := session.budgets.get(key)) is not None:
            charged_to.total = total
        session.machine.update_budgets(key, balances, total)
        self.spent(balances)

    def spent(self, balances: list[BudgetBalance]) -> None:
        """Tell running attempts soon if one of these budgets is used up."""
        if used_up(balances):
            self._wake.set()

    async def _tell_attempts(self) -> None:
        """Tell running attempts what is left of budgets that are used up."""
        waiting: dict[tuple[str, ...], list[tuple[AgentSession, AttemptKey]]] = {}
        for session in self._sessions.values():
            if session.budgets:
                held = session.machine.attempts
                session.budgets = {key: each for key, each in session.budgets.items() if key in held}
            for key, charged_to in session.budgets.items():
                waiting.setdefault(charged_to.accounts, []).append((session, key))
        for accounts, attempts in waiting.items():
            balances = await self._store.apply(balance(accounts, attempts[0][1]))
            if used_up(balances):
                for session, key in attempts:
                    if (now := session.budgets.get(key)) is not None:
                        session.machine.update_budgets(key, balances, now.total)

    # --- Raises. ---

    def were_raised(self, shard: int) -> None:
        """Budgets on a shard were raised."""
        self._raised.add(shard)
        self._wake.set()

    async def run(self) -> None:
        """Tell attempts that their budgets are used up, and queue tasks whose budgets were raised."""
        while True:
            try:
                async with asyncio.timeout(_POLL):
                    await self._wake.wait()
            except TimeoutError:
                if not any(session.budgets for session in self._sessions.values()):
                    continue
            self._wake.clear()
            await self._store.connection.up.wait()
            try:
                for shard in list(self._raised):
                    await self._admit_all(shard)
                await self._tell_attempts()
            except OrkiError as error:
                _log.warning("budgets are late: %s", error.message)
                await asyncio.sleep(_RETRY)

    async def _admit_all(self, shard: int) -> None:
        tasks = await self._store.apply(admitted(shard))
        await asyncio.gather(*map(self._admit, tasks))
        self._raised.discard(shard)  # The sweeps find the shard again while tasks are left.

    async def _admit(self, each: Admitted) -> None:
        status, method = "gone", ""
        try:
            status, method = await self._store.apply(resume_budget(each))
        except UnknownTask as error:
            _log.warning("task %s waits for a budget and cannot go on: %s", each.task_id, error.message)
        if status == "running":
            return
        if status == "admitted":
            self._on_change(each.task_id, False)
            self._on_queued(shard_of(each.task_id), method)
        await self._store.apply(admit(each))

    async def raise_one(self, task_id: str, budget: Budget) -> BudgetBalance:
        """Raise a budget.

        Raises:
            InvalidArgument: The task has no budget of its own, or an amount would be lower.
            UnknownTask: There is no such task.
            StoreUnavailable: The store is down.
        """
        accounts = await self.accounts(task_id)
        if task_id not in accounts:
            others = f"; it is charged to the budget of task {accounts[-1]}" if accounts else ""
            raise InvalidArgument(f"task {task_id} was submitted without a budget{others}")
        status, raised = await self._store.apply(raise_budget(accounts[0], task_id, budget))
        if status == "unknown":
            raise UnknownTask(f"the budget of task {task_id} was removed with task {accounts[0]}")
        if status == "lower":
            raise InvalidArgument(f"the budget of task {task_id} can only be raised, amount by amount")
        self.were_raised(shard_of(accounts[0]))
        return raised

    async def accounts(self, task_id: str) -> tuple[str, ...]:
        """Return the tasks whose budgets a task is charged to, the topmost first. Raises UnknownTask."""
        found = await self._store.apply(lineage_of(task_id))
        if found is None:
            raise UnknownTask(f"there is no task {task_id}")
        return found.accounts

    async def balances(self, task_id: str) -> list[BudgetBalance]:
        """Return the budgets that a task is charged to, the topmost first. Raises UnknownTask."""
        accounts = await self.accounts(task_id)
        return await self._store.apply(balance(accounts, AttemptKey(task_id, 0, 0))) if accounts else []


class BudgetCalls(TaskServiceServicer):
    """The calls of TaskService about budgets."""

    _budgets: Budgets

    async def read(self, task_id: str, action: Action | None = None) -> pb.TaskSnapshot:
        raise NotImplementedError

    @typed
    async def GetBudgets(self, request: pb.GetBudgetsRequest, context: Context) -> pb.GetBudgetsResponse:
        await self.read(request.task_id, Action.READ)
        return pb.GetBudgetsResponse(budgets=await self._budgets.balances(request.task_id))

    @typed
    async def RaiseBudget(self, request: pb.RaiseBudgetRequest, context: Context) -> pb.RaiseBudgetResponse:
        """Raise a budget. The tasks that it paused are queued soon after, by any orchestrator."""
        check_amounts(request.budget)
        await self.read(request.task_id, Action.LIMIT)
        return pb.RaiseBudgetResponse(budget=await self._budgets.raise_one(request.task_id, request.budget))
