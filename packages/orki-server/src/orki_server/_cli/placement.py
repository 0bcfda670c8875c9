"""Options of commands that submit tasks: when and where they may run, and what they may use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import click

from orki.control.v1.attempt_pb2 import Budget
from orki.control.v1.task_pb2 import Submission
from orki_server._store.placement import MAX_PRIORITY

_MOST: Final = 1 << 53
_MICROS: Final = 1_000_000


def with_budget(prefix: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options for the amounts of a budget; the command gets `budget`, or None without any."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option(
            f"--{prefix}tokens",
            "tokens",
            type=click.IntRange(1),
            metavar="N",
            help="Maximum tokens of models, read and written.",
        )
        @click.option(
            f"--{prefix}cost",
            "cost",
            type=click.FloatRange(0, min_open=True),
            metavar="USD",
            help="Maximum cost of models, in US dollars.",
        )
        @click.option(f"--{prefix}calls", "calls", type=click.IntRange(1), metavar="N", help="Maximum calls of models.")
        @functools.wraps(command)
        def run(*arguments: Any, tokens: int | None, cost: float | None, calls: int | None, **options: Any) -> Any:
            budget = None
            if tokens or cost or calls:
                cost_micros = max(1, round(cost * _MICROS)) if cost and cost < _MOST / _MICROS else 0
                if (cost and not cost_micros) or max(tokens or 0, calls or 0) > _MOST:
                    raise click.BadParameter(f"an amount of a budget is at most {_MOST:,}.")
                budget = Budget(tokens=tokens or 0, cost_micros=cost_micros, calls=calls or 0)
            return command(*arguments, budget=budget, **options)

        return run

    return decorate


def with_placement(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options; the command gets `placement`, a submission without a method."""

    @click.option(
        "--priority",
        type=click.IntRange(0, MAX_PRIORITY),
        metavar="0-9",
        help="Tasks of a higher priority are offered first.  [default: 5]",
    )
    @click.option(
        "--label", "labels", multiple=True, metavar="NAME=VALUE", help="Only agents with this label; may be repeated."
    )
    @click.option(
        "--limit",
        "limits",
        multiple=True,
        metavar="KEY",
        help="Count for the limit of KEY (orki limit); may be repeated.",
    )
    @click.option(
        "--fairness-key", default="", metavar="KEY", help="Take turns with tasks of other keys, such as tenants."
    )
    @click.option(
        "--durability",
        default="",
        metavar="LEVEL",
        help="What the acknowledged task survives, if more than the orchestrator's setting: fsync, or replicas:N.",
    )
    @with_budget("budget-")
    @functools.wraps(command)
    def run(
        *arguments: Any,
        priority: int | None,
        labels: tuple[str, ...],
        limits: tuple[str, ...],
        fairness_key: str,
        durability: str,
        budget: Budget | None,
        **options: Any,
    ) -> Any:
        placement = Submission(
            labels=_labels(labels), limits=limits, fairness_key=fairness_key, budget=budget, durability=durability
        )
        if priority is not None:
            placement.priority = priority
        return command(*arguments, placement=placement, **options)

    return run


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or name in labels:
            raise click.BadParameter(f"{each!r}: use NAME=VALUE, such as gpu=a100, and each name once.")
        labels[name] = value
    return labels
