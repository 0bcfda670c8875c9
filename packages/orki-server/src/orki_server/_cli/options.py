"""Options that many commands share, each read from the environment too, and what they open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    # Imported where they are used: a command that needs no gRPC, or no Redis, starts without it.
    from orki_control import Client
    from orki_events.connection import Connection
import sys
from collections.abc import Awaitable

from orki_contract.errors import OrkiError
from orki_server._observers.redaction import safe_text

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])

_ORCHESTRATOR: Final = "127.0.0.1:50051"
_REDIS: Final = "redis://127.0.0.1:6379/0"
_PATIENCE_S: Final = 2.0
_ANSWER_S: Final = 5.0

redis_option = click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    envvar="ORKI_REDIS_URL",
    default=_REDIS,
    show_default=True,
    show_envvar=True,
    help="Where the events are. A URL with a password belongs into the environment, where `ps` does not show it.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")


def with_orchestrator(command: F) -> F:
    """Adds `--orchestrator` and `--insecure`."""
    where = click.option(
        "--orchestrator",
        metavar="HOST:PORT",
        envvar="ORKI_ORCHESTRATOR",
        default=_ORCHESTRATOR,
        show_default=True,
        show_envvar=True,
        help="Where the orchestrator answers.",
    )
    insecure = click.option(
        "--insecure", is_flag=True, help="Let plaintext leave this host, on a network that you trust."
    )
    return where(insecure(command))


def open_client(orchestrator: str, insecure: bool, *, patience: float = _PATIENCE_S) -> Client:
    """A client for one command: it gives up soon, and people try again."""
    from orki_control import Client, ClientOptions

    return Client(orchestrator, ClientOptions(patience=patience, call_timeout=_ANSWER_S, insecure=insecure))


@asynccontextmanager
async def events_link(redis_url: str) -> AsyncIterator[Connection]:
    """A connection to the event server.

    Raises:
        InvalidSetting: The URL cannot be used.
    """
    from orki_events.connection import Connection, parse_address

    link = Connection(
        parse_address(redis_url), name="orki:command", connect_timeout=_ANSWER_S, answer_timeout=_ANSWER_S
    )
    try:
        yield link
    finally:
        await link.close()


def run(work: Coroutine[Any, Any, A]) -> A:
    """Runs a command's coroutine on an event loop of its own."""
    return asyncio.run(work)


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
