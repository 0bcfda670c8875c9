"""Findings: pure functions from the raw answers of a server to checks.

Each state has a name, which docs/runbook.md explains. `STATES` says how bad a state is and whether the health service
still reports SERVING in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from orki.control.v1.task_pb2 import Pause
from orki_contract.errors import EventsLoading, EventsNotPersisting, EventsReadOnly, EventsUnavailable, OrkiError
from orki_server._observers.redaction import safe_text
from orki_server._observers.stream_stats import GroupStats, StreamStats
from orki_server._text import counted, duration, sentence, size


class Health(StrEnum):
    """Result of a check: `ok`, `warn` (degraded or at risk) or `bad` (broken)."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


VERDICTS: Final = (Health.OK, Health.WARN, Health.BAD)
"""From the best to the worst."""


class State(NamedTuple):
    """What a state means.

    Attributes:
        verdict: How bad it is.
        serves: Whether the health service still reports SERVING.
    """

    verdict: Health
    serves: bool = True


STATES: Final = {
    "ok": State(Health.OK),
    "unreachable": State(Health.BAD, serves=False),
    "hung": State(Health.BAD, serves=False),
    "busy": State(Health.BAD, serves=False),
    "refused": State(Health.BAD, serves=False),
    "loading": State(Health.BAD, serves=False),
    "replica": State(Health.BAD, serves=False),
    "read-only": State(Health.BAD, serves=False),
    "evicting": State(Health.BAD, serves=False),
    "unknown-policy": State(Health.WARN),
    "evicted": State(Health.WARN),
    "memory-high": State(Health.WARN),
    "memory-critical": State(Health.BAD),
    "memory-full": State(Health.BAD, serves=False),
    "persistence-failing": State(Health.BAD),
    "not-persistent": State(Health.WARN),
    "replica-behind": State(Health.WARN),
    "replica-lost": State(Health.BAD),
    "old-version": State(Health.BAD),
    "unsafe-version": State(Health.WARN),
    "unknown-version": State(Health.WARN),
    "group-missing": State(Health.BAD),
    "group-stuck": State(Health.WARN),
    "group-lag": State(Health.WARN),
    "retention-near": State(Health.WARN),
    "group-unattended": State(Health.WARN),
    "events-lost": State(Health.BAD),
    "events-rolled-back": State(Health.BAD),
    "events-unaccounted": State(Health.WARN),
    "dead-letters": State(Health.BAD),
    "paused": State(Health.WARN),
    "not-serving": State(Health.BAD, serves=False),
}
"""Every state of a check."""

_OLDEST_VERSION: Final = (6, 2)
_MEMORY_WARN, _MEMORY_BAD = 0.80, 0.95
_LAG_WARN: Final = 10_000
_RETENTION_WARN: Final = 0.8
_REPLICA_WARN: Final = 5
"""Seconds without a word from a replica, which otherwise confirms every second."""
_REPLICA_BAD: Final = 20


@dataclass(frozen=True, slots=True)
class Check:
    """One check and its result.

    Attributes:
        name: What was checked, such as `store.eviction`.
        state: One of `STATES`.
        figure: The measured value.
        cause: The cause of the problem; empty if `ok`.
        next_step: How to fix it; empty if there is nothing to do.
    """

    name: str
    state: str
    figure: str
    cause: str = ""
    next_step: str = ""

    @property
    def verdict(self) -> Health:
        """How bad the state is."""
        return STATES[self.state].verdict

    @property
    def serves(self) -> bool:
        """Whether the health service still reports SERVING."""
        return STATES[self.state].serves

    def to_json(self) -> dict[str, str]:
        """Return the check for JSON."""
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "state": self.state,
            "figure": self.figure,
            "cause": self.cause,
            "next_step": self.next_step,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The raw answers of one server at one time.

    Attributes:
        shown: Description of the server.
        timeout: Time that it had for its answers, in seconds.
        info: The fields of its `INFO`; None without an answer.
        failure: Why it did not answer, or refused; None if it answered.
        accepts: Whether it accepted a connection although it did not answer.
        write: Why it refused a write; None if it did not, or if none was tried.
        replicas: The largest number of replicas that it was seen with.
    """

    shown: str
    timeout: float
    info: Mapping[str, str] | None = None
    failure: OrkiError | None = None
    accepts: bool = False
    write: OrkiError | None = None
    replicas: int = 0


class Replica(NamedTuple):
    """A replica, as its primary sees it.

    Attributes:
        name: HOST:PORT.
        online: Whether it follows the stream of writes.
        behind_bytes: Bytes of writes that it has not confirmed.
        silent: Seconds since its last confirmation.
    """

    name: str
    online: bool
    behind_bytes: int
    silent: int


def parse_info(text: str) -> dict[str, str]:
    """Return the fields of a Redis `INFO` reply, without its sections."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {name: value.strip() for name, value in pairs}


