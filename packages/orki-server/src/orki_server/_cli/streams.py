"""`orki streams`: lists streams and groups, follows a stream, replays dead letters and tunes retention."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Final

import click

from orki_contract.errors import UnknownStream
from orki_contract.model import milliseconds
from orki_events import DeadLetterEntry, Events, StreamVersion, Tuned, Tuning, connect
from orki_events.losses import RecordedGap, acknowledge_losses, read_gaps
from orki_events.registry import StreamRegistry
from orki_events.tuning import effective_retention, read_tunings
from orki_server._cli.apply import apply
from orki_server._cli.formats import Columns, counted, duration, print_json, print_rows, print_table
from orki_server._cli.options import json_option, open_redis, redis_option, run_async, run_repeatedly, watch_option
from orki_server._observers.entries import MultiStreamReader
from orki_server._observers.redaction import reason_text, safe_json, time_text
from orki_server._observers.stream_stats import GroupStats, StreamStats, read_stream_stats

_UNITS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


class _Age(click.ParamType[int]):
    """Parses a duration with its unit into whole milliseconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([1-9]\d{0,15})\s*(ms|s|min|m|h|d)", str(value))
        if found is None:
            self.fail(f"{value!r} is not a duration: use a whole number and a unit, such as 90s, 30min, 12h, 3d")
        return int(found[1]) * _UNITS[found[2]]


@click.command(
    epilog="""\b
Examples:
  orki streams tune tools
  orki streams tune tools --max-entries 50000 --max-age 6h
  orki streams tune tools --reset

The contract sets the retention and the bounds within which a deployment may change it. The setting is stored in Redis
and applies to the whole fleet: publishers adopt it within seconds, without a release or a restart. Reducing retention
trims the oldest entries at once, read or not. Check LAG in `orki streams` first.
""",
)
@click.argument("name", metavar="STREAM")
@click.option(
    "--max-entries", type=click.IntRange(1), metavar="COUNT", help="Maximum number of entries in each partition."
)
@click.option("--max-age", type=_Age(), metavar="AGE", help="Maximum age of an entry: 90s, 30min, 12h, 3d.")
@click.option("--reset", is_flag=True, help="Restore the contract's retention.")
@json_option
@redis_option
@run_async
async def tune(
    name: str, max_entries: int | None, max_age: int | None, reset: bool, as_json: bool, redis_url: str
) -> None:
    """Show the retention of a stream, or set it within the bounds of its contract.

    An option that is left out keeps its current setting.
    """
    if reset and (max_entries or max_age):
        raise click.UsageError("--reset cannot be combined with --max-entries or --max-age")
    changes = {"max_entries": max_entries, "max_age": max_age and max_age / 1_000}
    wanted: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    tuned: Tuned | None = None
    async with connect(redis_url) as events:
        stream = await _registered(events, name)
        tuning = None if reset else (await events.tunings()).get(name)
        if wanted:
            tuning = replace(tuning or Tuning(), **wanted)
        if reset or wanted:
            tuned = await events.tune(name, tuning)
    shown = retention_json(stream, tuning)
    if as_json:
        print_json({"stream": name, **shown, "trimmed": tuned.trimmed if tuned else 0})
        return
    for label, values in (("contract", shown["contract"]), ("kept", shown["kept"])):
        click.echo(f"{label:<9} {_retention_line(values['max_entries'], values['max_age_ms'])}")
    click.echo(f"{'bounds':<9} {_bounds(shown['bounds'])}")
    if tuned is not None:
        click.echo(f"set; {counted(tuned.trimmed, 'entry')} trimmed; publishers follow within seconds", err=True)


def retention_json(registered: StreamVersion, tuning: Tuning | None) -> dict[str, Any]:
    """Return the contract's retention, its bounds, the deployment's setting (None without one), and what applies."""
    retention = registered.contract.retention
    now = effective_retention(retention, tuning)
    chosen = tuning and {"max_entries": tuning.max_entries, "max_age_ms": milliseconds(tuning.max_age)}
    return {
        "contract": {"max_entries": retention.max_entries, "max_age_ms": milliseconds(retention.max_age)},
        "bounds": {
            "entries": [*retention.entries_bounds],
            "age_ms": [milliseconds(each) for each in retention.age_bounds],
        },
        "set": chosen,
        "kept": {"max_entries": now.max_entries, "max_age_ms": milliseconds(now.max_age)},
    }


