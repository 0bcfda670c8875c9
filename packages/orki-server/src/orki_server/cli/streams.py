"""`orki streams`: how full the streams are, where their groups stand, and what goes through them."""

from __future__ import annotations

__all__ = ["streams"]

from collections.abc import Iterator
from dataclasses import asdict

import click
from click.core import ParameterSource

from orki_events.registry import StreamRegistry
from orki_events.tuning import read_tunings
from orki_server.cli.dead_letters import dead
from orki_server.cli.figures import duration
from orki_server.cli.repeat import repeated
from orki_server.cli.settings import events_link, json_option, redis_option, run
from orki_server.cli.tables import Column, print_json, print_table
from orki_server.cli.tune import keeps, retention_json, tune
from orki_server.observers.merged_reader import MergedReader
from orki_server.observers.redaction import safe_json
from orki_server.observers.stream_figures import StreamFigures, stream_figures

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
