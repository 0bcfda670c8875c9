"""Formats durations, sizes, counts and sentences, and prints tables and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orki_server._observers.redaction import safe_text


def duration(microseconds: int) -> str:
    """Format a duration with about three digits: `417 µs`, `12.3 ms`, `3.02 s`, `4 min 10 s`, `2 h 5 min`."""
    if microseconds < 1_000:
        return f"{microseconds} µs"
    if microseconds < 1_000_000:
        return f"{microseconds / 1_000:.3g} ms" if microseconds < 999_500 else "1 s"
    seconds = microseconds / 1_000_000
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 59.95 else "1 min"
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole} s" if whole else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def offset(microseconds: int) -> str:
    """Format a relative time in seconds, to the millisecond: `+0.003 s`."""
    return f"{microseconds / 1_000_000:+,.3f} s"


def age(since_us: int, now_us: int) -> str:
    """Format the time since `since_us`; `-` if that is 0."""
    return duration(max(0, now_us - since_us)) if since_us > 0 else "-"


def size(count: int) -> str:
    """Format a number of bytes: `812 B`, `4.0 KiB`, `1.5 MiB`."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def counted(count: int, noun: str) -> str:
    """Format a count with its noun in the right number: `1 entry`, `2,000 entries`, `0 tasks`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def sentence(text: str) -> str:
    """Return `text` with exactly one full stop at its end."""
    return f"{text.rstrip().rstrip('.')}."


_WIDE: Final = 400
STYLES: Final = {
    **dict.fromkeys(("ok", "succeeded", "connected", "live"), "green"),
    **dict.fromkeys(("running", "offered", "applied"), "cyan"),
    **dict.fromkeys(("warn", "cancelling", "cancelled"), "yellow"),
    **dict.fromkeys(("failed", "lost"), "red"),
    "bad": "bold red",
}
"""Styles of states, in lower case."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table. Values of the column STATE are colored and never cut.

    Attributes:
        names: The headings.
        right: Columns that are aligned to the right, for numbers.
        uncut: Columns whose values are never cut or wrapped, such as ids that people copy.
        wraps: Columns that wrap long values; the others cut them.
    """

    names: tuple[str, ...]
    right: Collection[str] = ()
    uncut: Collection[str] = ()
    wraps: Collection[str] = ()


def stdout_console() -> Console:
    """Return the console for results. In a pipe or a file, lines are wide and have no colors."""
    terminal = sys.stdout.isatty()
    width = None if terminal or os.environ.get("COLUMNS", "").isdigit() else _WIDE
    return Console(width=width, highlight=False, markup=False, emoji=False)


def stderr_console() -> Console:
    """Return the console for progress and warnings."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_table(columns: Columns, rows: Iterable[Sequence[str]], *, empty: str = "") -> None:
    """Print a table, or the sentence `empty` if there are no rows."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns.names:
        wraps = name in columns.wraps
        table.add_column(
            name,
            justify="right" if name in columns.right else "left",
            overflow="fold" if wraps else "ellipsis",
            no_wrap=not wraps,
        )
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in zip(columns.names, row, strict=True)))
    for name, shown in zip(columns.names, table.columns, strict=True):
        if name in columns.uncut or name == "STATE":
            shown.min_width = max((len(str(cell)) for cell in shown.cells), default=0)
    stdout_console().print(table if table.row_count else Text(empty))


def print_json(value: Any) -> None:
    """Print indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(as_json: bool, value: Any, columns: Columns, rows: Iterable[Sequence[str]], *, empty: str = "") -> None:
    """Print `value` as JSON or, without `as_json`, the rows as a table."""
    if as_json:
        print_json(value)
    else:
        print_table(columns, rows, empty=empty)


def _cell(name: str, value: str) -> Text:
    text = safe_text(value)
    return Text(text, style=STYLES.get(text.lower(), "") if name == "STATE" else "")
