"""`orki doctor`: looks at store, orchestrator and consumer groups, and says what is wrong and what to do."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final
from urllib.parse import urlsplit

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from orki_contract.errors import EventsLoading, EventsUnavailable, OrkiError
from orki_control.transport import check_target, open_channel
from orki_events.connection import Connection, parse_address
from orki_events.registry import StreamRegistry
from orki_server._cli.formats import Column, duration, print_json, print_table, size
from orki_server._cli.options import json_option, redis_option, run, with_orchestrator
from orki_server._observers.stream_stats import GroupFigures, stream_figures

_OLDEST_VERSION: Final = (6, 2)
_MEMORY_WARN, _MEMORY_BAD = 0.80, 0.95
_LAG_WARN: Final = 10_000


class Verdict(StrEnum):
    """How something is: fine; worth a look; broken."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What, such as `store.eviction`.
        verdict: How it is.
        figure: What was measured.
        cause: Why it is not fine; empty when it is.
        next_step: What to do about it; empty when nothing need be done.
    """

    name: str
    verdict: Verdict
    figure: str
    cause: str = ""
    next_step: str = ""

    def to_json(self) -> dict[str, Any]:
        """The check with stable keys."""
        return asdict(self)


def parse_info(text: str) -> dict[str, str]:
    """The fields of Redis' `INFO`, sections and order dropped."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {name: value.strip() for name, value in pairs}


def check_store(info: Mapping[str, str]) -> Iterator[Check]:
    """What `INFO` tells about the server that holds tasks and events.

    Args:
        info: As `parse_info` gives it; fields that a server lacks are passed over.
    """
    yield _version(info)
    yield _role(info)
    yield _loading(info)
    yield _eviction(info)
    yield _evicted(info)
    yield _memory(info)
    yield _persistence(info)


def check_groups(groups: Iterable[GroupFigures]) -> Iterator[Check]:
    """How far the declared consumer groups are."""
    for each in groups:
        name = f"events.{each.stream}.{each.group}"
        lag = "unknown" if each.lag is None else f"{each.lag:,}"
        figure = f"lag {lag}, pending {each.pending:,}, oldest {duration(each.oldest_pending_ms * 1000)}"
        if each.missing:
            yield Check(
                name=name,
                verdict=Verdict.BAD,
                figure="missing",
                cause="The stream's contract declares the group, but the server does not have it.",
                next_step="Start its consumer, or publish once: both create declared groups.",
            )
        elif each.oldest_pending_ms > 2_000 * each.ack_deadline:
            yield Check(
                name=name,
                verdict=Verdict.WARN,
                figure=figure,
                cause="An entry was given to a consumer and neither acknowledged nor claimed by another for long.",
                next_step="Look whether a consumer of this group runs, and at its log.",
            )
        elif each.lag is not None and each.lag > _LAG_WARN:
            yield Check(
                name=name,
                verdict=Verdict.WARN,
                figure=figure,
                cause="The group's consumers are slower than the stream's publishers, or do not run.",
                next_step="Start more consumers of this group before retention overtakes it.",
            )
        else:
            yield Check(name=name, verdict=Verdict.OK, figure=figure)


def check_dead_letters(groups: Iterable[GroupFigures]) -> Iterator[Check]:
    """What groups gave up: work that nobody has done. Told for each group that has some."""
    for each in groups:
        if each.dead_letters:
            look = f"orki streams dead {each.stream} {each.group}"
            count = f"{each.dead_letters:,} dead letter{'s' if each.dead_letters > 1 else ''}"
            yield Check(
                name=f"events.{each.stream}.{each.group}.dead_letters",
                verdict=Verdict.BAD,
                figure=count,
                cause="The group's consumers failed on these entries as often as the group allows, and gave them up.",
                next_step=f"See why with {look}; once the cause is gone, have them tried again with {look} --replay.",
            )


def _version(info: Mapping[str, str]) -> Check:
    product = "valkey" if "valkey_version" in info else "redis"
    text = info.get(f"{product}_version", "")
    numbers = tuple(int(each) for each in re.findall(r"\d+", text)[:3])
    figure = f"{product} {text or 'unknown'}"
    name = "store.version"
    if not numbers:
        return Check(
            name=name,
            verdict=Verdict.WARN,
            figure=figure,
            cause="The server does not tell its version.",
            next_step="Use Valkey, or Redis 6.2 or newer.",
        )
    if numbers < _OLDEST_VERSION:
        return Check(
            name=name,
            verdict=Verdict.BAD,
            figure=figure,
            cause="The server lacks stream commands that orki needs.",
            next_step="Use Valkey, or Redis 6.2 or newer.",
        )
    if product == "redis" and (8, 2, 0) <= numbers < (8, 2, 3):
        return Check(
            name=name,
            verdict=Verdict.WARN,
            figure=figure,
            cause="This version can be made to run foreign code by a stream command (CVE-2025-62507).",
            next_step="Update Redis to 8.2.3 or newer.",
        )
    return Check(name=name, verdict=Verdict.OK, figure=figure)


