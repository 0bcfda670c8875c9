"""`orki observe`: runs one of the three observers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from orki_server._cli.options import FEED_PORT, METRICS_PORT, F, log_to_stderr, redis_option
from orki_server._process import run_until_stopped

# The observers are imported when they run: they need aiohttp, prometheus_client and Redis, and `--help` does not.


@click.group(
    epilog="""\b
Examples:
  orki observe metrics --port 9464
  orki observe audit audit.jsonl
  orki observe feed
""",
)
def observe() -> None:
    """Run an observer until it is stopped.

    An observer may be killed at any time and restarted: it loses no acknowledged event and writes none twice. SIGTERM
    stops it cleanly, with exit code 0.
    """


def _http_options(default_port: int) -> Callable[[F], F]:
    """Add `--host` and `--port`."""
    host = click.option(
        "--host",
        default="127.0.0.1",
        show_default=True,
        help="Loopback address to listen on; other addresses are refused, since observers have no password.",
    )
    port = click.option(
        "--port",
        default=default_port,
        show_default=True,
        type=click.IntRange(0, 65_535),
        help="Port to listen on; 0 chooses a free one.",
    )
    return lambda command: host(port(command))


@observe.command(
    short_help="Serve all events live, as server-sent events and as a page.",
    epilog="""\b
Examples:
  orki observe feed --port 9465
  curl -N http://127.0.0.1:9465/events?stream=tasks
""",
)
@_http_options(FEED_PORT)
@redis_option
def feed(host: str, port: int, redis_url: str) -> None:
    """Serve all events live: server-sent events at /events, a page at /.

    A client that reconnects with Last-Event-ID continues where it stopped. The feed uses no consumer group, so a closed
    browser retains nothing in Redis.
    """
    from orki_events.connection import parse_address
    from orki_server._observers.feed import FeedOptions, run_feed

    log_to_stderr()
    run_until_stopped(partial(run_feed, parse_address(redis_url), FeedOptions(host=host, port=port)))


@observe.command(
    short_help="Serve Prometheus metrics.",
    epilog="""\b
Examples:
  orki observe metrics
  curl http://127.0.0.1:9464/metrics
""",
)
@_http_options(METRICS_PORT)
@redis_option
def metrics(host: str, port: int, redis_url: str) -> None:
    """Serve Prometheus metrics at /metrics: tokens and cost, tools, tasks, agents, streams and groups."""
    from orki_server._observers.metrics import run_metrics

    log_to_stderr()
    run_until_stopped(partial(run_metrics, redis_url, host, port))


@observe.command(
    short_help="Write every event of every stream to a file, redacted.",
    epilog="""\b
Examples:
  orki observe audit audit.jsonl
  tail -f audit.jsonl | jq -c 'select(.stream == "audit") | .event'
""",
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--fsync",
    type=click.Choice(["batch", "never"]),
    default="batch",
    show_default=True,
    help="batch: sync lines to the disk before their events are acknowledged. never: leave it to the system.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="BYTES",
    help="Size at which FILE is renamed to FILE.NUMBER and a new one begun; 0 for never.",
)
@redis_option
def audit(file: Path, fsync: str, max_bytes: int, redis_url: str) -> None:
    """Write every event of every stream to FILE, once each, as a line of JSON with sensitive fields redacted.

    The observer also follows streams that are registered while it runs. It only appends to FILE. Restart it with the
    same FILE: its lines tell the observer which events it has already written. The lines form a hash chain, which
    `orki audit verify` checks. Events that were lost before they could be written are a line as well.
    """
    from orki_server._observers.audit import AuditLog, Fsync, run_audit

    log_to_stderr()
    run_until_stopped(partial(run_audit, redis_url, AuditLog(file, fsync=Fsync(fsync), max_bytes=max_bytes)))
