"""`orki serve`: runs an orchestrator."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any, Final

import click

from orki_contract.errors import EventsUnavailable, StoreUnavailable
from orki_server._cli.options import F, log_to_stderr, ready_file_option, ready_json_option
from orki_server._process import print_ready, run_until_stopped
from orki_server._settings import OrchestratorOptions, default_settings, load_options

_SETTINGS: Final = (
    ("listen", "HOST:PORT", "Address for agents and submitters; port 0 chooses a free one."),
    ("redis_url", "URL", "Redis or Valkey for the store; put a password in ORKI_REDIS_URL or the file."),
    ("events_url", "URL", "Redis for the event plane; by default, the store's."),
    ("durability", "LEVEL", "What acknowledged work survives: memory, fsync, or replicas:N."),
    ("orchestrator_id", "NAME", "Name of this process; by default, a new one at each start."),
    ("shards", "N", "Number of shards of the store; fixed when the store is created."),
    ("heartbeat_interval_ms", "MS", "Time between heartbeats; after three missed ones an agent is lost."),
    ("hello_timeout_ms", "MS", "Maximum wait for the hello of an agent that connects."),
    ("accept_timeout_ms", "MS", "Maximum time for an agent to answer an offer."),
    ("max_message_bytes", "N", "Maximum size of a gRPC message."),
    ("retention_ms", "MS", "How long finished tasks are kept."),
    ("progress_kept", "N", "Approximate number of progress entries kept for each task."),
    ("drain_grace_ms", "MS", "Time for running attempts to end before the process stops."),
    ("sweep_interval_ms", "MS", "Maximum time between two checks of the task timers."),
    ("max_sessions", "N", "Maximum number of connected agents."),
    ("server_certificate", "FILE", "PEM file with the server's certificate chain. Turns TLS on."),
    ("server_key", "FILE", "PEM file with the key of the certificate."),
    ("client_ca", "FILE", "PEM file with the authorities of clients' certificates, which clients then need."),
    ("tokens_file", "FILE", "File with hashes of bearer tokens, which clients then need; see `orki token`."),
    ("policy_file", "FILE", "TOML file with what each caller may do."),
    ("handshake_timeout_ms", "MS", "Maximum time for a new connection to make a call."),
    ("max_handshakes", "N", "Maximum number of connections without a call; 0 is half of all."),
    ("max_connections", "N", "Maximum number of connections."),
    ("max_connections_per_address", "N", "Maximum number of connections of one address; 0 is three quarters of all."),
)
"""For each setting: name, unit or form of its value, and description."""


def orchestrator_options(command: F) -> F:
    """Add `--config` and a flag for each of the orchestrator's settings."""
    defaults = default_settings()
    for name, metavar, description in reversed(_SETTINGS):
        flag = f"--{name.removesuffix('_url').replace('_', '-')}"
        kind = int if metavar in ("N", "MS") else str
        shown = (
            "" if name in ("events_url", "orchestrator_id") or metavar == "FILE" else f"  [default: {defaults[name]}]"
        )
        text = f"{description}{shown}  [env: ORKI_{name.upper()}]"
        command = click.option(flag, name, metavar=metavar, type=kind, default=None, help=text)(command)
    config = click.option(
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="ORKI_CONFIG",
        help="TOML file with the same settings in the table [orchestrator].  [env: ORKI_CONFIG]",
    )
    return config(command)


@click.command(
    epilog="""\b
Examples:
  orki serve --listen 127.0.0.1:50051 --redis redis://127.0.0.1:6379/0
  orki serve --config orki.toml --verbose

\b
Exit codes:
  0  stopped by a signal
  1  the orchestrator could not start
  2  a setting is invalid
""",
)
@orchestrator_options
@ready_json_option
@ready_file_option
@click.option("--verbose", is_flag=True, help="Log agents that connect and disconnect.")
def serve(config: Path | None, as_json: bool, ready_file: Path | None, verbose: bool, **flags: Any) -> None:
    """Run an orchestrator until it is interrupted.

    A flag takes precedence over the environment, and the environment over the file. Ctrl-C or SIGTERM stops the
    orchestrator cleanly: it notifies the agents and waits for running attempts until the drain grace ends. Attempts
    that still run then continue under the next orchestrator.
    """
    log_to_stderr(logging.INFO if verbose else logging.WARNING)
    options = load_options(flags, os.environ, config)
    run_until_stopped(lambda stopped: _serve(options, stopped, as_json, ready_file))


async def _serve(options: OrchestratorOptions, stopped: asyncio.Event, as_json: bool, ready_file: Path | None) -> None:
    from orki_server._connections import raise_descriptor_limit
    from orki_server._orchestrator import Orchestrator  # needs gRPC, and `--help` does not

    raise_descriptor_limit(options.max_connections)
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
