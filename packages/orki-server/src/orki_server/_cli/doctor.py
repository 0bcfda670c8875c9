"""`orki doctor`: checks the store, the orchestrator and the consumer groups, and suggests next steps."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

import click

from orki.control.v1.task_pb2 import Pause
from orki_contract.errors import EventsLoading, EventsUnavailable, OrkiError, PeerRefused
from orki_control import Credentials
from orki_events.connection import Connection, parse_address
from orki_events.groups import checked
from orki_events.registry import StreamRegistry
from orki_server._cli.formats import Columns, counted, duration, print_rows, sentence, size
from orki_server._cli.options import credentials, json_option, redis_option, run_async, with_orchestrator
from orki_server._keys import FleetKeys
from orki_server._observers.redaction import safe_text
from orki_server._observers.stream_stats import GroupStats, read_stream_stats
from orki_server._store.fleet import read_pauses

_OLDEST_VERSION: Final = (6, 2)
_MEMORY_WARN, _MEMORY_BAD = 0.80, 0.95
_LAG_WARN: Final = 10_000


class Health(StrEnum):
    """Result of a check: `ok`, `warn` (degraded or at risk) or `bad` (broken)."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result.

    Attributes:
        name: What was checked, such as `store.eviction`.
        verdict: The result.
        figure: The measured value.
        cause: The cause of the problem; empty if `ok`.
        next_step: How to fix it; empty if there is nothing to do.
    """

    name: str
    verdict: Health
    figure: str
    cause: str = ""
    next_step: str = ""


def parse_info(text: str) -> dict[str, str]:
    """Return the fields of a Redis `INFO` reply, without its sections."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {name: value.strip() for name, value in pairs}


def check_store(info: Mapping[str, str]) -> Iterator[Check]:
    """Check the server that holds tasks and events by its `INFO`; missing fields are tolerated."""
    for check in (_version, _role, _loading, _eviction, _evicted, _memory, _persistence):
        yield check(info)


def check_groups(groups: Iterable[GroupStats]) -> Iterator[Check]:
    """Check the lag and the pending entries of the declared consumer groups."""
    for each in groups:
        name = f"events.{each.stream}.{each.group}"
        lag = "unknown" if each.lag is None else f"{each.lag:,}"
        figure = f"lag {lag}, pending {each.pending:,}, oldest {duration(each.oldest_pending_ms * 1000)}"
        if each.missing:
            cause = "The stream's contract declares the group, but the server does not have it."
            step = "Start a consumer of the group or publish to the stream: both create declared groups."
            yield Check(name, Health.BAD, "missing", cause, step)
        elif each.oldest_pending_ms > 2_000 * each.ack_deadline:
            cause = "A consumer has held an entry past its deadline, and no other consumer has claimed it."
            yield Check(name, Health.WARN, figure, cause, "Check that a consumer of this group runs, and read its log.")
        elif each.lag is not None and each.lag > _LAG_WARN:
            cause = "The group's consumers do not run, or are slower than the stream's publishers."
            step = "Start more consumers of this group before retention trims unread entries."
            yield Check(name, Health.WARN, figure, cause, step)
        else:
            yield Check(name, Health.OK, figure)


def check_dead_letters(groups: Iterable[GroupStats]) -> Iterator[Check]:
    """Report each group that has dead letters: entries that were never processed successfully."""
    for each in groups:
        if each.dead_letters:
            name = f"events.{each.stream}.{each.group}.dead_letters"
            command = f"orki streams dead {each.stream} {each.group}"
            cause = "Each entry failed as often as the group allows and became a dead letter."
            step = f"See the reasons with {command}; once the cause is fixed, retry with {command} --replay."
            yield Check(name, Health.BAD, counted(each.dead_letters, "dead letter"), cause, step)


def check_pauses(pauses: Iterable[Pause], now_us: int) -> Iterator[Check]:
    """Report each service or method that is paused."""
    for each in pauses:
        figure = f"paused for {duration(max(0, now_us - each.paused_us))}"
        cause = sentence(safe_text(f"{each.actor} paused it: {each.message or 'no reason given'}"))
        step = f"Its queued tasks wait until: orki resume {each.target}"
        yield Check(f"service.{each.target}", Health.WARN, figure, cause, step)


def _version(info: Mapping[str, str]) -> Check:
    product = "valkey" if "valkey_version" in info else "redis"
    text = info.get(f"{product}_version", "")
    numbers = tuple(int(each) for each in re.findall(r"\d+", text)[:3])
    name, figure, step = "store.version", f"{product} {text or 'unknown'}", "Use Valkey, or Redis 6.2 or newer."
    if not numbers:
        return Check(name, Health.WARN, figure, "The server does not report its version.", step)
    if numbers < _OLDEST_VERSION:
        return Check(name, Health.BAD, figure, "The server lacks stream commands that orki needs.", step)
    if product == "redis" and (8, 2, 0) <= numbers < (8, 2, 3):
        cause = "A stream command can make this version run arbitrary code (CVE-2025-62507)."
        return Check(name, Health.WARN, figure, cause, "Update Redis to 8.2.3 or newer.")
    return Check(name, Health.OK, figure)


