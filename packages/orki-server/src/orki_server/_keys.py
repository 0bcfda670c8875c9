"""The schema of the store: Redis keys and their fields.

Every key and field name is defined here once, for Python, for the Lua scripts and for `docs/keys.md`. The keys of one
shard share the hash tag `{oN}`, so that an operation touches one slot; the fleet's keys share `{of}`. Keys that do not
begin with `orki:{` belong to the event plane and are not part of this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

LAYOUT_VERSION: Final = 2
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
        holds="digest of the request and id of the task that an idempotency key belongs to",
        writer="submit",
        ends="with its task",
        lua="IDEMPOTENCY",
    ),
    Key(
        pattern="orki:{oN}:queue:METHOD",
        kind="sorted set",
        holds="queued tasks of one method by queueing time, in microseconds",
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
        holds="the outbox: one record for each transition; see the fields below",
        writer="every transition; the outbox publisher trims",
        ends="never; an entry, when it is published",
        lua="OUTBOX",
    ),
    Key(
        pattern="orki:{of}:layout",
        kind="hash",
        holds="`version` of the layout, number of `shards`, and `generation`, a random name of this store's content",
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

TASK_FIELDS: Final[dict[str, str]] = {
    "state": "state of the task's life",
    "method": "`package.Service/Method`",
    "request": "the request message, serialized",
    "response": "the response message, serialized",
    "options": "timeouts, attempts and back-off of the method at submission",
    "contract": "digest of the contract at submission",
    "idempotency": "SHA-256 of the idempotency key; empty without one",
    "submitted_us": "time of submission, microseconds",
    "ended_us": "time of the end, microseconds",
    "revision": "number of transitions",
    "traceparent": "the task's span",
    "parent_id": "the span above the task's",
    "attempt": "number of the current or last attempt",
    "fence": "fence of that attempt",
    "agent_id": "agent of that attempt",
    "instance_id": "process of that agent",
    "attempt_traceparent": "span of that attempt",
    "progress_index": "index of the attempt's last progress",
    "progress_number": "number of deltas over all attempts, with those that are missing",
    "cancel_acknowledged": "`1` when the agent has acknowledged the cancel",
    "started": "number of attempts that were started",
    "refused_offers": "number of offers in a row that no agent accepted",
    "result_fence": "fence of the last accepted result",
    "result_agent": "agent of the last accepted result",
    "failure_reason": "reason of the final failure, a number of `orki.errors.v1.Reason`",
    "failure_message": "message of the final failure",
    "failure_type": "error type of the final failure",
    "earlier_failures": "failures of earlier attempts: reason, type, message, separated by US and RS",
    "offer_due": "time when the offer expires, milliseconds",
    "lease_due": "time when the lease expires, milliseconds",
    "attempt_due": "time when the attempt times out, milliseconds",
    "stall_due": "time when the attempt counts as stalled, milliseconds",
    "total_due": "time when the task times out, milliseconds",
    "retry_due": "time when a waiting task is queued again, milliseconds",
    "forget_due": "time when a finished task is removed, milliseconds",
}
"""Fields of a task's hash. A missing field is empty or 0."""

NUMBERS: Final = (
    *("revision", "attempt", "progress_index", "progress_number", "started", "refused_offers"),
    *("offer_due", "lease_due", "attempt_due", "stall_due", "total_due", "retry_due", "forget_due"),
)
"""The fields that the scripts load as numbers. Fences exceed Lua's exact integers and stay strings."""

NOT_LOADED: Final = (
    *("request", "response", "submitted_us", "ended_us"),
    *("failure_reason", "failure_message", "failure_type", "earlier_failures"),
)
"""The fields that a transition does not read."""

SNAPSHOT: Final = (
    *("state", "method", "attempt", "fence", "agent_id", "submitted_us", "ended_us", "traceparent", "revision"),
    *("failure_reason", "failure_message", "failure_type", "earlier_failures", "response"),
)
"""The fields of a task's snapshot, in the order in which `read` returns them."""

RECORD_FIELDS: Final[dict[str, str]] = {
    "task_id": "the task",
    "revision": "number of the transition among the task's, from 1",
    "kind": "kind of the `TaskEvent`",
    "method": "`package.Service/Method`",
    "attempt": "number of the attempt; 0 before the first",
    "fence": "fence of the attempt; 0 before the first",
    "agent_id": "agent of the attempt",
    "instance_id": "process of that agent",
    "traceparent": "span of the transition: the attempt's for events of an attempt, else the task's",
    "parent_id": "the span above",
    "time_us": "time of the transition, microseconds",
    "reason": "a number of `orki.errors.v1.Reason`, or 0",
    "text": "message, depending on the kind",
    "number": "size in bytes or time in milliseconds, depending on the kind",
    "actor": "requester of the transition, if there is one",
}
"""Fields of an outbox record, in the order in which they are written."""


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


class FleetKeys:
    """The keys of the fleet."""

    BASE = "orki:{of}:"
    LAYOUT = BASE + "layout"
    AGENTS = BASE + "agents"
    SERVICES = BASE + "services"
    REVISIONS = BASE + "revisions"

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
    """Return the Lua source that defines the names of this module for the scripts."""

    def array(names: tuple[str, ...] | dict[str, str]) -> str:
        return "{ " + ", ".join(f"'{name}'" for name in names) + " }"

    lines = [f"local {row.lua} = KEYS[1] .. '{row.suffix}'" for row in TABLE if row.lua]
    lines.append(f"local FIELDS = {array(tuple(name for name in TASK_FIELDS if name not in NOT_LOADED))}")
    lines.append(f"local NUMBERS = {{ {', '.join(f'{name} = true' for name in NUMBERS)} }}")
    lines.append(f"local SNAPSHOT = {array(SNAPSHOT)}")
    lines.append(f"local RECORD_FIELDS = {array(RECORD_FIELDS)}")
    return "\n".join(lines) + "\n"
