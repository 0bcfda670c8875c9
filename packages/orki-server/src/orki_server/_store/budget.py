"""The operations of `budget.lua`: budgets of a tree of tasks, and what is charged to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki.control.v1.task_pb2 import Submission
from orki_contract.errors import InvalidArgument
from orki_contract.model import Budget as DeclaredBudget
from orki_contract.model import TaskMethod
from orki_control.session import AttemptKey
from orki_server._store.operations import Argument, Operation, shard_of
from orki_server._store.replies import ReportReply, report_reply

_MOST: Final = 1 << 53
NO_USAGE: Final = Budget()
NO_BUDGET: Final = DeclaredBudget()
AMOUNTS: Final = (("tokens", "tokens"), ("cost_micros", "cost in millionths of a dollar"), ("calls", "calls"))
"""The fields of a budget, and what they are called."""


def check_budget(submission: Submission) -> None:
    """Raise InvalidArgument for a budget without amounts, or with one that is out of its range."""
    if submission.HasField("budget"):
        check_amounts(submission.budget)


def check_amounts(budget: Budget) -> None:
    """Raise InvalidArgument for a budget without amounts, or with one that is out of its range."""
    amounts = _amounts(budget)
    if not any(amounts):
        raise InvalidArgument("budget: give an amount of tokens, cost or calls")
    if max(amounts) > _MOST:
        raise InvalidArgument(f"budget: an amount is at most {_MOST} (2^53), not {max(amounts)}")


def _amounts(budget: Budget) -> tuple[int, int, int]:
    return (budget.tokens, budget.cost_micros, budget.calls)


def _bounded(budget: Budget) -> list[int]:
    return [min(each, _MOST) for each in _amounts(budget)]


def packed(budget: Budget | DeclaredBudget) -> str:
    """Return a budget as the store keeps it."""
    return f"{budget.tokens},{budget.cost_micros},{budget.calls}"


def _budget(text: bytes) -> Budget:
    tokens, cost_micros, calls = map(int, text.split(b","))
    return Budget(tokens=tokens, cost_micros=cost_micros, calls=calls)


def used_up(balances: Sequence[BudgetBalance]) -> str:
    """Return which amount of which budget is used up, as a clause; empty if none is."""
    for each in balances:
        for name, words in AMOUNTS:
            limit, used = getattr(each.budget, name), getattr(each.used, name)
            if limit and used >= limit:
                return f"budget {words} {used:,} of {limit:,} used by the tree of {each.task_id}"
    return ""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The place of a task in its tree.

    Attributes:
        root: The task at the top.
        accounts: The tasks whose budgets it is charged to, the topmost first.
        runs: Whether the given attempt runs.
    """

    root: str
    accounts: tuple[str, ...]
    runs: bool = True


def accounts_of(text: str) -> tuple[str, ...]:
    """Return the tasks whose budgets a task is charged to."""
    return tuple(text.split(",")) if text else ()


def lineage(attempt: AttemptKey) -> Operation[Lineage | None]:
    """Read the place of an attempt's task in its tree. The outcome is None without such a task."""
    return _lineage(attempt.task_id, str(attempt.fence), patient=True)


def lineage_of(task_id: str) -> Operation[Lineage | None]:
    """Read the place of a task in its tree. The outcome is None without such a task."""
    return _lineage(task_id, "", patient=False)


def _lineage(task_id: str, fence: str, *, patient: bool) -> Operation[Lineage | None]:
    def outcome(reply: list[bytes]) -> Lineage | None:
        if not reply:
            return None
        return Lineage(reply[1].decode(), accounts_of(reply[2].decode()), reply[0] == b"found")

    return Operation("lineage", shard_of(task_id), (task_id, fence), outcome, patient)


def own_budget(submission: Submission, method: TaskMethod) -> str:
    """Return the budget of a submission, or else of its method, as the store keeps it; empty for none."""
    if submission.HasField("budget"):
        return packed(submission.budget)
    return packed(method.budget) if method.budget != NO_BUDGET else ""


def open_budget(anchor: str, task_id: str, own: str) -> Operation[str]:
    """Open the packed budget of a new task in a tree that has one. The outcome is `opened`, `gone` or `full`."""
    arguments = (anchor, task_id, own)
    return Operation("open_budget", shard_of(anchor), arguments, lambda reply: reply[0].decode(), patient=False)


