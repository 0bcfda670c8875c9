"""`orki serve`: one orchestrator, for production."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from orki_contract.errors import EventsUnavailable, InvalidSetting, StoreUnavailable
from orki_server._cli.root import Refused
from orki_server._orchestrator import Orchestrator
from orki_server._process import print_ready, run_until_stopped
from orki_server._settings import OrchestratorOptions, default_settings, load_options


class InvalidUsage(Refused):
    """A setting is invalid."""

    exit_code = 2


F = TypeVar("F", bound=Callable[..., Any])

_FLAGS = (
    (
        "listen",
        "--listen",
        "HOST:PORT",
        str,
        "Where agents and submitters dial in; loopback only, port 0 for a free one.",
    ),
    (
        "redis_url",
        "--redis",
        "URL",
        str,
        "Redis or Valkey that holds the store. With a password: ORKI_REDIS_URL or file.",
    ),
    ("events_url", "--events", "URL", str, "Redis that holds the event plane; the same one when left out."),
    ("orchestrator_id", "--orchestrator-id", "NAME", str, "Name of this process and its run."),
    ("shards", "--shards", "N", int, "Parts of the store; fixed at its first start."),
    ("heartbeat_interval_ms", "--heartbeat-interval-ms", "MS", int, "Time between heartbeats."),
    ("hello_timeout_ms", "--hello-timeout-ms", "MS", int, "Longest wait for an agent's hello."),
    ("accept_timeout_ms", "--accept-timeout-ms", "MS", int, "Time within which an agent answers an offer."),
    ("max_message_bytes", "--max-message-bytes", "N", int, "Longest gRPC message."),
    ("retention_ms", "--retention-ms", "MS", int, "How long finished tasks are kept."),
    ("progress_kept", "--progress-kept", "N", int, "Entries of progress that are kept of a task, about."),
    ("drain_grace_ms", "--drain-grace-ms", "MS", int, "Time for what runs to end before we stop."),
    ("sweep_interval_ms", "--sweep-interval-ms", "MS", int, "Longest time between two looks at the timers."),
    ("max_sessions", "--max-sessions", "N", int, "Most agents at once."),
)


def orchestrator_options(command: F) -> F:
    """Adds a flag for each of the orchestrator's settings, and `--config`."""
    defaults = default_settings()
    for name, flag, metavar, kind, words in reversed(_FLAGS):
        default = defaults[name]
        shown = "" if name in ("events_url", "orchestrator_id") else f"  [default: {default}]"
        text = f"{words}{shown}  [env: ORKI_{name.upper()}]"
        command = click.option(flag, name, metavar=metavar, type=kind, default=None, help=text)(command)
    config = click.option(
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="ORKI_CONFIG",
        help="TOML file with the same settings under [orchestrator].  [env: ORKI_CONFIG]",
    )
    return config(command)


@click.command()
@orchestrator_options
@click.option("--json", "as_json", is_flag=True, help="Print the readiness line as JSON.")
@click.option("--ready-file", metavar="FILE", type=click.Path(path_type=Path), help="Write it there as JSON, too.")
@click.option("--verbose", is_flag=True, help="Log agents that come and go.")
def serve(config: Path | None, as_json: bool, ready_file: Path | None, verbose: bool, **flags: Any) -> None:
    """Run an orchestrator until it is interrupted.

    A flag wins over the environment, the environment over the file. Ctrl-C or SIGTERM stops it in good order: agents
    are told, what runs has a moment to end, and goes on under the next orchestrator otherwise.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        options = load_options(flags, os.environ, config)
    except InvalidSetting as error:
        raise InvalidUsage(error.message) from error
    run_until_stopped(lambda stopped: _serve(options, stopped, as_json, ready_file))


async def _serve(options: OrchestratorOptions, stopped: asyncio.Event, as_json: bool, ready_file: Path | None) -> None:
    orchestrator = Orchestrator(options)
    try:
        await orchestrator.start()
    except (StoreUnavailable, EventsUnavailable) as error:
        raise type(error)(f"the orchestrator did not start: {error.message}") from error
    try:
        facts = {
            "address": orchestrator.address,
            "redis_url": options.store_address.url,
            "orchestrator_id": options.orchestrator_id,
            "pid": os.getpid(),
        }
        print_ready("serve", f"{facts['address']} (store: {facts['redis_url']})", facts, as_json, ready_file)
        await orchestrator.serve(stopped)
    finally:
        await orchestrator.stop()
