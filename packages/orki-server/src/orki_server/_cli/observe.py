"""`orki observe`: the three observers, each a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from orki_server._cli.options import redis_option
from orki_server._cli.root import LazyGroup
from orki_server._observers.audit import AuditLogSettings, Fsync
from orki_server._observers.http_server import LOOPBACK, ServerOptions
from orki_server._process import run_until_stopped

F = TypeVar("F", bound=Callable[..., Any])

_METRICS_PORT = 9464
_FEED_PORT = 9465


@click.group(
    cls=LazyGroup,
    lazy={
        "audit": ("orki_server._cli.observe:audit", "Write every event of every stream to a file, redacted."),
        "feed": ("orki_server._cli.observe:feed", "Show all events live, as server-sent events and on a page."),
        "metrics": ("orki_server._cli.observe:metrics", "Serve figures to Prometheus."),
    },
    epilog="""\b
Examples:
  orki observe metrics --port 9464
  orki observe audit audit.jsonl
  orki observe feed
""",
)
def observe() -> None:
    """Run an observer until it is stopped.

    Each may be killed at any instant and started again: nothing that was acknowledged is lost, nothing is written
    twice. SIGTERM ends it in good order.
    """


def _served(default_port: int) -> Callable[[F], F]:
    """Adds `--host` and `--port`."""
    host = click.option("--host", default=LOOPBACK, show_default=True, help="A loopback address: there is no password.")
    port = click.option(
        "--port", default=default_port, show_default=True, type=click.IntRange(0, 65_535), help="0 takes any free one."
    )
    return lambda command: host(port(command))


@click.command(
    epilog="""\b
Examples:
  orki observe feed --port 9465
  curl -N http://127.0.0.1:9465/events?stream=tasks
""",
)
@_served(_FEED_PORT)
@redis_option
def feed(host: str, port: int, redis_url: str) -> None:
    """Show all events live: server-sent events at /events, a page at /.

    A client that comes back with Last-Event-ID goes on exactly where it was. No consumer group is used, so a closed
    browser holds nothing up.
    """
    from orki_events.connection import parse_address
    from orki_server._observers.feed import FeedOptions, run_feed

    _log_to_stderr()
    options = FeedOptions(server=ServerOptions(host=host, port=port))
    run_until_stopped(partial(run_feed, parse_address(redis_url), options))


@click.command(
    epilog="""\b
Examples:
  orki observe metrics
  curl http://127.0.0.1:9464/metrics
""",
)
@_served(_METRICS_PORT)
@redis_option
def metrics(host: str, port: int, redis_url: str) -> None:
    """Serve figures to Prometheus at /metrics: tokens and cost, tools, tasks, agents, streams and groups."""
    from orki_server._observers.metrics import MetricsOptions, run_metrics

    _log_to_stderr()
    options = MetricsOptions(server=ServerOptions(host=host, port=port))
    run_until_stopped(partial(run_metrics, redis_url, options))


@click.command(
    epilog="""\b
Examples:
  orki observe audit audit.jsonl
  tail -f audit.jsonl | jq -c 'select(.stream == "audit") | .event'
""",
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--fsync",
    type=click.Choice([each.value for each in Fsync]),
    default=Fsync.BATCH.value,
    show_default=True,
    help="batch: on the disk before an event is acknowledged; never: when the system likes.",
)
@redis_option
def audit(file: Path, fsync: str, redis_url: str) -> None:
    """Write every event of every stream to FILE: a line of JSON each, once, sensitive fields redacted.

    Streams that are registered meanwhile are followed without being named. FILE is only appended to; start the observer
    again with the same FILE, since what is there tells it what has been written.
    """
    from orki_server._observers.audit import AuditOptions, run_audit

    _log_to_stderr()
    options = AuditOptions(log=AuditLogSettings(path=file, fsync=Fsync(fsync)))
    run_until_stopped(partial(run_audit, redis_url, options))


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