def replicas(info: Mapping[str, str]) -> list[Replica]:
    """Return the replicas that a primary reports."""
    written = _number(info, "master_repl_offset")
    found = []
    for name, value in info.items():
        if re.fullmatch(r"(slave|replica)\d+", name):
            fields = dict(pair.split("=", 1) for pair in value.split(",") if "=" in pair)
            behind = max(0, written - _number(fields, "offset"))
            address = f"{fields.get('ip', '?')}:{fields.get('port', '?')}"
            found.append(Replica(address, fields.get("state") == "online", behind, _number(fields, "lag")))
    return found


def check_server(snapshot: Snapshot, server: str = "store") -> Iterator[Check]:
    """Check a server by its answers. The names of the checks begin with `server`."""
    answered = snapshot.info if snapshot.info is not None else {}
    if answered and isinstance(snapshot.failure, EventsReadOnly | EventsNotPersisting):
        # A server that cannot save refuses even PING.
        snapshot = replace(snapshot, failure=None, write=snapshot.failure)
    if isinstance(snapshot.failure, EventsLoading):
        answered = {"loading": "1", **answered}
        # The other checks follow when the server has its data.
        _, state, *texts = _loading(answered)
        yield Check(f"{server}.reachable", state, *texts)
        return
    if snapshot.failure is not None:
        yield _unreachable(snapshot, server)
        return
    yield Check(f"{server}.reachable", "ok", snapshot.shown)
    for name, state, *texts in (
        *(check(answered) for check in (_version, _role, _loading, _eviction, _evicted, _memory, _persistence)),
        _replication(answered, snapshot.replicas),
        *_writes(snapshot),
    ):
        yield Check(f"{server}.{name}", state, *texts)


def check_groups(groups: Iterable[GroupStats]) -> Iterator[Check]:
    """Check the lag and the pending entries of the declared consumer groups."""
    for each in groups:
        name = f"events.{each.stream}.{each.group}"
        lag = "unknown" if each.lag is None else f"{each.lag:,}"
        figure = f"lag {lag}, pending {each.pending:,}, oldest {duration(each.oldest_pending_ms * 1000)}"
        if each.missing:
            cause = "The stream's contract declares the group, but the server does not have it."
            step = "Start a consumer of the group or publish to the stream: both create declared groups."
            yield Check(name, "group-missing", "missing", cause, step)
        elif each.oldest_pending_ms > 2_000 * each.ack_deadline:
            cause = "A consumer has held an entry past its deadline, and no other consumer has claimed it."
            step = "Check that a consumer of this group runs, and read its log."
            yield Check(name, "group-stuck", figure, cause, step)
        elif each.used_retention >= _RETENTION_WARN:
            cause = f"The group is so far behind that {each.used_retention:.0%} of the stream's retention is used."
            step = (
                f"Start more consumers now, or keep more with orki streams tune {each.stream}: what is trimmed is lost."
            )
            yield Check(name, "retention-near", figure, cause, step)
        elif each.lag is not None and each.lag > _LAG_WARN:
            cause = "The group's consumers do not run, or are slower than the stream's publishers."
            step = "Start more consumers of this group before retention trims unread entries."
            yield Check(name, "group-lag", figure, cause, step)
        elif each.lag and not each.consumers:
            cause = "No consumer of the group runs, and entries wait for it."
            yield Check(name, "group-unattended", figure, cause, "Start a consumer of the group.")
        else:
            yield Check(name, "ok", figure)


def check_dead_letters(groups: Iterable[GroupStats]) -> Iterator[Check]:
    """Report each group that has dead letters: entries that were never processed successfully."""
    for each in groups:
        if each.dead_letters:
            name = f"events.{each.stream}.{each.group}.dead_letters"
            command = f"orki streams dead {each.stream} {each.group}"
            cause = "Each entry failed as often as the group allows and became a dead letter."
            step = f"See the reasons with {command}; once the cause is fixed, retry with {command} --replay."
            yield Check(name, "dead-letters", counted(each.dead_letters, "dead letter"), cause, step)


