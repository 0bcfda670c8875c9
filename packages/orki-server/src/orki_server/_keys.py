"""The schema of every Redis key that the server writes: pattern, kind, writer, slot, end of life.

All names are built here, for Python and for the store's Lua alike; nothing else in the server spells a key. The keys
of a shard share the hash tag `{oN}`, so that each transition touches one slot; the fleet's own keys share `{of}`. Keys
which do not begin with `orki:{` belong to the event plane, and are no part of this table.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

LAYOUT_VERSION = 1
"""Rises when a key or a field changes its meaning; a store of another version is refused at start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of the table.

    Attributes:
        pattern: The name; words in capitals stand for what varies.
        kind: Redis type.
        holds: What is in it.
        writer: Which part of the server writes it.
        ends: When it goes.
        lua: Name of the suffix (what follows the hash tag's colon) in the store's scripts; empty when they have none.
    """

    pattern: str
    kind: str
    holds: str
    writer: str
    ends: str
    lua: str = ""

    @property
    def suffix(self) -> str:
        """What follows `orki:{TAG}:`, up to the part that varies."""
        return re.split(r"[A-Z]", self.pattern.split("}:", 1)[1], maxsplit=1)[0]

    @property
    def expression(self) -> re.Pattern[str]:
        """Matches exactly the names of this row."""
        escaped = re.escape(self.pattern).replace(r"\{oN\}", r"\{o\d{1,4}\}")
        return re.compile(re.sub(r"[A-Z][A-Z0-9]+$", ".+", escaped))


TABLE: tuple[Key, ...] = (
    Key(
        pattern="orki:{oN}:t:TASK",
        kind="hash",
        holds="one task: request, state, attempt, timers, response",
        writer="store: every transition",
        ends="retention after the task's end",
        lua="TASK",
    ),
    Key(
        pattern="orki:{oN}:p:TASK",
        kind="stream",
        holds="the task's progress, bounded",
        writer="store: progress",
        ends="with its task",
        lua="PROGRESS",
    ),
    Key(
        pattern="orki:{oN}:k:DIGEST",
        kind="string",
        holds="an idempotency key's request digest and task",
        writer="store: submit",
        ends="with its task",
        lua="IDEMPOTENCY",
    ),
    Key(
        pattern="orki:{oN}:q:METHOD",
        kind="sorted set",
        holds="queued tasks of one method, by the time they were queued",
        writer="store: submit, offer, cancel, reports, sweep",
        ends="when it is empty",
        lua="QUEUE",
    ),
    Key(
        pattern="orki:{oN}:due",
        kind="sorted set",
        holds="tasks by the time of their next timer, in milliseconds",
        writer="store: every transition",
        ends="when it is empty",
        lua="DUE",
    ),
    Key(
        pattern="orki:{oN}:ix",
        kind="sorted set",
        holds="all tasks by the time of their submission, in microseconds",
        writer="store: submit, sweep",
        ends="when it is empty",
        lua="INDEX",
    ),
    Key(
        pattern="orki:{oN}:open",
        kind="hash",
        holds="number of unfinished tasks of each service, and of each contract of it (`SERVICE@DIGEST`)",
        writer="store: submit and every end",
        ends="when it is empty",
        lua="OPEN",
    ),
    Key(
        pattern="orki:{oN}:fence",
        kind="string",
        holds="the last fence: store epoch in the high 20 bits, counter in the low 44",
        writer="store: offer, epoch",
        ends="never",
        lua="FENCE",
    ),
    Key(
        pattern="orki:{oN}:out",
        kind="stream",
        holds="the outbox: one record for each transition",
        writer="store: every transition; outbox drain trims",
        ends="never; its entries, once they are published",
        lua="OUT",
    ),
    Key(
        pattern="orki:{of}:layout",
        kind="hash",
        holds="layout version, number of shards, and a name for this filling of the store",
        writer="store: first start",
        ends="never",
    ),
    Key(
        pattern="orki:{of}:agents",
        kind="sorted set",
        holds="agents by their last sign of life, in milliseconds",
        writer="fleet: hello, heartbeat, disconnect",
        ends="when it is empty; a member, a day after its last sign of life",
    ),
    Key(
        pattern="orki:{of}:agent:AGENT",
        kind="hash",
        holds="an agent: instance, session epoch, snapshot, digests of the contracts that it serves",
        writer="fleet: hello, heartbeat, disconnect",
        ends="a day after its last sign of life",
    ),
    Key(
        pattern="orki:{of}:services",
        kind="hash",
        holds="digest of the leading contract of each registered task service",
        writer="registry: hello, apply, clean",
        ends="never; a field, with its service",
    ),
    Key(
        pattern="orki:{of}:revisions",
        kind="hash",
        holds="number of changes of each service's contracts",
        writer="registry: hello, apply, clean",
        ends="never",
    ),
    Key(
        pattern="orki:{of}:service:SERVICE",
        kind="hash",
        holds="a task service: of the leading contract digest, image, version; of each (`KIND:DIGEST`) image `i`, "
        "version `v`, time `w`, admissions `n`, and `p` while it is applied ahead",
        writer="registry: hello, apply, clean; fleet: hello (admissions)",
        ends="with the last of its contracts; a contract, when it is live no more and another one is registered",
    ),
)


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The names of one shard's keys.

    Attributes:
        shard: Number of the shard, from 0.
    """

    shard: int

    @property
    def base(self) -> str:
        """What all of the shard's keys begin with; scripts get it as their one key, which also routes them."""
        return f"orki:{{o{self.shard}}}:"

    def task(self, task_id: str) -> str:
        """The task's hash."""
        return f"{self.base}t:{task_id}"

    def progress(self, task_id: str) -> str:
        """The task's progress."""
        return f"{self.base}p:{task_id}"

    @property
    def index(self) -> str:
        """All tasks of the shard."""
        return f"{self.base}ix"

    @property
    def open(self) -> str:
        """Unfinished tasks of each service."""
        return f"{self.base}open"

    @property
    def out(self) -> str:
        """The outbox."""
        return f"{self.base}out"

    @property
    def fence(self) -> str:
        """The last fence."""
        return f"{self.base}fence"


class FleetKeys:
    """The names of the fleet's own keys."""

    BASE = "orki:{of}:"
    LAYOUT = BASE + "layout"
    AGENTS = BASE + "agents"
    SERVICES = BASE + "services"
    REVISIONS = BASE + "revisions"

    @staticmethod
    def agent(agent_id: str) -> str:
        """An agent's hash."""
        return f"{FleetKeys.BASE}agent:{agent_id}"

    @staticmethod
    def service(name: str) -> str:
        """A registered service's hash."""
        return f"{FleetKeys.BASE}service:{name}"


def idempotency_digest(key: str) -> str:
    """What stands for an idempotency key in a key's name: SHA-256, 64 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def lua_names() -> Iterator[tuple[str, str]]:
    """Names of the suffixes in the store's scripts, with their values; a script puts its `BASE` before them."""
    return ((row.lua, row.suffix) for row in TABLE if row.lua)


def match(name: str) -> Key | None:
    """The row that a key's name belongs to, or None when the table knows no such key."""
    return next((row for row in TABLE if row.expression.fullmatch(name)), None)


def table_markdown() -> str:
    """The table for `docs/keys.md`."""
    rows = [f"| `{row.pattern}` | {row.kind} | {row.holds} | {row.writer} | {row.ends} |" for row in TABLE]
    return "\n".join(["| Key | Kind | Holds | Written by | Ends |", "|---|---|---|---|---|", *rows]) + "\n"
