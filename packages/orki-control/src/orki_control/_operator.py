"""Calls of operators: pauses, limits and budgets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import BudgetBalance
from orki_contract import Budget
from orki_contract.errors import InvalidArgument
from orki_control._links import Link
from orki_control._submissions import budget_message

A = TypeVar("A")


class OperatorCalls:
    """The calls of operators; `Client` inherits them."""

    async def _call(self, once: Callable[[Link], Awaitable[A]]) -> A:
        raise NotImplementedError

    @property
    def _timeout(self) -> float:
        raise NotImplementedError

    async def pause(self, target: str, message: str = "") -> pb.Pause:
        """Pause a service or a method: its queued tasks wait, and running attempts go on.

        Args:
            target: Full name of a registered service, or of a method as `package.Service/Method`.
            message: Explanation for operators.

        Raises:
            UnknownMethod: No such service or method is registered.
        """
        request = pb.PauseRequest(target=target, message=message)
        answer = await self._call(lambda link: link.fleet.Pause(request, timeout=self._timeout))
        return answer.pause

    async def resume(self, target: str) -> bool:
        """End the pause of a service or a method. Returns whether it was paused."""
        request = pb.ResumeRequest(target=target)
        answer = await self._call(lambda link: link.fleet.Resume(request, timeout=self._timeout))
        return answer.was_paused

    async def list_pauses(self) -> Sequence[pb.Pause]:
        """Return what is paused, by target."""
        answer = await self._call(lambda link: link.fleet.ListPauses(pb.ListPausesRequest(), timeout=self._timeout))
        return answer.pauses

    async def set_limit(self, key: str, *, concurrency: int = 0, interval: float = 0.0, burst: int = 1) -> None:
        """Declare a limit for all tasks that name its key. Without concurrency and interval the limit is removed.

        Args:
            key: The key.
            concurrency: Maximum number of offered and running attempts; 0 for no maximum.
            interval: Minimum time between two offers in seconds; 0 for none.
            burst: Number of offers that may be made at once after a pause.
        """
        if not (concurrency >= 0 and 0 <= interval <= 86_400 and burst >= 1):
            raise InvalidArgument(f"limit {key}: use 0 or more attempts, 0 to 86400 seconds, and a burst of at least 1")
        limit = pb.Limit(key=key, concurrency=concurrency, interval_us=round(interval * 1_000_000), burst=burst)
        request = pb.SetLimitRequest(limit=limit)
        await self._call(lambda link: link.fleet.SetLimit(request, timeout=self._timeout))

    async def budgets(self, task_id: str) -> Sequence[BudgetBalance]:
        """Return the budgets that a task is charged to with their use, that of the topmost task first.

        Raises:
            UnknownTask: No task has this id.
        """
        request = pb.GetBudgetsRequest(task_id=task_id)
        answer = await self._call(lambda link: link.tasks.GetBudgets(request, timeout=self._timeout))
        return answer.budgets

    async def raise_budget(self, task_id: str, budget: Budget) -> BudgetBalance:
        """Raise the budget of a task. The tasks that it paused go on.

        Args:
            task_id: A task that was submitted with a budget.
            budget: The new amounts, each at least as high as before; 0 keeps an amount.

        Raises:
            InvalidArgument: The task has no budget of its own, or an amount is lower than before.
            UnknownTask: No task has this id.
        """
        request = pb.RaiseBudgetRequest(task_id=task_id, budget=budget_message(budget))
        answer = await self._call(lambda link: link.tasks.RaiseBudget(request, timeout=self._timeout))
        return answer.budget

    async def list_limits(self) -> Sequence[pb.Limit]:
        """Return the declared limits with their use, by key."""
        answer = await self._call(lambda link: link.fleet.ListLimits(pb.ListLimitsRequest(), timeout=self._timeout))
        return answer.limits
