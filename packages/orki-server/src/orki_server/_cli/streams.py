"""`orki streams`: how full the streams are, where their groups stand, and what goes through them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Final

import click
from click.core import ParameterSource

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import UnknownStream
from orki_contract.model import Stream, milliseconds
from orki_events import DeadLetterEntry, RegisteredStream, Tuned, Tuning, connect
from orki_events.registry import StreamRegistry
from orki_events.tuning import effective_retention, read_tunings
from orki_server._cli.formats import Column, duration, print_json, print_table
from orki_server._cli.options import events_link, json_option, redis_option, repeated, run
from orki_server._observers.entries import MergedReader
from orki_server._observers.redaction import safe_json
from orki_server._observers.stream_stats import StreamFigures, stream_figures

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


_DEAD_COLUMNS: Final = (
    Column(name="ENTRY", whole=True),
    Column(name="TRIED", right=True, whole=True),
    Column(name="REASON", whole=True),
    Column(name="SAID", wraps=True),
)
_PAGE: Final = 100


@click.command(
    epilog="""\b
Examples:
  orki streams dead review_findings report
  orki streams dead review_findings report --json | jq -r '.[].message'
  orki streams dead review_findings report --replay
""",
)
@click.argument("name", metavar="STREAM")
@click.argument("group", metavar="GROUP")
@click.option(
    "--limit", type=click.IntRange(1), default=_PAGE, show_default=True, metavar="COUNT", help="Most letters."
)
@click.option("--replay", is_flag=True, help="Have the group, and no other, take these entries once more.")
@json_option
@redis_option
@click.pass_context
def dead(ctx: click.Context, name: str, group: str, limit: int, replay: bool, as_json: bool, redis_url: str) -> None:
    """Show a group's dead letters, oldest first: entries that its consumers failed on as often as the group allows.

    With --replay they are pending again, and their letters go; those whose entry was trimmed meanwhile stay.
    """
    if ctx.get_parameter_source("redis_url") is ParameterSource.DEFAULT and isinstance(ctx.obj, str):
        redis_url = ctx.obj
    letters, replayed = run(_dead(redis_url, name, group, limit, replay))
    if as_json:
        print_json([{**_json(each), "replayed": each.letter_id in replayed} for each in letters])
        return
    rows = [tuple(str(each) for each in _json(letter).values())[1:] for letter in letters]
    print_table(_DEAD_COLUMNS, rows, empty=f"no dead letters of group {group} of stream {name}")
    if replay and letters:
        left = len(letters) - len(replayed)
        stayed = f"; {left} stay, as their entries were trimmed" if left else ""
        click.echo(f"{len(replayed)} of {len(letters)} replayed{stayed}", err=True)


async def _dead(
    redis_url: str, name: str, group: str, limit: int, replay: bool
) -> tuple[list[DeadLetterEntry[bytes]], list[str]]:
    async with connect(redis_url) as events:
        known = {each.contract.name: each.contract for each in await events.registered_streams()}
        if name not in known:
            raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
        stream: Stream = known[name]
        found = await events.raw_dead_letters(stream, group=group, count=limit)
        return found, await events.replay(stream, group=group, letters=found) if replay else []


def _json(letter: DeadLetterEntry[Any]) -> dict[str, Any]:
    try:
        reason = Reason.Name(letter.reason.reason).removeprefix("REASON_")
    except ValueError:
        reason = str(letter.reason.reason)
    return {
        "letter_id": letter.letter_id,
        "entry_id": letter.reason.entry_id,
        "deliveries": letter.reason.deliveries,
        "reason": reason,
        "message": letter.reason.message,
    }


_COLUMNS = (
    Column(name="STREAM"),
    Column(name="PARTS", right=True),
    Column(name="ENTRIES", right=True),
    Column(name="KEEPS", right=True),
    Column(name="GROUP"),
    Column(name="LAG", right=True),
    Column(name="PENDING", right=True),
    Column(name="OLDEST", right=True),
    Column(name="DEAD", right=True),
)


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  orki streams --watch
  orki streams --json | jq '.[] | .groups[] | select(.lag > 1000)'
  orki streams tail tasks --limit 5
  orki streams dead review_findings report
  orki streams tune review_findings --max-age 12h
""",
)
@click.option("--watch", is_flag=True, help="Print again every second until interrupted.")
@json_option
@redis_option
@click.pass_context
def streams(ctx: click.Context, watch: bool, as_json: bool, redis_url: str) -> None:
    """Show the event streams: entries, and for each group lag, pending, age of the oldest pending, dead letters.

    KEEPS says how many entries are kept in each partition, and for how long; a star marks what `tune` has set.
    """
    if ctx.invoked_subcommand is not None:
        ctx.obj = redis_url
        return

    async def show() -> None:
        async with events_link(redis_url) as link:
            known = await StreamRegistry().streams(link)
            found, tunings = await stream_figures(link, known), await read_tunings(link)
        kept = {each.contract.name: retention_json(each, tunings.get(each.contract.name)) for each in known}
        if as_json:
            print_json([{**asdict(each), "retention": kept[each.stream]} for each in found])
        else:
            rows = [row for each in found for row in _rows(each, keeps(kept[each.stream]))]
            print_table(_COLUMNS, rows, empty="no streams yet: nobody has published or consumed")

    run(repeated(show, watch))


@streams.command(
    epilog="""\b
Examples:
  orki streams tail review_findings
  orki streams tail tasks --from-start --limit 100 --json > tasks.jsonl
""",
)
@click.argument("name", metavar="STREAM")
@click.option("--from-start", is_flag=True, help="Begin with the oldest entry, not with the next one.")
@click.option("--limit", type=click.IntRange(1), metavar="COUNT", help="End after so many entries.")
@click.option("--json", "as_json", is_flag=True, help="Print each entry as one line of JSON.")
@redis_option
@click.pass_context
def tail(ctx: click.Context, name: str, from_start: bool, limit: int | None, as_json: bool, redis_url: str) -> None:
    """Print the entries of a stream as they come, sensitive fields redacted. No group, nothing is acknowledged."""

    if ctx.get_parameter_source("redis_url") is ParameterSource.DEFAULT:
        redis_url = ctx.obj

    async def follow() -> None:
        left = limit
        async with events_link(redis_url) as link:
            reader = MergedReader(link, names=[name], cursors={} if from_start else None)
            await reader.start()
            while left is None or left > 0:
                for _, view in await reader.read():
                    if as_json:
                        click.echo(safe_json(view.to_json()))
                    else:
                        shown = view.to_json()
                        body = view.problem or safe_json(view.body)
                        click.echo(f"{shown['time']}  {view.entry_id}  {body}")
                    if left is not None:
                        left -= 1
                        if left == 0:
                            return

    run(follow())


streams.add_command(dead)
streams.add_command(tune)


def _rows(stream: StreamFigures, kept: str) -> Iterator[tuple[str, ...]]:
    head = (stream.stream, str(stream.partitions), f"{stream.entries:,}", kept)
    for group in stream.groups:
        yield (
            *head,
            group.group,
            "missing" if group.missing else ("?" if group.lag is None else f"{group.lag:,}"),
            f"{group.pending:,}",
            duration(group.oldest_pending_ms * 1000) if group.pending else "-",
            f"{group.dead_letters:,}" if group.dead_letters else "-",
        )
        head = ("", "", "", "")
