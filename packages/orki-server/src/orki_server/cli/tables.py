"""How commands print: tables that fit the terminal, JSON for scripts, colours for terminals alone."""

from __future__ import annotations

__all__ = ["Column", "print_json", "print_table", "printed", "stderr_console", "stdout_console"]

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orki_server.observers.redaction import safe_text

_WIDE: Final = 400
_STYLES: Final = {
    "ok": "green",
    "succeeded": "green",
    "connected": "green",
    "running": "cyan",
    "offered": "cyan",
    "live": "green",
    "applied": "cyan",
    "warn": "yellow",
    "cancelling": "yellow",
    "cancelled": "yellow",
    "bad": "bold red",
    "failed": "red",
    "lost": "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading.
        right: Whether it holds numbers.
        whole: Whether its values are never cut or wrapped, such as ids that people copy.
        judged: Whether its values are states that have a colour.
        wraps: Whether long values take more lines; otherwise they are cut.
    """

    name: str
    right: bool = False
    whole: bool = False
    judged: bool = False
    wraps: bool = False


def stdout_console() -> Console:
    """The console for results. Into a pipe or a file lines are as long as they need to be, and have no colours."""
    terminal = sys.stdout.isatty()
    width = None if terminal or os.environ.get("COLUMNS", "").isdigit() else _WIDE
    return Console(width=width, highlight=False, markup=False, emoji=False)


def stderr_console() -> Console:
    """The console for what is told meanwhile."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Prints a table, or the sentence `empty` where there is no row."""
    stdout_console().print(printed(columns, rows, empty=empty))


def printed(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, empty: str) -> Table | Text:
    """The table, for a console."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        overflow: Literal["fold", "ellipsis"] = "fold" if column.wraps else "ellipsis"
        table.add_column(column.name, justify=justify, overflow=overflow, no_wrap=not column.wraps)
    count = 0
    for row in rows:
        table.add_row(*(_cell(column, value) for column, value in zip(columns, row, strict=True)))
        count += 1
    for column, shown in zip(columns, table.columns, strict=True):
        if column.whole:
            shown.min_width = max((len(str(cell)) for cell in shown.cells), default=0)
    return table if count else Text(empty)


def print_json(value: Any) -> None:
    """Prints JSON, indented."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _cell(column: Column, value: str) -> Text:
    text = safe_text(value)
    return Text(text, style=_STYLES.get(text.lower(), "") if column.judged else "")
