"""The schema of the store: Redis keys and their fields.

Every key and field name is defined here once, for Python, for the Lua scripts and for `docs/keys.md`. The keys of one
shard share the hash tag `{oN}`, so that an operation touches one slot; the fleet's keys share `{of}`. Keys that do not
begin with `orki:{` belong to the event plane and are not part of this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

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

TASK_FIELDS: Final[dict[str, str]] = {
    "state": "the fields that transitions change, packed; see below",
    "spec": "the fields that never change, packed; see below",
    "placement": "when the task may run, packed; only where the submission says so; see below",
    "request": "the request message, serialized",
    "response": "the response message, serialized",
    "failure": "reason, error type and message of the final failure, separated by US",
    "failures": "failures of earlier attempts, each as `failure` and ended by RS",
    "more": "the values that few tasks have, named; see below",
    "checkpoint": "fence, number within the attempt, and payload of the last checkpoint, separated by spaces",
    "answer": "the answer to the last suspension, serialized",
}
"""Fields of a task's hash. Only `state` and `spec` are always there."""

STATE_FIELDS: Final[dict[str, str]] = {
    "state": "state of the task's life",
    "revision": "number of transitions",
    "attempt": "number of the current or last attempt",
    "fence": "fence of that attempt",
    "agent_id": "agent of that attempt",
    "instance_id": "process of that agent",
    "host": "orchestrator that heard the agent last",
    "absent": "for how long that orchestrator had been absent then, milliseconds",
    "excused": "`1` when a timer of the attempt was moved because nobody could hear the agent",
    "progress_index": "index of the attempt's last progress",
    "progress_number": "number of deltas over all attempts, with those that are missing",
    "cancel_acknowledged": "`1` when the agent has acknowledged the cancel",
    "suspected": "`1` when the session of the offer has ended without an answer",
    "started": "number of attempts that were started and count",
    "abandoned": "number of attempts that ended without a failure of the agent",
    "refused_offers": "number of offers in a row that no agent accepted",
    "result_fence": "fence of the last accepted result",
    "result_agent": "agent of the last accepted result",
    "queued_us": "time of the last queueing by the shard's clock, microseconds",
    "ended_us": "time of the end, microseconds",
    "timer": "the task's score in the sorted set of timers",
    "offer_due": "time when the offer expires, milliseconds",
    "lease_due": "time when the lease expires, milliseconds",
    "attempt_due": "time when the attempt times out, milliseconds",
    "stall_due": "time when the attempt counts as stalled, milliseconds",
    "total_due": "time when the task times out, milliseconds",
    "retry_due": "time when a waiting task is queued again, milliseconds",
    "forget_due": "time when a finished task is removed, milliseconds",
}
"""The packed fields of `state`, in their order. Numbers of 0 are empty. The `_due` times are of the shard's clock."""

SPEC_FIELDS: Final[dict[str, str]] = {
    "method": "`package.Service/Method`",
    "options": "timeouts, attempts and back-off of the method at submission",
    "contract": "digest of the contract at submission",
    "idempotency": "SHA-256 of the idempotency key; empty without one",
    "submitted_us": "time of submission, microseconds",
    "traceparent": "the task's span",
    "parent_id": "the span above the task's",
}
"""The packed fields of `spec`, in their order."""

MORE_FIELDS: Final[dict[str, str]] = {
    "checkpoint": "`1` if the task has a checkpoint",
    "suspension": "number of suspensions",
    "question": "what the last suspension asks",
    "suspended_us": "time of the last suspension, microseconds",
    "deadline": "time after which it ends without an answer, milliseconds; 0 for never",
    "answered": "SHA-1 of the answer, if it was answered",
    "overdue": "`1` if it ended without an answer",
    "children": "`1` if the task has children that end with it",
    "total_left": "rest of the total timeout while the task is suspended, milliseconds",
}
"""The named values of `more`: each as `NAME=VALUE`. Orchestrators keep the values that they do not know."""

PLACEMENT_FIELDS: Final[dict[str, str]] = {
    "priority": "from 0 to 9",
    "start_us": "earliest start by the server's clock, microseconds; 0 for at once",
    "labels": "labels that the agent must have, as `name=value`, sorted, separated by commas",
    "limits": "keys of limits, sorted, separated by commas",
    "fairness_key": "the key whose tasks take turns with those of others",
}
"""The packed fields of `placement`, in their order. Later versions may add fields at the end."""

DEFAULT_PRIORITY: Final = 5
PRIORITY_STEP: Final = 3600
"""Seconds of waiting that are worth as much as one priority. So no task waits forever."""

MAX_LANES: Final = 1000
"""Maximum number of lanes of a shard."""

NUMBERS: Final = (
    *("revision", "attempt", "absent", "progress_index", "progress_number", "started", "abandoned", "refused_offers"),
    *("queued_us", "ended_us", "submitted_us", "timer"),
    *("offer_due", "lease_due", "attempt_due", "stall_due", "total_due", "retry_due", "forget_due"),
)
"""The packed fields that are numbers. Fences exceed Lua's exact integers and stay strings."""

SNAPSHOT: Final = ("state", "spec", "failure", "failures", "placement", "more", "response")
"""The fields of a task's snapshot, in the order in which `read` returns them."""


def pack(fields: Mapping[str, str | int]) -> str:
    """Return packed fields: their values, separated by US."""
    return "\x1f".join("" if name in NUMBERS and not int(value or 0) else str(value) for name, value in fields.items())