def check_losses(streams: Iterable[StreamStats]) -> Iterator[Check]:
    """Report what streams and groups have lost and no operator has acknowledged, and what nobody can account for."""
    for stream in streams:
        step = f"orki streams losses {stream.stream} shows what was lost; with --acknowledge, this check is ok again."
        if stream.unseen_losses:
            figure = f"{counted(stream.unseen_losses, 'entry')} lost by the server"
            cause = "The server lost entries that it had accepted: it came back with older data, or was flushed."
            yield Check(f"events.{stream.stream}.losses", "events-rolled-back", figure, cause, step)
        for each in stream.groups:
            if each.unseen_losses:
                figure = f"{counted(each.unseen_losses, 'entry')} lost"
                cause = "Entries were trimmed or deleted before the group settled them, or the server lost them."
                yield Check(f"events.{each.stream}.{each.group}.losses", "events-lost", figure, cause, step)
            if each.unaccounted:
                figure = f"{counted(each.unaccounted, 'entry')} unaccounted"
                cause = "The group received entries that nobody acknowledged and that are not pending any more."
                advice = "Did someone delete a consumer with pending entries, or change the group by hand?"
                yield Check(
                    f"events.{each.stream}.{each.group}.unaccounted", "events-unaccounted", figure, cause, advice
                )


def check_pauses(pauses: Iterable[Pause], now_us: int) -> Iterator[Check]:
    """Report each service or method that is paused."""
    for each in pauses:
        figure = f"paused for {duration(max(0, now_us - each.paused_us))}"
        cause = sentence(safe_text(f"{each.actor} paused it: {each.message or 'no reason given'}"))
        step = f"Its queued tasks wait until: orki resume {each.target}"
        yield Check(f"service.{each.target}", "paused", figure, cause, step)


def _unreachable(snapshot: Snapshot, server: str) -> Check:
    name, error, shown = f"{server}.reachable", snapshot.failure, snapshot.shown
    assert error is not None
    if not isinstance(error, EventsUnavailable):
        step = "Fix the cause. Set user and password in ORKI_REDIS_URL."
        return Check(name, "refused", f"{shown} refuses", sentence(error.message), step)
    if "is running a long script" in error.message:
        step = "Wait, or stop the script with SCRIPT KILL."
        return Check(name, "busy", f"busy: {shown} runs a long script", sentence(error.message), step)
    if snapshot.accepts:
        figure = f"hung: {shown} accepts connections but has not answered within {snapshot.timeout:g} s"
        cause = "The server process is suspended, runs a long command, or waits for its disk."
        return Check(name, "hung", figure, cause, "Check its process and its log. Restart it if it does not recover.")
    step = "Start the server, or use another URL with --redis."
    return Check(name, "unreachable", f"unreachable: {shown}", sentence(error.message), step)


_Finding = tuple[str, str, str] | tuple[str, str, str, str, str]
"""Name, state and figure of a check; with a problem also its cause and the next step."""


def _version(info: Mapping[str, str]) -> _Finding:
    product = "valkey" if "valkey_version" in info else "redis"
    text = info.get(f"{product}_version", "")
    numbers = tuple(int(each) for each in re.findall(r"\d+", text)[:3])
    name, figure, step = "version", f"{product} {text or 'unknown'}", "Use Valkey, or Redis 6.2 or newer."
    if not numbers:
        return name, "unknown-version", figure, "The server does not report its version.", step
    if numbers < _OLDEST_VERSION:
        return name, "old-version", figure, "The server lacks stream commands that orki needs.", step
    if product == "redis" and (8, 2, 0) <= numbers < (8, 2, 3):
        cause = "A stream command can make this version run arbitrary code (CVE-2025-62507)."
        return name, "unsafe-version", figure, cause, "Update Redis to 8.2.3 or newer."
    return name, "ok", figure


def _role(info: Mapping[str, str]) -> _Finding:
    role = info.get("role", "unknown")
    if role in ("slave", "replica"):
        figure = f"replica of {info.get('master_host', '?')}:{info.get('master_port', '?')}"
        return "role", "replica", figure, "A replica refuses writes.", "Use the URL of the primary."
    return "role", "ok", "primary" if role == "master" else role


