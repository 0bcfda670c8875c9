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
from orki_server._text import counted as counted
from orki_server._text import duration as duration
from orki_server._text import sentence as sentence
from orki_server._text import size as size


def offset(microseconds: int) -> str:
    """Format a relative time in seconds, to the millisecond: `+0.003 s`."""
    return f"{microseconds / 1_000_000:+,.3f} s"


def age(since_us: int, now_us: int) -> str:
    """Format the time since `since_us`; `-` if that is 0."""
    return duration(max(0, now_us - since_us)) if since_us > 0 else "-"


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
