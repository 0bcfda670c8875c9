"""The budgets of one attempt: what its handler has used, and what is left."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Final

from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki.control.v1.session_pb2 import BudgetUpdate, SuspendedOutcome
from orki_agent._checkpoints import Suspending
from orki_contract import BudgetLeft

_AMOUNTS: Final = ("tokens", "cost_micros", "calls")


class BudgetUsedUp(Suspending):
    """Ends an attempt because a budget of its task is used up. The task goes on when the budget is raised.

    `except Exception` does not catch it. A handler that catches it to clean up must raise it again.
    """

    def __init__(self) -> None:
        super().__init__("a budget of the task is used up", 0.0)
        self.outcome = SuspendedOutcome(over_budget=True)


class BudgetMeter:
    """What an attempt has used and may use. Thread-safe.

    Args:
        budgets: The budgets when the attempt was offered; empty if its usage is not limited.
    """

    def __init__(self, budgets: Iterable[BudgetBalance] = ()) -> None:
        self._lock = threading.Lock()
        self._budgets = tuple(budgets)
        self._own = dict.fromkeys(_AMOUNTS, 0)
        self._charged = dict.fromkeys(_AMOUNTS, 0)

    def use(self, *, tokens: int, cost_micros: int) -> Budget | None:
        """Count a call of a model. Returns the usage of the attempt in all; None if it is not limited."""
        with self._lock:
            for name, amount in zip(_AMOUNTS, (tokens, cost_micros, 1), strict=True):
                self._own[name] = min(self._own[name] + amount, 1 << 53)
            return Budget(**self._own) if self._budgets else None

    def update(self, update: BudgetUpdate) -> None:
        """Take the state of the budgets, with the usage of this attempt that they include."""
        with self._lock:
            self._budgets = tuple(update.budgets)
            self._charged = {name: getattr(update.charged, name) for name in _AMOUNTS}

    @property
    def left(self) -> BudgetLeft:
        """What is left, without use of others since the last update."""
        with self._lock:
            left: dict[str, int] = {}
            for name in _AMOUNTS:
                uncharged = max(0, self._own[name] - self._charged[name])
                limited = [each for each in self._budgets if getattr(each.budget, name)]
                amounts = [getattr(each.budget, name) - getattr(each.used, name) - uncharged for each in limited]
                if amounts:
                    left[name] = max(0, min(amounts))
            return BudgetLeft(**left)

    def check(self) -> None:
        """Raise BudgetUsedUp if a budget is used up."""
        if self._budgets:
            left = self.left
            if 0 in (left.tokens, left.cost_micros, left.calls):
                raise BudgetUsedUp