def _loading(info: Mapping[str, str]) -> _Finding:
    if info.get("loading", "0") == "0":
        return "loading", "ok", "loaded"
    figure = f"{info.get('loading_loaded_perc', '?')} % loaded"
    step = f"Wait about {info.get('loading_eta_seconds', '?')} s."
    return "loading", "loading", figure, "The server is still loading its data from the disk.", step


def _eviction(info: Mapping[str, str]) -> _Finding:
    policy = info.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        return "eviction", "ok", policy
    if policy == "unknown":
        cause, step = "The server does not report its eviction policy.", "Check that maxmemory-policy is noeviction."
        return "eviction", "unknown-policy", policy, cause, step
    cause = "If memory runs out, the server deletes tasks and whole streams with their groups."
    step = "Run CONFIG SET maxmemory-policy noeviction, and set it in the server's configuration too."
    return "eviction", "evicting", policy, cause, step


def _evicted(info: Mapping[str, str]) -> _Finding:
    evicted = _number(info, "evicted_keys")
    if evicted == 0:
        return "evicted", "ok", "0 keys"
    cause = "The server has evicted keys since its start to free memory; tasks or streams may be among them."
    step = "Set maxmemory-policy to noeviction, then check the groups for missing ones."
    return "evicted", "evicted", f"{evicted:,} keys", cause, step


def _memory(info: Mapping[str, str]) -> _Finding:
    used, limit = _number(info, "used_memory"), _number(info, "maxmemory")
    bounded, against = limit > 0, "maxmemory" if limit else "the machine's memory"
    limit = limit or _number(info, "total_system_memory")
    if not limit:
        return "memory", "ok", size(used)
    share = used / limit
    figure = f"{size(used)} of {size(limit)} ({share:.0%} of {against})"
    if share < _MEMORY_WARN:
        return "memory", "ok", figure
    step = "Raise maxmemory, reduce retention (orki streams tune), or start the consumers that lag."
    if share >= 1 and bounded:
        return "memory", "memory-full", figure, "Memory is full. Submitting and publishing fail.", step
    cause = "Memory is nearly full. When it is full, submitting and publishing fail."
    return "memory", "memory-critical" if share >= _MEMORY_BAD else "memory-high", figure, cause, step


def _persistence(info: Mapping[str, str]) -> _Finding:
    append_only = info.get("aof_enabled") == "1"
    broken = [
        name
        for name in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok" and (append_only or not name.startswith("aof"))
    ]
    if broken:
        figure = ", ".join(f"{name} {info[name]}" for name in broken)
        cause = "The server cannot save its data to the disk and may refuse writes."
        return "persistence", "persistence-failing", figure, cause, "Check free disk space and the server's log."
    if append_only:
        return "persistence", "ok", "append-only file"
    cause = "If the server crashes, everything since its last snapshot is lost."
    step = "Set appendonly to yes, except for development."
    return "persistence", "not-persistent", "no append-only file", cause, step


def _replication(info: Mapping[str, str], expected: int) -> _Finding:
    found = replicas(info)
    expected = max(expected, len(found))
    if not expected:
        return "replication", "ok", "no replicas"
    gone = expected - len(found)
    behind = max((each.behind_bytes for each in found), default=0)
    silent = max((each.silent for each in found), default=0)
    figure = f"{len(found)} of {counted(expected, 'replica')}, {size(behind)} and {silent} s behind"
    step = "Check the replica's process, its log (INFO replication: master_link_status) and the network."
    if gone or silent >= _REPLICA_BAD:
        cause = "A replica does not answer. A failover to it loses the writes that it lacks."
        return "replication", "replica-lost", figure, cause, step
    backlog = _number(info, "repl_backlog_size") or 1 << 20
    if silent >= _REPLICA_WARN or behind * 2 > backlog or not all(each.online for each in found):
        cause = "A replica is behind. A failover to it loses the writes that it lacks."
        return "replication", "replica-behind", figure, cause, step
    return "replication", "ok", figure


def _writes(snapshot: Snapshot) -> Iterator[_Finding]:
    # Other refusals belong to other checks, or to the permissions of this check's own user.
    if isinstance(snapshot.write, EventsReadOnly | EventsNotPersisting):
        step = "Fix the cause; writes continue by themselves."
        yield "writes", "read-only", "refused", sentence(snapshot.write.message), step


def _number(info: Mapping[str, str], name: str) -> int:
    text = info.get(name, "0")
    return int(text) if text.isdigit() else 0
