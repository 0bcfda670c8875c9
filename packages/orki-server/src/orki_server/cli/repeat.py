"""Printing again and again, for `--watch`."""

from __future__ import annotations

__all__ = ["repeated"]

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import click

from orki_contract.errors import OrkiError
from orki_server.observers.redaction import safe_text

_EVERY_S: Final = 1.0


async def repeated(show: Callable[[], Awaitable[None]], watch: bool) -> None:
    """Calls `show` once, or every second until interrupted; then an error is shown and does not end it."""
    if not watch:
        await show()
        return
    while True:
        if sys.stdout.isatty():
            click.clear()
        try:
            await show()
        except OrkiError as error:
            click.echo(f"orki: {safe_text(error.message)}", err=True)
        sys.stdout.flush()
        await asyncio.sleep(_EVERY_S)