def retention_text(shown: dict[str, Any]) -> str:
    """Format retention for a column: `1M`, `50k/6h`; a star marks a deployment's setting."""
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


async def _registered(events: Events, name: str) -> StreamVersion:
    known = {each.contract.name: each for each in await events.registered_streams()}
    if name not in known:
        raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
    return known[name]


def _retention_line(entries: int, age_ms: int) -> str:
    return counted(entries, "entry") + (f", none older than {duration(age_ms * 1_000)}" if age_ms else "")


def _bounds(bounds: dict[str, list[int]]) -> str:
    least, most = bounds["entries"]
    shortest, longest = bounds["age_ms"]
    parts = [f"{least:,} to {most:,} entries"] if least < most else []
    if shortest < longest:
        parts.append(f"an age of {duration(shortest * 1_000)} to {duration(longest * 1_000)}")
    return ", ".join(parts) or "none declared: only the contract sets the retention"


_DEAD_COLUMNS: Final = Columns(
    ("ENTRY", "TRIES", "REASON", "MESSAGE"), right={"TRIES"}, uncut={"ENTRY", "TRIES", "REASON"}, wraps={"MESSAGE"}
)


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
    "--limit",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    metavar="COUNT",
    help="Maximum number of dead letters.",
)
@click.option("--replay", is_flag=True, help="Deliver these entries to this group again, and to no other.")
@json_option
@redis_option
@run_async
async def dead(name: str, group: str, limit: int, replay: bool, as_json: bool, redis_url: str) -> None:
    """List a group's dead letters, oldest first.

    A dead letter is an entry that failed as often as the group allows. With --replay, the entries become pending again
    and their dead letters are deleted. A dead letter whose entry has been trimmed is kept.
    """
    async with connect(redis_url) as events:
        stream = (await _registered(events, name)).contract
        letters = await events.raw_dead_letters(stream, group=group, count=limit)
        replayed = await events.replay(stream, group=group, letters=letters) if replay else []
    if as_json:
        print_json([{**_json(each), "replayed": each.letter_id in replayed} for each in letters])
        return
    rows = [tuple(str(each) for each in _json(letter).values())[1:] for letter in letters]
    print_table(_DEAD_COLUMNS, rows, empty=f"no dead letters of group {group} of stream {name}")
    if replay and letters:
        left = len(letters) - len(replayed)
        kept = f"; {counted(left, 'dead letter')} kept because the entry was trimmed" if left else ""
        click.echo(f"{len(replayed)} of {len(letters)} replayed{kept}", err=True)


def _json(letter: DeadLetterEntry[Any]) -> dict[str, Any]:
    return {
        "letter_id": letter.letter_id,
        "entry_id": letter.reason.entry_id,
        "deliveries": letter.reason.deliveries,
        "reason": reason_text(letter.reason.reason),
        "message": letter.reason.message,
    }


_LOSS_COLUMNS: Final = Columns(
    ("TIME", "KIND", "GROUP", "COUNT", "MESSAGE"), right={"COUNT"}, uncut={"TIME", "KIND"}, wraps={"MESSAGE"}
)


@click.command(
    epilog="""\b
Examples:
  orki streams losses tasks
  orki streams losses tasks --json | jq -r '.[] | [.group, .count, .after, .until] | @tsv'
  orki streams losses tasks --acknowledge
""",
)
@click.argument("name", metavar="STREAM")
@click.option("--acknowledge", is_flag=True, help="Note that you know of them: `orki doctor` is ok again.")
@json_option
@redis_option
@run_async
async def losses(name: str, acknowledge: bool, as_json: bool, redis_url: str) -> None:
    """List the losses of a stream and its groups that were declared, oldest first.

    The server keeps the newest 1,000 of each partition. An empty GROUP stands for the stream itself.
    """
    async with open_redis(redis_url) as link:
        known = {each.contract.name: each.contract for each in await StreamRegistry().streams(link)}
        if name not in known:
            raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
        found = await read_gaps(link, known[name])
        fresh = await acknowledge_losses(link, known[name]) if acknowledge else 0
    shown = [_loss_json(each) for each in found]
    rows = [tuple(_loss_text(value) for value in list(each.values())[:5]) for each in shown]
    print_rows(as_json, shown, _LOSS_COLUMNS, rows, empty=f"no losses of stream {name} were declared")
    if acknowledge:
        click.echo(f"{counted(fresh, 'lost entry')} acknowledged", err=True)


