"""`orki doctor`: looks at store, orchestrator and consumer groups, and says what is wrong and what to do."""

from __future__ import annotations

__all__ = ["doctor"]

import asyncio
import socket
from urllib.parse import urlsplit

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from orki_contract.errors import EventsLoading, EventsUnavailable, OrkiError
from orki_control.transport import check_target, open_channel
from orki_events.connection import Connection, parse_address
from orki_events.registry import StreamRegistry
from orki_server.cli.doctor_checks import Check, Verdict, check_dead_letters, check_groups, check_store, parse_info
from orki_server.cli.settings import json_option, redis_option, run, with_orchestrator
from orki_server.cli.tables import Column, print_json, print_table
from orki_server.observers.stream_figures import stream_figures

_COLUMNS = (
    Column(name="CHECK", whole=True),
    Column(name="IS", whole=True, judged=True),
    Column(name="FIGURE", wraps=True),
    Column(name="CAUSE AND NEXT STEP", wraps=True),
)


@click.command(
    epilog="""\b
Examples:
  orki doctor
  orki doctor --json | jq '.checks[] | select(.verdict != "ok")'
  orki doctor --timeout 1 || echo unhealthy
""",
)
@click.option(
    "--timeout",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0.1, 600),
    metavar="SECONDS",
    help="A server that takes longer to answer counts as hung.",
)
@json_option
@redis_option
@with_orchestrator
def doctor(timeout: float, as_json: bool, redis_url: str, orchestrator: str, insecure: bool) -> None:
    """Look for what is wrong, and say what to do about it.

    Each check is ok, warn or bad, with a figure; what is not ok also has a cause and a next step. The exit code is 1
    when anything is bad.
    """
    link = Connection(parse_address(redis_url), name="orki:doctor", connect_timeout=timeout, answer_timeout=timeout)
    target = check_target(orchestrator, insecure=insecure)
    checks = run(_look(link, redis_url, target, timeout))
    healthy = all(check.verdict is not Verdict.BAD for check in checks)
    if as_json:
        print_json({"healthy": healthy, "checks": [check.to_json() for check in checks]})
    else:
        rows = [
            (check.name, check.verdict.value, check.figure, " ".join(filter(None, (check.cause, check.next_step))))
            for check in checks
        ]
        print_table(_COLUMNS, rows, empty="")
    if not healthy:
        click.get_current_context().exit(1)


async def _look(link: Connection, redis_url: str, target: str, timeout: float) -> list[Check]:
    store, orchestrator = await asyncio.gather(_store(link, redis_url, timeout), _orchestrator(target, timeout))
    return [*store, orchestrator]


async def _store(link: Connection, redis_url: str, timeout: float) -> list[Check]:
    try:
        pong, info = await link.pipeline((b"PING",), (b"INFO",))
        if isinstance(pong, EventsLoading) and not isinstance(info, OrkiError):
            return [*check_store(parse_info(info.decode()))]
        for reply in (pong, info):
            if isinstance(reply, OrkiError):
                raise reply
        found = [Check(name="store.reachable", verdict=Verdict.OK, figure=link.address.shown)]
        found += check_store(parse_info(info.decode()))
        figures = await stream_figures(link, await StreamRegistry().streams(link))
        groups = [group for stream in figures for group in stream.groups]
        found += [*check_groups(groups), *check_dead_letters(groups)]
        if not figures:
            found.append(Check(name="events.streams", verdict=Verdict.OK, figure="none registered yet"))
        return found
    except OrkiError as error:
        return [await _unreachable(link, redis_url, error, timeout)]
    finally:
        await link.close()


async def _unreachable(link: Connection, redis_url: str, error: OrkiError, timeout: float) -> Check:
    name = "store.reachable"
    if not isinstance(error, EventsUnavailable):
        return Check(
            name=name,
            verdict=Verdict.BAD,
            figure=f"{link.address.shown} refuses",
            cause=f"{error.message}.",
            next_step="Do what the cause says; user and password belong into ORKI_REDIS_URL.",
        )
    if await _accepts(redis_url, timeout):
        return Check(
            name=name,
            verdict=Verdict.BAD,
            figure=f"hung: {link.address.shown} accepts connections, and has not answered within {timeout:g} s",
            cause="The server is stopped, runs a long command, or waits for its disk.",
            next_step="Look at its process and its log, and restart it if nothing else helps.",
        )
    return Check(
        name=name,
        verdict=Verdict.BAD,
        figure=f"unreachable: {link.address.shown}",
        cause=f"{error.message}.",
        next_step="Start the server, or give another URL with --redis.",
    )


async def _accepts(redis_url: str, timeout: float) -> bool:
    """Whether somebody takes connections there: then it is not down, it is hung."""
    parts = urlsplit(redis_url)

    def connect() -> bool:
        try:
            if parts.scheme == "unix":
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.settimeout(timeout)
                    probe.connect(parts.path)
            else:
                socket.create_connection((parts.hostname or "localhost", parts.port or 6379), timeout).close()
        except OSError:
            return False
        return True

    return await asyncio.to_thread(connect)


async def _orchestrator(target: str, timeout: float) -> Check:
    name = "orchestrator"
    try:
        async with open_channel(target) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        hung = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        silence = f"has not answered within {timeout:g} s" if hung else "does not answer"
        return Check(
            name=name,
            verdict=Verdict.BAD,
            figure=f"{target} {silence}",
            cause=f"{error.code().name}: {' '.join((error.details() or '').split())}",
            next_step="Start it with orki serve, or give another address with --orchestrator.",
        )
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Check(name=name, verdict=Verdict.OK, figure=f"{target} {status}")
    return Check(
        name=name,
        verdict=Verdict.BAD,
        figure=f"{target} {status}",
        cause="It runs and takes no new work, mostly because its store does not answer.",
        next_step="Look at the store's checks, and at the orchestrator's log.",
    )
