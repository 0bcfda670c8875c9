"""Options that several commands share, the connections that they open, and the loop behind `--watch`."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

from orki_contract.errors import InvalidSetting, OrkiError
from orki_server._observers.redaction import safe_text

if TYPE_CHECKING:
    # Imported at run time only where used, so that commands without gRPC or Redis start without them.
    from orki_control import Client, Credentials
    from orki_events.connection import Connection

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")

ORCHESTRATOR: Final = "127.0.0.1:50051"
FEED_PORT: Final = 9465
METRICS_PORT: Final = 9464
_ANSWER_TIMEOUT: Final = 5.0
_WATCH_INTERVAL: Final = 1.0
_CREDENTIALS: Final = "orki.credentials"
_FILES: Final = (
    ("tls-ca", "ORKI_TLS_CA", "PEM file with the authorities of the orchestrators' certificates. Turns TLS on."),
    ("tls-certificate", "ORKI_TLS_CERTIFICATE", "PEM file with your certificate, whose URI name is spiffe://DOMAIN/…."),
    ("tls-key", "ORKI_TLS_KEY", "PEM file with the key of the certificate."),
    ("token-file", "ORKI_TOKEN_FILE", "File with your bearer token; or set ORKI_TOKEN to the token itself."),
)
"""For each file of the credentials: option, environment variable and description."""

redis_option = click.option(
    "--redis",
    "redis_url",
    metavar="URL",
    envvar="ORKI_REDIS_URL",
    default="redis://127.0.0.1:6379/0",
    show_default=True,
    show_envvar=True,
    help="Redis that holds the events. Pass a URL with a password in the environment: `ps` shows arguments.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")
ready_json_option = click.option("--json", "as_json", is_flag=True, help="Print the readiness line as JSON.")
watch_option = click.option("--watch", is_flag=True, help="Repeat every second until interrupted.")

ready_file_option = click.option(
    "--ready-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write the readiness line to FILE, as JSON.",
)


def _keep_credential(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value:
        ctx.meta.setdefault(_CREDENTIALS, {})[parameter.name] = value


def with_orchestrator(command: F) -> F:
    """Add `--orchestrator`, `--insecure`, and the credentials, which `credentials()` returns."""
    for name, variable, text in reversed(_FILES):
        command = click.option(
            f"--{name}",
            name.removeprefix("tls-").replace("-", "_"),
            metavar="FILE",
            envvar=variable,
            show_envvar=True,
            help=text,
            expose_value=False,
            callback=_keep_credential,
        )(command)
    where = click.option(
        "--orchestrator",
        metavar="HOST:PORT,…",
        envvar="ORKI_ORCHESTRATOR",
        default=ORCHESTRATOR,
        show_default=True,
        show_envvar=True,
        help="Address of the orchestrator; several separated by commas.",
    )
    insecure = click.option("--insecure", is_flag=True, help="Allow plaintext to another host, on a trusted network.")
    return where(insecure(command))


def credentials() -> Credentials:
    """Return the credentials of the current command, from its options and the environment.

    Raises:
        InvalidSetting: A file cannot be read or is malformed, or the options do not fit together.
    """
    from orki_control import Credentials

    context = click.get_current_context(silent=True)
    given = context.meta.get(_CREDENTIALS, {}) if context else {}
    return Credentials.from_environment(os.environ, **given)


def open_client(orchestrator: str, insecure: bool, *, patience: float = 2.0) -> Client:
    """Return a client that retries for only `patience` seconds, since a person can repeat the command."""
    from orki_control import Client, ClientOptions

    options = ClientOptions(
        patience=patience, call_timeout=_ANSWER_TIMEOUT, insecure=insecure, credentials=credentials()
    )
    return Client(orchestrator, options)


@asynccontextmanager
async def open_redis(redis_url: str) -> AsyncIterator[Connection]:
    """Open a connection to the event server; raises InvalidSetting if the URL is invalid."""
    from orki_events.connection import Connection, parse_address

    link = Connection(
        parse_address(redis_url), name="orki:command", connect_timeout=_ANSWER_TIMEOUT, answer_timeout=_ANSWER_TIMEOUT
    )
    try:
        yield link
    finally:
        await link.close()


def run_async(command: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Turn a coroutine function into a command that runs it on a new event loop."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(command(*args, **kwargs))

    return run


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log messages of this level or above."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


async def run_repeatedly(show: Callable[[], Awaitable[None]], watch: bool) -> None:
    """Call `show` once or, with `watch`, every second until interrupted.

    With `watch`, an `OrkiError` is only printed, unless it is an invalid setting.
    """
    if not watch:
        await show()
        return
    while True:
        if sys.stdout.isatty():
            click.clear()
        try:
            await show()
        except InvalidSetting:
            raise
        except OrkiError as error:
            click.echo(f"orki: {safe_text(error.message)}", err=True)
        sys.stdout.flush()
        await asyncio.sleep(_WATCH_INTERVAL)
