"""`orki audit`: verifies and exports the files that `orki observe audit` has written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from orki_contract.errors import InvalidSetting
from orki_server._cli.formats import counted
from orki_server._cli.options import F
from orki_server._observers.audit import files_of
from orki_server._observers.audit_chain import Problem, Verifier
from orki_server._observers.redaction import safe_json, safe_text

_FIELDS = ("number", "time", "stream", "event_id", "entry_id", "producer", "message", "event")


@click.group(
    epilog="""\b
Examples:
  orki audit verify audit.jsonl
  orki audit export audit.jsonl --stream tasks --since 2026-11-01 > tasks.jsonl
""",
)
def audit() -> None:
    """Verify and export the log of `orki observe audit`."""


def _log_options(command: F) -> F:
    first = click.option(
        "--first",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        metavar="NUMBER",
        help="Number of the first line, if earlier files were moved away.",
    )
    file = click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
    return file(first(command))


@audit.command(
    epilog="""\b
Examples:
  orki audit verify audit.jsonl
  orki audit verify audit.jsonl --last 2f6c…e1

\b
Exit codes:
  0  every line is as it was written
  1  at least one line was changed, dropped, added or moved
  2  wrong usage, or the file cannot be read
""",
)
@_log_options
@click.option("--last", metavar="HASH", default="", help="Hash that a line must have, such as an earlier last one.")
def verify(file: Path, first: int, last: str) -> None:
    """Verify the hash chain of FILE and of the files that were rotated from it.

    It prints each line that breaks the chain, and the number and the hash of the last line. Keep those elsewhere: only
    they show that no lines were dropped from the end.
    """
    verifier = Verifier(first)
    problems, seen = 0, not last
    for path, line, problem in _lines(file, verifier):
        seen = seen or f'"chain":"{last}"'.encode() in line
        if problem is not None:
            problems += 1
            click.echo(f"{path}:{problem.place}: the line {problem.text}")
    if not seen:
        problems += 1
        click.echo(f"{file}: no line has the hash {safe_text(last)}, so lines were dropped from the end or replaced")
    click.echo(f"{counted(verifier.lines, 'line')}, {counted(problems, 'problem')}")
    click.echo(f"last: {verifier.last.number} {verifier.last.digest}")
    if problems:
        click.get_current_context().exit(1)


@audit.command(
    epilog="""\b
Examples:
  orki audit export audit.jsonl --stream audit --since 2026-11-01 --until 2026-12-01
  orki audit export audit.jsonl --format csv > audit.csv
""",
)
@_log_options
@click.option("--stream", "streams", multiple=True, metavar="NAME", help="Only this stream; repeatable.")
@click.option("--since", default="", metavar="TIME", help="Only events from this time on, such as 2026-11-01T12:00Z.")
@click.option("--until", default="", metavar="TIME", help="Only events before this time.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "csv"]),
    default="jsonl",
    show_default=True,
    help="Form of the output.",
)
def export(file: Path, first: int, streams: tuple[str, ...], since: str, until: str, form: str) -> None:
    """Print the events of FILE and of the files that were rotated from it, oldest first, and verify them meanwhile.

    A line that breaks the chain is not exported. Gaps are exported with every selection of streams. The exit code is 1
    if the chain is broken.
    """
    verifier, problems = Verifier(first), 0
    writer = csv.writer(sys.stdout, lineterminator="\n") if form == "csv" else None
    if writer is not None:
        writer.writerow(_FIELDS)
    for path, line, problem in _lines(file, verifier):
        if problem is not None:
            problems += 1
            click.echo(f"orki: {path}:{problem.place}: the line {problem.text}", err=True)
            continue
        entry = json.loads(line)
        time = entry.get("time", "")
        if (streams and "gap" not in entry and entry.get("stream") not in streams) or not _within(time, since, until):
            continue
        if writer is None:
            click.echo(line.decode())
        else:
            writer.writerow(_cell(entry, name) for name in _FIELDS)
    if problems:
        click.get_current_context().exit(1)


def _within(time: str, since: str, until: str) -> bool:
    # Times are in RFC 3339 and UTC, so their texts are in their order.
    return since.removesuffix("Z") <= time and (not until or time < until.removesuffix("Z"))


def _cell(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name, "")
    if name == "event":
        value = entry.get("gap") or value
    text = value if isinstance(value, str) else safe_json(value)
    # A spreadsheet would run a cell that begins like a formula.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _lines(file: Path, verifier: Verifier) -> Iterator[tuple[Path, bytes, Problem | None]]:
    for path in files_of(file):
        try:
            with path.open("rb") as lines:
                yield from ((path, line, problem) for line, problem in verifier.check(lines))
        except OSError as error:
            raise InvalidSetting(f"{path} cannot be read: {error.strerror}") from error