def _role(info: Mapping[str, str]) -> Check:
    role = info.get("role", "unknown")
    if role in ("slave", "replica"):
        figure = f"replica of {info.get('master_host', '?')}:{info.get('master_port', '?')}"
        return Check("store.role", Health.BAD, figure, "A replica refuses writes.", "Use the URL of the primary.")
    return Check("store.role", Health.OK, "primary" if role == "master" else role)


def _loading(info: Mapping[str, str]) -> Check:
    if info.get("loading", "0") == "0":
        return Check("store.loading", Health.OK, "loaded")
    figure = f"{info.get('loading_loaded_perc', '?')} % loaded"
    step = f"Wait about {info.get('loading_eta_seconds', '?')} s."
    return Check("store.loading", Health.BAD, figure, "The server is still loading its data from the disk.", step)


def _eviction(info: Mapping[str, str]) -> Check:
    policy = info.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        return Check("store.eviction", Health.OK, policy)
    if policy == "unknown":
        cause, step = "The server does not report its eviction policy.", "Check that maxmemory-policy is noeviction."
        return Check("store.eviction", Health.WARN, policy, cause, step)
    cause = "If memory runs out, the server deletes tasks and whole streams with their groups."
    step = "Run CONFIG SET maxmemory-policy noeviction, and set it in the server's configuration too."
    return Check("store.eviction", Health.BAD, policy, cause, step)


def _evicted(info: Mapping[str, str]) -> Check:
    evicted = _number(info, "evicted_keys")
    if evicted == 0:
        return Check("store.evicted", Health.OK, "0 keys")
    cause = "The server has evicted keys since its start to free memory; tasks or streams may be among them."
    step = "Set maxmemory-policy to noeviction, then check the groups below for missing ones."
    return Check("store.evicted", Health.WARN, f"{evicted:,} keys", cause, step)


def _memory(info: Mapping[str, str]) -> Check:
    used, limit = _number(info, "used_memory"), _number(info, "maxmemory")
    against = "maxmemory" if limit else "the machine's memory"
    limit = limit or _number(info, "total_system_memory")
    if not limit:
        return Check("store.memory", Health.OK, size(used))
    share = used / limit
    figure = f"{size(used)} of {size(limit)} ({share:.0%} of {against})"
    if share < _MEMORY_WARN:
        return Check("store.memory", Health.OK, figure)
    cause = "Memory is nearly full. When it is full, submitting and publishing fail."
    step = "Raise maxmemory, reduce retention (orki streams tune), or start the consumers that lag."
    return Check("store.memory", Health.BAD if share >= _MEMORY_BAD else Health.WARN, figure, cause, step)


def _persistence(info: Mapping[str, str]) -> Check:
    append_only = info.get("aof_enabled") == "1"
    broken = [
        name
        for name in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok" and (append_only or not name.startswith("aof"))
    ]
    if broken:
        figure = ", ".join(f"{name} {info[name]}" for name in broken)
        cause = "The server cannot save its data to the disk and may refuse writes."
        return Check("store.persistence", Health.BAD, figure, cause, "Check free disk space and the server's log.")
    if append_only:
        return Check("store.persistence", Health.OK, "append-only file")
    cause = "If the server crashes, everything since its last snapshot is lost."
    step = "Set appendonly to yes, except for development."
    return Check("store.persistence", Health.WARN, "no append-only file", cause, step)


def _number(info: Mapping[str, str], name: str) -> int:
    text = info.get(name, "0")
    return int(text) if text.isdigit() else 0


_COLUMNS: Final = Columns(
    ("CHECK", "STATE", "VALUE", "CAUSE AND NEXT STEP"), uncut={"CHECK"}, wraps={"VALUE", "CAUSE AND NEXT STEP"}
)


