"""`orki limit`: declares limits by key and lists them."""

from __future__ import annotations

from typing import Any, Final

import click

from orki.control.v1.task_pb2 import Limit
from orki_server._cli.formats import Columns, print_rows
from orki_server._cli.options import json_option, open_client, run_async, with_orchestrator

_COLUMNS: Final = Columns(
    ("KEY", "CONCURRENCY", "IN USE", "RATE", "BURST"),
    right={"CONCURRENCY", "IN USE", "RATE", "BURST"},
    uncut={"KEY"},
)
_UNITS: Final = {"s": 1, "min": 60, "h": 3600}


class _Rate(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic in newer stubs only
    """`N/s`, `N/min` or `N/h`, as the number of seconds between two offers."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number, _, unit = str(value).partition("/")
        try:
            rate = float(number) / _UNITS[unit or "s"]
        except (ValueError, KeyError):
            rate = 0.0
        if not 1 / 86_400 <= rate <= 100_000:
            self.fail(f"{value!r} is no rate such as 10/s, 30/min or 5/h, from 1 in 24 h to 100000/s.", param, ctx)
        return 1 / rate


def limit_json(limit: Limit) -> dict[str, Any]:
    """Return a limit as JSON with stable keys."""
    return {
        "key": limit.key,
        "concurrency": limit.concurrency or None,
        "used": limit.used,
        "interval_us": limit.interval_us or None,
        "burst": limit.burst or None,
    }


@click.group(
    epilog="""\b
Examples:
  orki limit set model:small --concurrency 4 --rate 10/s
  orki submit ReviewService.ReviewFile '{"path": "a.py"}' --limit model:small
  orki limit list
""",
)
def limit() -> None:
    """Declare limits on the attempts of all tasks that name a key.

    Several orchestrators share a limit. Tasks over a limit stay queued and hold up no others.
    """


@limit.command(
    "set",
    short_help="Declare or change the limit of a key.",
    epilog="\b\nExample:\n  orki limit set tenant:acme --concurrency 4 --rate 10/s --burst 20\n",
)
@click.argument("limit_key", metavar="KEY")
@click.option("--concurrency", type=click.IntRange(1, 1_000_000), metavar="N", help="Attempts at a time.")
@click.option("--rate", type=_Rate(), metavar="N/UNIT", help="Offers in a unit of time: 10/s, 30/min or 5/h.")
@click.option(
    "--burst",
    type=click.IntRange(1, 1_000_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Offers at once after a pause.",
)
@with_orchestrator
@run_async
async def set_(
    limit_key: str, concurrency: int | None, rate: float | None, burst: int, orchestrator: str, insecure: bool
) -> None:
    """Declare the limit of KEY, and replace an earlier one. Running attempts go on."""
    if concurrency is None and rate is None:
        raise click.UsageError("give --concurrency, --rate, or both.")
    if burst > 1 and rate is None:
        raise click.UsageError("--burst needs --rate.")
    async with open_client(orchestrator, insecure) as client:
        await client.set_limit(limit_key, concurrency=concurrency or 0, interval=rate or 0.0, burst=burst)
    click.echo(f"{limit_key} is limited")


@limit.command(
    "remove", short_help="Remove the limit of a key.", epilog="\b\nExample:\n  orki limit remove tenant:acme\n"
)
@click.argument("limit_key", metavar="KEY")
@with_orchestrator
@run_async
async def remove(limit_key: str, orchestrator: str, insecure: bool) -> None:
    """Remove the limit of KEY. Tasks that name the key are no longer held up."""
    async with open_client(orchestrator, insecure) as client:
        await client.set_limit(limit_key)
    click.echo(f"{limit_key} is not limited")


@limit.command("list", short_help="List the declared limits.", epilog="\b\nExample:\n  orki limit list --json\n")
@json_option
@with_orchestrator
@run_async
async def list_(as_json: bool, orchestrator: str, insecure: bool) -> None:
    """List the declared limits and the number of attempts that count for each now."""
    async with open_client(orchestrator, insecure) as client:
        found = await client.list_limits()
    print_rows(
        as_json, [limit_json(each) for each in found], _COLUMNS, map(_row, found), empty="no limits are declared"
    )


def _row(limit: Limit) -> tuple[str, ...]:
    rate = f"{1_000_000 / limit.interval_us:g}/s" if limit.interval_us else "-"
    return (limit.key, str(limit.concurrency or "-"), str(limit.used), rate, str(limit.burst or "-"))