def unpack(names: Iterable[str], text: bytes) -> dict[str, str]:
    """Return packed fields by name; numbers of 0 as "0".

    Raises:
        ValueError: The text does not hold these fields: it is damaged.
    """
    fields = dict(zip(names, text.decode().split("\x1f"), strict=True))
    for name in fields.keys() & set(NUMBERS):
        fields[name] = str(int(fields[name] or 0))
    return fields


def unpack_more(text: bytes) -> dict[str, str]:
    """Return the named values of `more`."""
    pairs = (value.partition("=") for value in text.decode(errors="replace").split("\x1f"))
    return {name: value for name, separator, value in pairs if separator}


RECORD_FIELDS: Final[dict[str, str]] = {
    "task_id": "the task",
    "revision": "position of this transition among the task's transitions, from 1",
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
"""Fields of an outbox record, in their order, separated by US."""


MAIL_FIELDS: Final[dict[str, str]] = {
    "kind": "`cancel`, `direct`, or `answer` to a directive",
    "task_id": "the task",
    "attempt": "number of the attempt",
    "fence": "fence of the attempt",
    "agent_id": "agent of the attempt",
    "method": "`package.Service/Method`",
    "sender": "orchestrator that sent it",
    "number": "of a cancel, its grace in milliseconds; else the sender's number of the directive",
    "reason": "of an answer, a number of `orki.errors.v1.Reason`; 0 if the handler gets the directive",
    "text": "of a cancel and an answer, the message; of a directive, its requester",
    "payload": "the directive message, serialized",
}
"""Fields of an entry of a mailbox, in their order."""


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
    """Return the Lua source that defines the names of this module for the scripts."""

    def array(names: Iterable[str]) -> str:
        return "{ " + ", ".join(f"'{name}'" for name in names) + " }"

    lines = ["local redis, string, table, math, tonumber, ipairs, pairs, pcall, unpack, error = "]
    lines[0] += lines[0].removeprefix("local ").removesuffix(" = ")
    lines.append("local NOTHING = {}")
    lines += [f"local {row.lua} = KEYS[1] .. '{row.suffix}'" for row in TABLE if row.lua]
    # A key that never exists.
    lines.append("local PROBE = KEYS[1] .. 'probe'")
    lines += _lua_parser()
    lines += [_lua_writer("state", STATE_FIELDS, "ABSENT"), _lua_writer("spec", SPEC_FIELDS, "")]
    lines.append(f"local SNAPSHOT = {array(SNAPSHOT)}")
    lines.append(f"local PLACEMENT_FIELDS = {array(PLACEMENT_FIELDS)}")
    lines.append(f"local DEFAULT_PRIORITY, PRIORITY_STEP = {DEFAULT_PRIORITY}, {PRIORITY_STEP}")
    lines.append(f"local MAX_LANES = {MAX_LANES}")
    lines.append(f"local RECORD_FIELDS = {array(RECORD_FIELDS)}")
    lines.append(f"local MAIL_FIELDS = {array(MAIL_FIELDS)}")
    return "\n".join(lines) + "\n"


def _lua_parser() -> list[str]:
    """Return the Lua function `parse(id, state, spec)`: the task, or nil if one of the texts is damaged.

    The functions of this module are written out field by field, because they are a good part of a transition's time.
    One constructor makes the table in its final size.
    """
    values = {name: f"v{number}" for number, name in enumerate([*STATE_FIELDS, *SPEC_FIELDS])}
    numbers = [values[name] for name in values if name in NUMBERS]
    lines = ["local function parse(id, state, spec)"]
    for text, fields in (("state", STATE_FIELDS), ("spec", SPEC_FIELDS)):
        names = [values[name] for name in fields]
        pattern = "\\31".join(["([^\\31]*)"] * len(names))
        lines.append(f"  local {', '.join(names)} = string.match({text}, '^{pattern}$')")
        lines.append(f"  if not {names[0]} then return nil end")
    lines += [f"  {each} = {each} == '' and 0 or tonumber({each}) or -1" for each in numbers]
    lines.append(f"  if math.min({', '.join(numbers)}) < 0 or not ({' + '.join(numbers)} < 1e17) then return nil end")
    fields_of_script = (
        "id = id, text = state, spec = spec, more_text = '', fields = NOTHING, touched = false, dirty = false"
    )
    lines.append("  return {")
    lines.append(
        f"    {fields_of_script}, staged_fields = NOTHING, shown = false, next_text = '', span = '', span_of = -1,"
    )
    lines.append("    placement = false, place = false,")
    lines += [f"    {name} = {value}," for name, value in values.items()]
    return [*lines, "  }", "end"]


def _lua_writer(name: str, fields: Mapping[str, str], first: str) -> str:
    """Return the Lua function `write_NAME(task)`, the packed fields, and the constant NEW_NAME, those of a new task."""

    def packed(each: str) -> str:
        # Lua writes numbers with 14 digits.
        text = f"string.format('%.0f', task.{each})" if each.endswith("_us") else f"task.{each}"
        return f"task.{each} == 0 and '' or {text}" if each in NUMBERS else f"task.{each}"

    separators = "\\31" * (len(fields) - 1)
    lines = [
        f"local function write_{name}(task)",
        f"  return table.concat({{ {', '.join(map(packed, fields))} }}, '\\31')",
        "end",
        f"local NEW_{name.upper()} = '{first}{separators}'",
    ]
    return "\n".join(lines)