def charge(
    accounts: Sequence[str], attempt: AttemptKey, total: Budget, *, waits: bool = False
) -> Operation[list[BudgetBalance]]:
    """Charge the usage of an attempt in all to the budgets of its task.

    A report that was charged before changes nothing. The outcome are the budgets afterwards.

    Args:
        accounts: The tasks whose budgets are charged, the topmost first.
        attempt: The attempt.
        total: Its usage.
        waits: Whether the task waits for its budgets, if one of them is used up.
    """
    return _charge("charge", accounts, attempt, total, waits, patient=True)


def balance(accounts: Sequence[str], attempt: AttemptKey, *, waits: bool = False) -> Operation[list[BudgetBalance]]:
    """Read budgets as `charge` does, without a charge."""
    return _charge("balance", accounts, attempt, NO_USAGE, waits, patient=False)


def _charge(
    op: str, accounts: Sequence[str], attempt: AttemptKey, total: Budget, waits: bool, *, patient: bool
) -> Operation[list[BudgetBalance]]:
    anchor = accounts[0]
    charged: list[Argument] = [anchor, attempt.task_id, attempt.attempt, *_bounded(total), int(waits)]
    return Operation(op, shard_of(anchor), [*charged, *accounts], _balances, patient)


def _balances(reply: list[bytes]) -> list[BudgetBalance]:
    rows = zip(reply[::3], reply[1::3], reply[2::3], strict=True)
    return [
        BudgetBalance(task_id=account.decode(), budget=_budget(limit), used=_budget(used))
        for account, limit, used in rows
    ]


def raise_budget(anchor: str, task_id: str, budget: Budget) -> Operation[tuple[str, BudgetBalance]]:
    """Raise amounts of a budget; 0 keeps one. The outcome is `raised` with the budget, `unknown` or `lower`."""

    def outcome(reply: list[bytes]) -> tuple[str, BudgetBalance]:
        status, *values = reply
        return status.decode(), _balances([task_id.encode(), *values])[0] if values else BudgetBalance()

    arguments = (anchor, task_id, *_amounts(budget))
    return Operation("raise_budget", shard_of(anchor), arguments, outcome, patient=False)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A task that waited for a budget which is no longer used up.

    Attributes:
        anchor: The topmost task of its tree that has a budget.
        task_id: The task.
        attempt: The attempt that was paused.
    """

    anchor: str
    task_id: str
    attempt: int


def admitted(shard: int) -> Operation[list[Admitted]]:
    """Return the tasks that the raised budgets of one shard admit again."""

    def outcome(reply: list[bytes]) -> list[Admitted]:
        rows = zip(reply[::3], reply[1::3], reply[2::3], strict=True)
        return [Admitted(anchor.decode(), task_id.decode(), int(attempt)) for anchor, task_id, attempt in rows]

    return Operation("admitted", shard, (), outcome, patient=False)


def admit(each: Admitted) -> Operation[None]:
    """Note that a task no longer waits."""
    arguments = (each.anchor, each.task_id, each.attempt)
    return Operation("admit", shard_of(each.anchor), arguments, lambda reply: None, patient=False)


def resume_budget(each: Admitted) -> Operation[tuple[str, str]]:
    """Queue a task that waited for a budget. The outcome is `admitted`, `running` or `gone`, and its method."""

    def outcome(reply: list[bytes]) -> tuple[str, str]:
        return reply[0].decode(), reply[1].decode()

    arguments = (each.task_id, each.attempt)
    return Operation("resume_budget", shard_of(each.task_id), arguments, outcome, patient=False)


def over_budget(
    agent_id: str, attempt: AttemptKey, message: str, *, raised: bool = False, unsent: bool = False
) -> Operation[ReportReply]:
    """End an attempt because a budget is used up. Its task waits until the budget is raised.

    Args:
        agent_id: The agent.
        attempt: The attempt.
        message: Which budget is used up.
        raised: Whether the budget was raised meanwhile; the task is queued again.
        unsent: Whether the attempt was never sent to the agent.
    """
    task_id = attempt.task_id
    arguments = (task_id, attempt.fence, agent_id, message, int(raised), int(unsent))
    return Operation("over_budget", shard_of(task_id), arguments, report_reply)
