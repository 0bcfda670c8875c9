"""What the doctor looks at, and what it says: figures in, verdicts out. No I/O.

Every verdict names a cause and a next step where it is not `ok`. Limits are those of the runbook.
"""

from __future__ import annotations

__all__ = ["Check", "Verdict", "check_dead_letters", "check_groups", "check_store", "parse_info"]

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from orki_server.cli.figures import duration, size
from orki_server.observers.stream_figures import GroupFigures

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