@click.command(
    epilog="""\b
Examples:
  orki doctor
  orki doctor --json | jq '.checks[] | select(.verdict != "ok")'
  orki doctor --timeout 1 || echo unhealthy

\b
Exit codes:
  0  every check is ok or warn
  1  at least one check is bad
  2  wrong usage, or an invalid setting
""",
)
@click.option(
    "--timeout",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0.1, 600),
    metavar="SECONDS",
    help="Time after which a server that has not answered counts as hung.",
)
@json_option
@redis_option
@with_orchestrator
@run_async
async def doctor(timeout: float, as_json: bool, redis_url: str, orchestrator: str, insecure: bool) -> None:
    """Check the store, the orchestrator and the consumer groups.

    Each check is ok, warn or bad and shows the measured value. A check that is not ok also shows its cause and the next
    step. docs/runbook.md explains the states in more detail.
    """
    from orki_control.transport import check_targets  # needs gRPC, and `--help` does not

    link = Connection(parse_address(redis_url), name="orki:doctor", connect_timeout=timeout, answer_timeout=timeout)
    identity = credentials()
    targets = check_targets(orchestrator, insecure=insecure, credentials=identity)
    orchestrators = asyncio.gather(*(_orchestrator(target, timeout, identity) for target in targets))
    store, answers = await asyncio.gather(_store(link, redis_url, timeout), orchestrators)
    checks = [*store, *answers]
    healthy = all(check.verdict is not Health.BAD for check in checks)
    value = {"healthy": healthy, "checks": [asdict(check) for check in checks]}
    rows = [(each.name, each.verdict.value, each.figure, f"{each.cause} {each.next_step}".strip()) for each in checks]
    print_rows(as_json, value, _COLUMNS, rows)
    if not healthy:
        click.get_current_context().exit(1)


async def _store(link: Connection, redis_url: str, timeout: float) -> list[Check]:
    try:
        pong, info, pauses = await link.pipeline((b"PING",), (b"INFO",), (b"HVALS", FleetKeys.PAUSES.encode()))
        if isinstance(pong, EventsLoading) and not isinstance(info, OrkiError):
            return [*check_store(parse_info(info.decode()))]
        checked(pong)
        found = [Check("store.reachable", Health.OK, link.address.shown)]
        found += check_store(parse_info(checked(info).decode()))
        found += check_pauses(read_pauses(checked(pauses)), time.time_ns() // 1000)
        figures = await read_stream_stats(link, await StreamRegistry().streams(link))
        groups = [group for stream in figures for group in stream.groups]
        found += [*check_groups(groups), *check_dead_letters(groups)]
        if not figures:
            found.append(Check("events.streams", Health.OK, "none registered yet"))
        return found
    except OrkiError as error:
        return [await _unreachable(link, redis_url, error, timeout)]
    finally:
        await link.close()


async def _unreachable(link: Connection, redis_url: str, error: OrkiError, timeout: float) -> Check:
    name = "store.reachable"
    if not isinstance(error, EventsUnavailable):
        step = "Fix the cause. Set user and password in ORKI_REDIS_URL."
        return Check(name, Health.BAD, f"{link.address.shown} refuses", sentence(error.message), step)
    if "is running a long script" in error.message:
        step = "Wait, or stop the script with SCRIPT KILL."
        return Check(name, Health.BAD, f"busy: {link.address.shown} runs a long script", sentence(error.message), step)
    if await _accepts(redis_url, timeout):
        figure = f"hung: {link.address.shown} accepts connections but has not answered within {timeout:g} s"
        cause = "The server process is suspended, runs a long command, or waits for its disk."
        step = "Check its process and its log. Restart it if it does not recover."
        return Check(name, Health.BAD, figure, cause, step)
    step = "Start the server, or use another URL with --redis."
    return Check(name, Health.BAD, f"unreachable: {link.address.shown}", sentence(error.message), step)


async def _accepts(redis_url: str, timeout: float) -> bool:
    """Return whether the server accepts connections: one that does so but does not reply is hung, not down."""
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


async def _orchestrator(target: str, timeout: float, identity: Credentials) -> Check:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    from orki_control.transport import error_from, open_channel

    name = "orchestrator"
    try:
        async with open_channel(target, credentials=identity) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
    except grpc.aio.AioRpcError as error:
        typed = error_from(error, target)
        if isinstance(typed, PeerRefused):
            step = "Set ORKI_TOKEN_FILE to a token that it knows, or ask its operator: docs/security.md."
            return Check(name, Health.BAD, f"{target} refuses", sentence(typed.message), step)
        hung = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        silence = f"has not answered within {timeout:g} s" if hung else "does not answer"
        cause = f"{error.code().name}: {' '.join((error.details() or '').split())}"
        step = "Start it with orki serve, or use another address with --orchestrator."
        if identity.encrypted and "handshake failed" in cause:
            cause, step = sentence(typed.message), "Check the files of --tls-ca and of orki serve --server-certificate."
        elif "Socket closed" in cause:
            # TLS 1.3 tells a client only by closing that its certificate was refused.
            step = (
                "It may refuse the certificate: check --tls-certificate and --tls-key."
                if identity.encrypted
                else "It may require TLS: set --tls-ca."
            )
        return Check(name, Health.BAD, f"{target} {silence}", cause, step)
    figure = f"{target} {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Check(name, Health.OK, figure)
    cause = "The orchestrator runs but accepts no new work, usually because its store does not answer."
    return Check(name, Health.BAD, figure, cause, "See the store's checks above and the orchestrator's log.")
