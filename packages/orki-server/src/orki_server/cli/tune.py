"""`orki streams tune`: how much of a stream this deployment keeps, within the bounds of its contract."""

from __future__ import annotations

__all__ = ["keeps", "retention_json", "tune"]

import re
from dataclasses import replace
from typing import Any, Final

import click
from click.core import ParameterSource

from orki_contract.errors import UnknownStream
from orki_contract.model import milliseconds
from orki_events import RegisteredStream, Tuned, Tuning, connect
from orki_events.tuning import effective_retention
from orki_server.cli.figures import duration
from orki_server.cli.settings import json_option, redis_option, run
from orki_server.cli.tables import print_json

_UNITS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


class _Age(click.ParamType[int]):
    """A length of time with its unit, as whole milliseconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([1-9]\d{0,15})\s*(ms|s|min|m|h|d)", str(value))
        if found is None:
            self.fail(f"{value!r} is no length of time: give a whole number and its unit, such as 90s, 30min, 12h, 3d")
        return int(found[1]) * _UNITS[found[2]]


@click.command(
    epilog="""\b
Examples:
  orki streams tune tools
  orki streams tune tools --max-entries 50000 --max-age 6h
  orki streams tune tools --reset

The contract says what is kept, and the bounds in which a deployment may keep more or less; nothing is released. The
setting is the whole fleet's: it lies in Redis, publishers follow within seconds, and no process starts anew. Keeping
less trims at once, the oldest first, whether they were read or not: look at the lag in `orki streams` before.
""",
)
@click.argument("name", metavar="STREAM")
@click.option("--max-entries", type=click.IntRange(1), metavar="COUNT", help="Most entries, in each partition.")
@click.option("--max-age", type=_Age(), metavar="AGE", help="Longest time that an entry is kept: 90s, 30min, 12h, 3d.")
@click.option("--reset", is_flag=True, help="Keep again what the contract says.")
@json_option
@redis_option
@click.pass_context
def tune(
    ctx: click.Context,
    name: str,
    max_entries: int | None,
    max_age: int | None,
    reset: bool,
    as_json: bool,
    redis_url: str,
) -> None:
    """Show how much of a stream is kept, and set it within the bounds of its contract.

    What is not named stays as it was set before.
    """
    if reset and (max_entries or max_age):
        raise click.UsageError("--reset takes every setting back: give it alone")
    if ctx.get_parameter_source("redis_url") is ParameterSource.DEFAULT and isinstance(ctx.obj, str):
        redis_url = ctx.obj
    changes = {"max_entries": max_entries, "max_age": max_age and max_age / 1_000}
    wanted = {key: value for key, value in changes.items() if value is not None}
    stream, tuning, tuned = run(_tune(redis_url, name, wanted, reset))
    shown = retention_json(stream, tuning)
    if as_json:
        print_json({"stream": name, **shown, "trimmed": tuned.trimmed if tuned else 0})
        return
    for label, values in (("contract", shown["contract"]), ("kept", shown["kept"])):
        click.echo(f"{label:<9} {_words(values['max_entries'], values['max_age_ms'])}")
    click.echo(f"{'bounds':<9} {_bounds(shown['bounds'])}")
    if tuned is not None:
        click.echo(f"set; {tuned.trimmed:,} entries went at once, publishers follow within seconds", err=True)


def retention_json(registered: RegisteredStream, tuning: Tuning | None) -> dict[str, Any]:
    """What the contract says, what it lets a deployment set, what is set (None: nothing), and what is kept."""
    retention = registered.contract.retention
    now = effective_retention(retention, tuning)
    return {
        "contract": {"max_entries": retention.max_entries, "max_age_ms": milliseconds(retention.max_age)},
        "bounds": {
            "entries": [*retention.entries_bounds],
            "age_ms": [milliseconds(each) for each in retention.age_bounds],
        },
        "set": _set(tuning),
        "kept": {"max_entries": now.max_entries, "max_age_ms": milliseconds(now.max_age)},
    }


def keeps(shown: dict[str, Any]) -> str:
    """For a column: `1M`, `50k/6h`; with a star where a deployment has set it."""
    entries, age = shown["kept"]["max_entries"], shown["kept"]["max_age_ms"]
    text = f"{entries:,}"
    for unit, factor in (("M", 1_000_000), ("k", 1_000)):
        if entries % factor == 0:
            text = f"{entries // factor}{unit}"
            break
    if age:
        text += "/" + next(
            f"{age // _UNITS[unit]}{unit}" for unit in ("d", "h", "min", "s", "ms") if not age % _UNITS[unit]
        )
    return f"{text}*" if shown["set"] else text


async def _tune(
    redis_url: str, name: str, wanted: dict[str, Any], reset: bool
) -> tuple[RegisteredStream, Tuning | None, Tuned | None]:
    async with connect(redis_url) as events:
        known = {each.contract.name: each for each in await events.registered_streams()}
        if name not in known:
            raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
        tuning = (await events.tunings()).get(name)
        if reset:
            return known[name], None, await events.tune(name, None)
        if not wanted:
            return known[name], tuning, None
        tuning = replace(tuning or Tuning(), **wanted)
        return known[name], tuning, await events.tune(name, tuning)


def _set(tuning: Tuning | None) -> dict[str, int] | None:
    if tuning is None:
        return None
    return {"max_entries": tuning.max_entries, "max_age_ms": milliseconds(tuning.max_age)}


def _words(entries: int, age_ms: int) -> str:
    return f"{entries:,} entries" + (f", none older than {duration(age_ms * 1_000)}" if age_ms else "")


def _bounds(bounds: dict[str, list[int]]) -> str:
    least, most = bounds["entries"]
    shortest, longest = bounds["age_ms"]
    words = [f"{least:,} to {most:,} entries"] if least < most else []
    if shortest < longest:
        words.append(f"an age of {duration(shortest * 1_000)} to {duration(longest * 1_000)}")
    return ", ".join(words) or "none declared: the contract alone decides"
