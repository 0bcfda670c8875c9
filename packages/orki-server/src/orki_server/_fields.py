"""The fields of the store's records, and how the scripts read and write them.

Every field is defined here once, for Python, for the Lua scripts and for `docs/keys.md`; every key in `_keys.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

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
    "parent": "the task whose handler submitted it",
    "root": "the task at the top of its tree, if that is another one",
    "accounts": "tasks whose budgets it is charged to, the topmost first, separated by commas",
    "over_budget": "`1` while the task is suspended because a budget is used up",
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


def lua_fields() -> list[str]:
    """Return the Lua lines that define the names and functions of this module for the scripts."""

    def array(names: Iterable[str]) -> str:
        return "{ " + ", ".join(f"'{name}'" for name in names) + " }"

    return [
        *_lua_parser(),
        *(_lua_writer("state", STATE_FIELDS, "ABSENT"), _lua_writer("spec", SPEC_FIELDS, "")),
        f"local SNAPSHOT = {array(SNAPSHOT)}",
        f"local PLACEMENT_FIELDS = {array(PLACEMENT_FIELDS)}",
        f"local DEFAULT_PRIORITY, PRIORITY_STEP = {DEFAULT_PRIORITY}, {PRIORITY_STEP}",
        f"local MAX_LANES = {MAX_LANES}",
        f"local RECORD_FIELDS = {array(RECORD_FIELDS)}",
        f"local MAIL_FIELDS = {array(MAIL_FIELDS)}",
    ]


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
