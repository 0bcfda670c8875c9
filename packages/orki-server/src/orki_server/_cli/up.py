"""`orki up`: runs everything on this machine, for development."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from orki_contract.errors import InvalidSetting
from orki_control.transport import is_loopback
from orki_server._cli.options import FEED_PORT, METRICS_PORT, ORCHESTRATOR, ready_file_option, ready_json_option
from orki_server._process import Part, PartEnded, Supervisor, print_ready, run_until_stopped
from orki_server.embedded import EmbeddedOptions, EmbeddedServer

_POLL_INTERVAL: Final = 0.5


@click.command(
    epilog="""\b
Examples:
  orki up
  orki up --directory .orki       # keep tasks and events across restarts
  orki up --redis redis://127.0.0.1:6379/0
""",
)
@click.option(
    "--listen", metavar="HOST:PORT", default=ORCHESTRATOR, show_default=True, help="Address for agents and submitters."
)
@click.option("--redis", "redis_url", metavar="URL", default="", help="Use this Redis instead of starting one.")
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the store and the audit file in DIR; by default, both are deleted at the end.",
)
@click.option("--observers/--no-observers", default=True, help="Also run the observers: metrics, audit and feed.")
@ready_json_option
@ready_file_option
def up(
    listen: str, redis_url: str, directory: Path | None, observers: bool, as_json: bool, ready_file: Path | None
) -> None:
    """Run a Valkey server, an orchestrator and the observers until interrupted.

    Use this command for development. For production, see `orki serve`.
    """
    if "@" in redis_url:
        raise InvalidSetting("--redis: other users can read a password on the command line; set ORKI_REDIS_URL instead")
    _check_listen(listen)
    url = public = redis_url or os.environ.get("ORKI_REDIS_URL", "")
    if url:
        from orki_events.connection import parse_address  # slow to import, and `--help` does not need it

        public = parse_address(url, role="store").url
    with ExitStack() as stack:
        home = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orki-")))
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSetting(
                f"--directory {home} cannot be created: {error.strerror}; choose a writable directory"
            ) from error
        server = None
        if not url:
            options = EmbeddedOptions(directory=home / "valkey", append_only=directory is not None, usual_port=6379)
            server = stack.enter_context(EmbeddedServer(options))
            url = public = server.url
        # The orchestrator stops first, so that the observers see its last events.
        parts = [_part("serve", url, "serve", "--listen", listen, "--json", essential=True)]
        if observers:
            parts += _observers(url, home)
        run_until_stopped(lambda stopped: _run(parts, public, stopped, server, as_json, ready_file))


def _check_listen(listen: str) -> None:
    """Refuse an address that other hosts reach, unless the environment sets TLS and identity."""
    if is_loopback(listen.rpartition(":")[0].strip("[]")):
        return
    from orki_server._settings import load_options  # slow to import, and few start beyond loopback

    load_options({"listen": listen}, os.environ)


async def _run(
    parts: list[Part], url: str, stopped: asyncio.Event, server: EmbeddedServer | None, as_json: bool, file: Path | None
) -> None:
    supervisor = Supervisor()
    try:
        children = await asyncio.gather(*(supervisor.add(part) for part in parts))
        facts: dict[str, Any] = {"address": json.loads(children[0].ready)["address"], "redis_url": url}
        # An observer's line reads `orki NAME ready: WHERE`.
        facts |= {child.part.name: child.ready.partition(": ")[2] for child in children[1:]}
        facts["pids"] = {child.part.name: child.pid for child in children}
        print_ready("up", _summary(facts), facts, as_json, file)
        waiting = asyncio.create_task(stopped.wait())
        watching = asyncio.create_task(_until_ended(server))
        await asyncio.wait((waiting, watching, supervisor.failed), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if watching.done():
            watching.result()
        watching.cancel()
        if supervisor.failed.done():
            supervisor.failed.result()
    finally:
        await supervisor.stop()


async def _until_ended(embedded: EmbeddedServer | None) -> None:
    """Wait until the embedded server ends, then raise PartEnded."""
    # The child belongs to another thread, so there is no event to wait for.
    while embedded is None or (code := embedded.exit_code()) is None:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_INTERVAL)
    raise PartEnded(f"the embedded Valkey ended with exit code {code}; all parts are stopped")


def _summary(facts: dict[str, Any]) -> str:
    rows = [("orchestrator", facts["address"]), ("redis", facts["redis_url"])]
    rows += [(name, facts[name]) for name in ("metrics", "feed", "audit") if name in facts]
    hint = f"export ORKI_ORCHESTRATOR={facts['address']} ORKI_REDIS_URL={facts['redis_url']}"
    return "\n".join(["", *(f"  {name:<13} {where}" for name, where in rows), f"  elsewhere     {hint}"])


def _part(name: str, url: str, *arguments: str, essential: bool = False) -> Part:
    argv = (sys.executable, "-m", "orki_server", *arguments)
    return Part(name=name, argv=argv, environment={"ORKI_REDIS_URL": url}, essential=essential)


def _observers(url: str, home: Path) -> Iterator[Part]:
    yield _part("metrics", url, "observe", "metrics", "--port", _port(METRICS_PORT))
    yield _part("feed", url, "observe", "feed", "--port", _port(FEED_PORT))
    yield _part("audit", url, "observe", "audit", str(home / "audit.jsonl"))


def _port(wanted: int) -> str:
    """Return the port `wanted` as a command-line argument if it is free, else 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return "0"
        return str(wanted)