def _role(info: Mapping[str, str]) -> Check:
    role = info.get("role", "unknown")
    if role in ("slave", "replica"):
        return Check(
            name="store.role",
            verdict=Verdict.BAD,
            figure=f"replica of {info.get('master_host', '?')}:{info.get('master_port', '?')}",
            cause="A replica takes no writes.",
            next_step="Give the URL of the primary.",
        )
    return Check(name="store.role", verdict=Verdict.OK, figure="primary" if role == "master" else role)


def _loading(info: Mapping[str, str]) -> Check:
    if info.get("loading", "0") == "0":
        return Check(name="store.loading", verdict=Verdict.OK, figure="loaded")
    return Check(
        name="store.loading",
        verdict=Verdict.BAD,
        figure=f"{info.get('loading_loaded_perc', '?')} % loaded",
        cause="The server still reads its data from the disk.",
        next_step=f"Wait about {info.get('loading_eta_seconds', '?')} s.",
    )


def _eviction(info: Mapping[str, str]) -> Check:
    policy = info.get("maxmemory_policy", "unknown")
    if policy in ("noeviction", "unknown"):
        verdict = Verdict.OK if policy == "noeviction" else Verdict.WARN
        cause = "" if policy == "noeviction" else "The server does not tell its eviction policy."
        step = "" if policy == "noeviction" else "Make sure that it is noeviction."
        return Check(name="store.eviction", verdict=verdict, figure=policy, cause=cause, next_step=step)
    return Check(
        name="store.eviction",
        verdict=Verdict.BAD,
        figure=policy,
        cause="Short of memory, the server would drop tasks and whole streams with their groups.",
        next_step="CONFIG SET maxmemory-policy noeviction, and the same in the configuration of the server.",
    )


def _evicted(info: Mapping[str, str]) -> Check:
    evicted = _number(info, "evicted_keys")
    if evicted == 0:
        return Check(name="store.evicted", verdict=Verdict.OK, figure="0 keys")
    return Check(
        name="store.evicted",
        verdict=Verdict.WARN,
        figure=f"{evicted:,} keys",
        cause="Since its start the server dropped keys to make room; tasks or streams may have been among them.",
        next_step="Set maxmemory-policy to noeviction, then look for groups that are missing below.",
    )


def _memory(info: Mapping[str, str]) -> Check:
    used, limit = _number(info, "used_memory"), _number(info, "maxmemory")
    against = "maxmemory" if limit else "the machine's memory"
    limit = limit or _number(info, "total_system_memory")
    if not limit:
        return Check(name="store.memory", verdict=Verdict.OK, figure=size(used))
    share = used / limit
    figure = f"{size(used)} of {size(limit)} ({share:.0%} of {against})"
    if share < _MEMORY_WARN:
        return Check(name="store.memory", verdict=Verdict.OK, figure=figure)
    return Check(
        name="store.memory",
        verdict=Verdict.BAD if share >= _MEMORY_BAD else Verdict.WARN,
        figure=figure,
        cause="Nearly full; when it is full, submitting and publishing fail.",
        next_step="Raise maxmemory, keep less (orki streams tune), or start the consumers that lag.",
    )


def _persistence(info: Mapping[str, str]) -> Check:
    append_only = info.get("aof_enabled") == "1"
    broken = [
        name
        for name in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok" and (append_only or not name.startswith("aof"))
    ]
    if broken:
        return Check(
            name="store.persistence",
            verdict=Verdict.BAD,
            figure=", ".join(f"{name} {info[name]}" for name in broken),
            cause="The server cannot write its data to the disk, and may refuse writes.",
            next_step="Look at the disk's space and at the server's log.",
        )
    if append_only:
        return Check(name="store.persistence", verdict=Verdict.OK, figure="append-only file")
    return Check(
        name="store.persistence",
        verdict=Verdict.WARN,
        figure="no append-only file",
        cause="When the server dies, all since its last snapshot is lost.",
        next_step="For anything but development set appendonly to yes.",
    )


def _number(info: Mapping[str, str], name: str) -> int:
    text = info.get(name, "0")
    return int(text) if text.isdigit() else 0


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