def _loss_json(recorded: RecordedGap) -> dict[str, Any]:
    gap = recorded.gap
    return {
        "time": time_text(int(recorded.gap_id.partition("-")[0]) * 1_000),
        "kind": gap.kind.value,
        "group": gap.group,
        "count": gap.count,
        "message": gap.message,
        "exact": not gap.possible,
        "key": gap.key,
        "after": gap.after,
        "until": gap.until,
    }


def _loss_text(value: Any) -> str:
    return "?" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


_COLUMNS: Final = Columns(
    ("STREAM", "PARTS", "ENTRIES", "KEEPS", "GROUP", "LAG", "PENDING", "OLDEST", "DEAD", "LOST"),
    right={"PARTS", "ENTRIES", "KEEPS", "LAG", "PENDING", "OLDEST", "DEAD", "LOST"},
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
@watch_option
@json_option
@redis_option
@click.pass_context
def streams(ctx: click.Context, watch: bool, as_json: bool, redis_url: str) -> None:
    """List the event streams and their consumer groups.

    \b
    KEEPS    retention of each partition: entries and age; * marks a setting of `orki streams tune`
    LAG      entries not delivered to the group yet
    PENDING  entries delivered and not acknowledged
    OLDEST   age of the oldest pending entry
    DEAD     dead letters of the group
    LOST     entries that the group lost; `+N?` are unaccounted ones. See `orki streams losses STREAM`
    """
    if ctx.invoked_subcommand is not None:
        # An explicit --redis or the environment takes precedence in the subcommand.
        ctx.default_map = {name: {"redis_url": redis_url} for name in streams.commands}
        return

    async def show() -> None:
        async with open_redis(redis_url) as link:
            known = await StreamRegistry().streams(link)
            found, tunings = await read_stream_stats(link, known), await read_tunings(link)
        kept = {each.contract.name: retention_json(each, tunings.get(each.contract.name)) for each in known}
        value = [{**asdict(each), "retention": kept[each.stream]} for each in found]
        rows = [row for each in found for row in _rows(each, retention_text(kept[each.stream]))]
        print_rows(as_json, value, _COLUMNS, rows, empty="no streams yet: nothing has published or consumed")

    asyncio.run(run_repeatedly(show, watch))


@streams.command(
    epilog="""\b
Examples:
  orki streams tail review_findings
  orki streams tail tasks --from-start --limit 100 --json > tasks.jsonl
""",
)
@click.argument("name", metavar="STREAM")
@click.option("--from-start", is_flag=True, help="Start with the oldest entry instead of the next one.")
@click.option("--limit", type=click.IntRange(1), metavar="COUNT", help="Stop after this many entries.")
@click.option("--json", "as_json", is_flag=True, help="Print each entry as one line of JSON.")
@redis_option
@run_async
async def tail(name: str, from_start: bool, limit: int | None, as_json: bool, redis_url: str) -> None:
    """Print the entries of a stream as they arrive, with sensitive fields redacted.

    This uses no consumer group and acknowledges nothing.
    """
    async with open_redis(redis_url) as link:
        reader = MultiStreamReader(link, names=[name], cursors={} if from_start else None)
        await reader.start()
        printed = 0
        while True:
            for _, entry in await reader.read():
                shown = entry.to_json()
                body = entry.problem or safe_json(entry.body)
                click.echo(safe_json(shown) if as_json else f"{shown['time']}  {entry.entry_id}  {body}")
                printed += 1
                if printed == limit:
                    return


streams.add_command(apply)
streams.add_command(dead)
streams.add_command(losses)
streams.add_command(tune)


def _rows(stream: StreamStats, kept: str) -> Iterator[tuple[str, ...]]:
    head = (stream.stream, str(stream.partitions), f"{stream.entries:,}", kept)
    for group in stream.groups:
        yield (
            *head,
            group.group,
            "missing" if group.missing else ("?" if group.lag is None else f"{group.lag:,}"),
            f"{group.pending:,}",
            duration(group.oldest_pending_ms * 1000) if group.pending else "-",
            f"{group.dead_letters:,}" if group.dead_letters else "-",
            _lost(group),
        )
        head = ("", "", "", "")


def _lost(group: GroupStats) -> str:
    lost = f"{group.lost:,}" if group.lost else "-"
    return f"{lost}+{group.unaccounted:,}?" if group.unaccounted else lost
