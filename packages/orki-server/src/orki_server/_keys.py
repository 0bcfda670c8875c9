"""The keys of the store.

Every key is defined here once, and every field in `_fields.py`, for Python, for the Lua scripts and for `docs/keys.md`.
The keys of one shard share the hash tag `{oN}`, so that an operation touches one slot; the fleet's keys share `{of}`.
Keys that do not begin with `orki:{` belong to the event plane and are not part of this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from orki_server._fields import lua_fields

LAYOUT_VERSION: Final = 3
"""Increases when a key or a field changes its meaning. An orchestrator refuses a store of another version."""
EPOCH_STEP: Final = 1 << 44
"""Distance between the first fences of two store epochs: the epoch is in the high 20 bits of a fence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of the key table.

    Attributes:
        pattern: The key; capital letters mark the variable part.
        kind: Redis type.
        holds: The content.
        writer: The part of the server that writes it.
        ends: When it is removed.
        lua: Name of its suffix (after the hash tag's colon) in the scripts; empty if no script uses it.
    """

    pattern: str
    kind: str
    holds: str
    writer: str
    ends: str
    lua: str = ""

    @property
    def suffix(self) -> str:
        """The part after `orki:{TAG}:`, up to the variable part."""
        return re.split(r"[A-Z]", self.pattern.split("}:", 1)[1], maxsplit=1)[0]

    @property
    def expression(self) -> re.Pattern[str]:
        """Matches exactly the keys of this row."""
        escaped = re.escape(self.pattern).replace(r"\{oN\}", r"\{o\d{1,4}\}")
        return re.compile(re.sub(r"[A-Z][A-Z0-9]+$", ".+", escaped))


TABLE: Final = (
    Key(
        pattern="orki:{oN}:task:TASK",
        kind="hash",
        holds="one task; see the fields below",
        writer="every operation",
        ends="retention after the task's end",
        lua="TASK",
    ),
    Key(
        pattern="orki:{oN}:progress:TASK",
        kind="stream",
        holds="progress of the task, bounded: `attempt`, `index`, `payload`, `number` over all attempts, and "
        "`dropped`, which is `1` for the end of a gap",
        writer="progress",
        ends="with its task",
        lua="PROGRESS",
    ),
    Key(
        pattern="orki:{oN}:idempotency:DIGEST",
        kind="string",
        holds="the task's id of an idempotency key, and the digest of its request",
        writer="submit",
        ends="with its task",
        lua="IDEMPOTENCY",
    ),
    Key(
        pattern="orki:{oN}:queue:METHOD",
        kind="sorted set",
        holds="queued tasks of one method by queueing time, in microseconds, minus an hour for each priority above 5; "
        "for tasks with labels, limits or a fairness key, of one lane: `METHOD`, labels, limits, fairness key and "
        "priority, separated by US",
        writer="submit, offer, cancel, reports, sweep",
        ends="when empty",
        lua="QUEUE",
    ),
    Key(
        pattern="orki:{oN}:timers",
        kind="sorted set",
        holds="tasks by their next timer, in milliseconds",
        writer="every operation",
        ends="when empty",
        lua="NEXT_TIMERS",
    ),
    Key(
        pattern="orki:{oN}:starts",
        kind="sorted set",
        holds="delayed tasks by their start by the server's clock, in milliseconds",
        writer="submit, cancel, sweep",
        ends="when empty",
        lua="STARTS",
    ),
    Key(
        pattern="orki:{oN}:lanes",
        kind="hash",
        holds="the lanes that may have queued tasks",
        writer="submit, reports, sweep, offer",
        ends="when empty; a lane, when an offer finds it empty",
        lua="LANES",
    ),
    Key(
        pattern="orki:{oN}:turns",
        kind="hash",
        holds="time of the last offer of each method, fairness key and priority, in microseconds",
        writer="offer",
        ends="when empty; a turn, with the last lane of its fairness key",
        lua="TURNS",
    ),
    Key(
        pattern="orki:{oN}:limits",
        kind="hash",
        holds="declared limits by key: concurrency, microseconds between two starts, burst; 0 for no limit. Only on "
        "the first shard",
        writer="`orki limit`",
        ends="when empty",
        lua="LIMITS",
    ),
    Key(
        pattern="orki:{oN}:rates",
        kind="hash",
        holds="for each limited key, the time at which its next start would be on time, in microseconds",
        writer="offer",
        ends="with its limit",
        lua="RATES",
    ),
    Key(
        pattern="orki:{oN}:holders:KEY",
        kind="set",
        holds="tasks with an offered or running attempt that name this limit",
        writer="offer, every end of an attempt",
        ends="when empty",
        lua="HOLDERS",
    ),
    Key(
        pattern="orki:{oN}:index",
        kind="sorted set",
        holds="all tasks by submission time, in microseconds",
        writer="submit, sweep",
        ends="when empty",
        lua="INDEX",
    ),
    Key(
        pattern="orki:{oN}:open",
        kind="hash",
        holds="number of unfinished tasks of each service and of each of its contracts (`SERVICE@DIGEST`)",
        writer="submit and every end of a task",
        ends="when empty",
        lua="OPEN",
    ),
    Key(
        pattern="orki:{oN}:fence",
        kind="string",
        holds="the last fence: store epoch in the high 20 bits, counter in the low 44",
        writer="offer, raise_epoch",
        ends="never",
        lua="FENCE",
    ),
    Key(
        pattern="orki:{oN}:outbox",
        kind="stream",
        holds="the outbox: records of transitions whose events the script does not write itself, see below; an entry "
        "has the records of one batch",
        writer="every transition; the outbox publisher trims",
        ends="never; an entry, when it is published",
        lua="OUTBOX",
    ),
    Key(
        pattern="orki:{oN}:clock",
        kind="hash",
        holds="the shard's clock: `wall_us` and `clock_us`, the server's and the shard's time of the last batch; "
        "`gaps_ms`, grace for times without any batch; `host:ORCHESTRATOR`, time of its last batch and of its absence; "
        "`drainer`, the one that publishes the outbox; `starts`, which is there if tasks are delayed; "
        "`orphans`, which is there if children of ended parents are to be cancelled; "
        "`raised`, which is there if budgets were raised; "
        "`paused`, the paused services and methods; `lanes`, which is there if there are lanes; `producer`, name of "
        "the shard in the envelopes of events, and `tasks` and `audit`, numbers of its last events",
        writer="every batch",
        ends="never; a host, an hour after its last batch",
        lua="CLOCK",
    ),
    Key(
        pattern="orki:{oN}:damaged",
        kind="sorted set",
        holds="tasks whose record is damaged, by the time at which it was found, in microseconds",
        writer="offer, sweep",
        ends="never",
        lua="DAMAGED",
    ),
    Key(
        pattern="orki:{oN}:mail:ORCHESTRATOR",
        kind="stream",
        holds="mail to one orchestrator: about attempts of its agents, and answers to its own mail; see the fields "
        "below",
        writer="cancel, post",
        ends="when it is read; a minute after the last mail",
        lua="MAIL",
    ),
    Key(
        pattern="orki:{oN}:children:TASK",
        kind="set",
        holds="children of a task that are cancelled when it fails or is cancelled",
        writer="adopt",
        ends="with the task's end, after the children were cancelled",
        lua="CHILDREN",
    ),
    Key(
        pattern="orki:{oN}:budgets:TASK",
        kind="hash",
        holds="the budgets of a task and of those below it, each as tokens, cost and calls: `limit:TASK`, `used:TASK`, "
        "`charge:TASK:ATTEMPT`, the usage of one attempt, and `wait:TASK`, attempt and budgets of a paused task",
        writer="submit, charge, raise_budget",
        ends="with its task",
        lua="BUDGETS",
    ),
    Key(
        pattern="orki:{oN}:raised",
        kind="sorted set",
        holds="tasks whose budgets were raised and whose paused tasks are to go on, by the time, in microseconds",
        writer="raise_budget",
        ends="when empty",
        lua="RAISED",
    ),
    Key(
        pattern="orki:{oN}:orphans",
        kind="sorted set",
        holds="ended tasks whose children are to be cancelled, by the time of the end, in microseconds",
        writer="every end of a task with children; disown",
        ends="when empty",
        lua="ORPHANS",
    ),
    Key(
        pattern="orki:{of}:layout",
        kind="hash",
        holds="`version` of the layout, number of `shards`, `generation`, a random name of this store's content, and "
        "`secret`, the key of the proofs that agents return for held attempts",
        writer="first start",
        ends="never",
    ),
    Key(
        pattern="orki:{of}:agents",
        kind="sorted set",
        holds="agents by the time of their last message, in milliseconds",
        writer="hello, heartbeat, disconnect",
        ends="when empty; a member, a day after its last message",
    ),
    Key(
        pattern="orki:{of}:agent:AGENT",
        kind="hash",
        holds="an agent: `instance_id`, `session_epoch`, `snapshot`, and `contracts`, the digest of each served one",
        writer="hello, heartbeat, disconnect",
        ends="a day after its last message",
    ),
    Key(
        pattern="orki:{of}:pauses",
        kind="hash",
        holds="what is paused, by whom and why, for lists; the shards enforce it",
        writer="pause, resume",
        ends="when empty",
    ),
    Key(
        pattern="orki:{of}:schedules",
        kind="hash",
        holds="schedules by name: expression, submission, policy, and whether they are paused",
        writer="`orki schedule`",
        ends="when empty",
    ),
    Key(
        pattern="orki:{of}:ticks",
        kind="hash",
        holds="the last tick of each schedule, and the task that it gave",
        writer="schedules",
        ends="with its schedule",
    ),
    Key(
        pattern="orki:{of}:services",
        kind="hash",
        holds="digest of the leading contract of each registered task service",
        writer="hello, `orki contract apply`, clean-up of unused contracts",
        ends="never; a field, with its service",
    ),
    Key(
        pattern="orki:{of}:revisions",
        kind="hash",
        holds="number of changes of each service's contracts",
        writer="hello, `orki contract apply`, clean-up of unused contracts",
        ends="never",
    ),
    Key(
        pattern="orki:{of}:service:SERVICE",
        kind="hash",
        holds="contracts of a task service, each as `image:DIGEST`, `version:DIGEST`, `registered_ms:DIGEST`, "
        "`admissions:DIGEST`, and `ahead:DIGEST` until an agent serves it",
        writer="hello, `orki contract apply`, clean-up of unused contracts",
        ends="with its last contract; a contract, when it is no longer live and another one is registered",
    ),
)


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The keys of one shard.

    Attributes:
        shard: Number of the shard, from 0.
    """

    shard: int

    @property
    def base(self) -> str:
        """The common prefix. Scripts get it as their only key, which routes them to the shard's slot."""
        return f"orki:{{o{self.shard}}}:"

    def task(self, task_id: str) -> str:
        return f"{self.base}task:{task_id}"

    def progress(self, task_id: str) -> str:
        return f"{self.base}progress:{task_id}"

    @property
    def index(self) -> str:
        return f"{self.base}index"

    @property
    def open(self) -> str:
        return f"{self.base}open"

    @property
    def outbox(self) -> str:
        return f"{self.base}outbox"

    @property
    def fence(self) -> str:
        return f"{self.base}fence"

    def mail(self, orchestrator_id: str) -> str:
        return f"{self.base}mail:{orchestrator_id}"


class FleetKeys:
    """The keys of the fleet."""

    BASE = "orki:{of}:"
    LAYOUT = BASE + "layout"
    AGENTS = BASE + "agents"
    PAUSES = BASE + "pauses"
    SCHEDULES = BASE + "schedules"
    TICKS = BASE + "ticks"
    SERVICES = BASE + "services"
    REVISIONS = BASE + "revisions"
    PROBE = BASE + "probe"
    """A key that never exists."""

    @staticmethod
    def channel(database: int) -> str:
        """The channel of the announcements, which databases of a server share, unlike keys."""
        return f"{FleetKeys.BASE}changes:{database}"

    @staticmethod
    def agent(agent_id: str) -> str:
        return f"{FleetKeys.BASE}agent:{agent_id}"

    @staticmethod
    def service(name: str) -> str:
        return f"{FleetKeys.BASE}service:{name}"


def match(name: str) -> Key | None:
    """Return the row that a key belongs to, or None if the table has none."""
    return next((row for row in TABLE if row.expression.fullmatch(name)), None)


def lua_names() -> str:
    """Return the Lua source that defines the names of the keys and of the fields for the scripts."""
    lines = ["local redis, string, table, math, tonumber, ipairs, pairs, pcall, unpack, error = "]
    lines[0] += lines[0].removeprefix("local ").removesuffix(" = ")
    lines.append("local NOTHING = {}")
    lines += [f"local {row.lua} = KEYS[1] .. '{row.suffix}'" for row in TABLE if row.lua]
    # A key that never exists.
    lines.append("local PROBE = KEYS[1] .. 'probe'")
    return "\n".join([*lines, *lua_fields()]) + "\n"
