"""`orki budget`: shows and raises budgets of trees of tasks."""

from __future__ import annotations

from typing import Any, Final

import click

from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki_contract import Budget as Amounts
from orki_server._cli.formats import Columns, print_rows
from orki_server._cli.options import json_option, open_client, run_async, with_orchestrator
from orki_server._cli.placement import with_budget

_COLUMNS: Final = Columns(
    ("TASK", "TOKENS", "COST", "CALLS"), right={"TOKENS", "COST", "CALLS"}, uncut={"TASK", "TOKENS", "COST", "CALLS"}
)


def balance_json(balance: BudgetBalance) -> dict[str, Any]:
    """Return a budget as JSON with stable keys; an amount without a limit is null."""
    budget, used = balance.budget, balance.used
    return {
        "task_id": balance.task_id,
        "tokens": budget.tokens or None,
        "used_tokens": used.tokens,
        "cost_micros": budget.cost_micros or None,
        "used_cost_micros": used.cost_micros,
        "calls": budget.calls or None,
        "used_calls": used.calls,
    }


@click.group(
    epilog="""\b
Examples:
  orki submit ReviewService.ReviewFile '{"path": "a.py"}' --no-wait --budget-tokens 100000
  orki budget show TASK
  orki budget raise TASK --tokens 200000
"""
)
def budget() -> None:
    """Show and raise the budgets of tasks.

    A budget counts the usage of a task and all tasks below it. When it is used up, they are paused until it is raised.
    """


@budget.command(
    "show",
    short_help="Show the budgets that a task is charged to.",
    epilog="\b\nExample:\n  orki budget show t0-05fcb2vg0f9vhy6pd6m3ek9v7q --json\n",
)
@click.argument("task_id", metavar="TASK")
@json_option
@with_orchestrator
@run_async
async def show(task_id: str, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Show the budgets that TASK is charged to with their use, that of the topmost task first."""
    async with open_client(orchestrator, insecure) as client:
        found = await client.budgets(task_id)
    _print(as_json, found)


@budget.command(
    "raise",
    short_help="Raise the budget of a task; the tasks that it paused go on.",
    epilog="\b\nExample:\n  orki budget raise t0-05fcb2vg0f9vhy6pd6m3ek9v7q --tokens 200000\n",
)
@click.argument("task_id", metavar="TASK")
@with_budget()
@json_option
@with_orchestrator
@run_async
async def raise_(task_id: str, budget: Budget | None, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Raise the budget of TASK to new amounts. The tasks that it paused go on."""
    if budget is None:
        raise click.UsageError("give --tokens, --cost or --calls.")
    amounts = Amounts(tokens=budget.tokens, cost_micros=budget.cost_micros, calls=budget.calls)
    async with open_client(orchestrator, insecure) as client:
        raised = await client.raise_budget(task_id, amounts)
    _print(as_json, [raised])


def _print(as_json: bool, balances: Any) -> None:
    rows = [_row(each) for each in balances]
    print_rows(as_json, [balance_json(each) for each in balances], _COLUMNS, rows, empty="no budget limits the task")


def _row(balance: BudgetBalance) -> tuple[str, ...]:
    budget, used = balance.budget, balance.used
    cost = f"${used.cost_micros / 1e6:,.2f}" + (f" of ${budget.cost_micros / 1e6:,.2f}" if budget.cost_micros else "")
    return (balance.task_id, _amount(used.tokens, budget.tokens), cost, _amount(used.calls, budget.calls))


def _amount(used: int, limit: int) -> str:
    return f"{used:,} of {limit:,}" if limit else f"{used:,}"
