"""Task ids, and the operations of the script: their arguments and their decoded replies."""

from __future__ import annotations

import hashlib
import os
import re
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, Generic, TypeAlias, TypeVar

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import UnknownTask
from orki_contract.model import TaskMethod, milliseconds
from orki_contract.trace import Span
from orki_control.session import AttemptKey
from orki_server._store.placement import ANYWHERE, Placement
from orki_server._store.replies import (
    BULK_BYTES,
    ProgressReply,
    Renewed,
    ReportReply,
    TaskReply,
    TaskView,
    progress_reply,
    report_reply,
    task_reply,
    task_view,
)

R = TypeVar("R")
Argument: TypeAlias = bytes | str | int

_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TASK_ID: Final = re.compile(rf"t(0|[1-9][0-9]{{0,3}})-[{_DIGITS}]{{26}}")

MAX_OFFERS: Final = 256
"""Maximum number of tasks that one operation assigns."""
_FAILURE_TEXT: Final = 4_000
"""Maximum length of a stored failure text, in characters."""


def new_task_id(shard: int) -> str:
    """Return a new id for a task of a shard.

    The id is `t<shard>-` and 26 characters that sort by time: 48 bits of milliseconds, then 80 random bits.
    """
    return known_task_id(shard, int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10)))


def known_task_id(shard: int, number: int) -> str:
    """Return the id of a task of a shard whose 128 bits are given."""
    return f"t{shard}-" + "".join([_DIGITS[number >> shift & 31] for shift in range(125, -1, -5)])


def shard_of(task_id: str) -> int:
    """Return the shard that a task id names.

    Raises:
        UnknownTask: The text is not a task id.
    """
    matched = _TASK_ID.fullmatch(task_id)
    if not matched:
        raise UnknownTask(f"there is no task {task_id[:64]!r}")
    return int(matched[1])


def shard_of_key(idempotency_key: str, shards: int) -> int:
    """Return the shard of an idempotency key, which is also the shard of its task."""
    return zlib.crc32(idempotency_key.encode()) % shards


def failure_text(text: str) -> str:
    """Return a failure's text as it is stored: bounded, without the characters that separate failures."""
    return text[:_FAILURE_TEXT].replace("\x1e", " ").replace("\x1f", " ")


@dataclass(frozen=True, slots=True)
class Operation(Generic[R]):
    """One atomic operation of the script. Each may be sent again when its reply was lost.

    Attributes:
        op: Name of the operation in the script.
        shard: The shard.
        arguments: Arguments for the script.
        outcome: Decodes the script's reply.
        patient: Whether it waits in memory while the store is down. Reports of agents do; requests of submitters fail.
    """

    op: str
    shard: int
    arguments: Sequence[Argument]
    outcome: Callable[[list[bytes]], R]
    patient: bool = True


def submission_digest(method: str, request: bytes) -> str:
    """Return the digest that compares submissions with the same idempotency key: 64 hex digits."""
    return hashlib.sha256(method.encode() + b"\0" + request).hexdigest()


@dataclass(frozen=True, slots=True)
class Submitted:
    """The outcome of a submission.

    Attributes:
        status: `new`, `same` (found by its key), `conflict` (the key belongs to another request) or `lanes` (the queues
            have their maximum number of lanes).
        task_id: The task, new or found.
        submitted_us: Time of submission of a new task, in microseconds since the Unix epoch.
    """

    status: str
    task_id: str
    submitted_us: int


NO_LINEAGE: Final = ("", "", "", "")
"""Where most tasks stand in their tree: at the top, without a budget."""


def submit(
    *,
    task_id: str,
    method: TaskMethod,
    request: bytes,
    digest: str,
    idempotency_key: str,
    span: Span,
    actor: str,
    contract: str = "",
    placement: Placement = ANYWHERE,
    lineage: Sequence[str] = NO_LINEAGE,
) -> Operation[Submitted]:
    """Create a task, or find it by its idempotency key.

    Args:
        task_id: The new id. Its shard is that of the key, if there is one.
        method: Its method; timeouts and attempts are fixed from now on.
        request: The request message, serialized.
        digest: The `submission_digest`.
        idempotency_key: The key, or empty.
        span: The task's span; its parent is the submitter's.
        actor: The submitter.
        contract: Digest of the service's contract; empty if unknown.
        placement: When the task may run.
        lineage: The task whose handler submits it, the root of its tree, the tasks to whose budgets the parent is
            charged, separated by commas, and its own budget, packed; each empty for none.
    """
    # On its shard, a key of counted tasks must not meet the same key of other tasks, whose shard depends on the key.
    scope = "counted\0" if placement.is_counted else ""
    key_digest = hashlib.sha256((scope + idempotency_key).encode()).hexdigest() if idempotency_key else ""
    arguments = (
        *(task_id, method.full_name, request, _options(method), digest, key_digest, idempotency_key),
        *(span.traceparent, span.parent_id, actor, contract, *placement.arguments, *lineage),
    )

    def outcome(reply: list[bytes]) -> Submitted:
        return Submitted(reply[0].decode(), reply[1].decode(), int(reply[2]))

    return Operation("submit", shard_of(task_id), arguments, outcome, patient=False)


@lru_cache(maxsize=1024)
def _options(method: TaskMethod) -> str:
    backoff = method.backoff
    timeouts = (method.heartbeat_timeout, method.attempt_timeout, method.stall_timeout, method.total_timeout)
    numbers = (
        *map(milliseconds, timeouts),
        method.max_attempts,
        *map(milliseconds, (backoff.initial, backoff.maximum)),
        f"{backoff.multiplier:f}",
        milliseconds(method.cancel_grace),
    )
    return ",".join(map(str, numbers))


def cancel(task_id: str, message: str, actor: str) -> Operation[TaskReply]:
    """Request the end of a task."""
    arguments = (task_id, message, actor)
    return Operation("cancel", shard_of(task_id), arguments, partial(task_reply, task_id), patient=False)


def direct(attempt: AttemptKey, size: int, actor: str) -> Operation[TaskReply]:
    """Record a directive for a running attempt. When it is sent again, it is recorded again."""
    task_id = attempt.task_id
    arguments = (task_id, size, actor, attempt.fence)
    return Operation("direct", shard_of(task_id), arguments, partial(task_reply, task_id), patient=False)


def read_task(task_id: str, limit: int = 0, after: str = "") -> Operation[TaskView | None]:
    """Read a task, with at most `limit` entries of progress after the cursor `after` (empty: from the beginning).

    The operation writes nothing; it shares the round trips of those that do. The outcome is None without such a task.
    """
    outcome = partial(task_view, task_id)
    return Operation("read", shard_of(task_id), (task_id, limit, after, BULK_BYTES), outcome, patient=False)


def _report(op: str, agent_id: str, attempt: AttemptKey, *details: Argument) -> Operation[ReportReply]:
    task_id = attempt.task_id
    return Operation(op, shard_of(task_id), (task_id, attempt.fence, agent_id, *details), report_reply)


def accept(agent_id: str, attempt: AttemptKey) -> Operation[ReportReply]:
    """Accept an offer. Lease and attempt timeout begin."""
    return _report("accept", agent_id, attempt)


def decline(
    agent_id: str, attempt: AttemptKey, reason: Reason.ValueType, message: str, at_once: bool
) -> Operation[ReportReply]:
    """Return an offer."""
    return _report("decline", agent_id, attempt, reason, message, int(at_once))


def suspect(agent_id: str, attempt: AttemptKey) -> Operation[ReportReply]:
    """Note that the session of a delivered offer ended without an answer.

    The agent has the time of a lease to come back with the attempt. Otherwise the attempt counts, as it may have run.
    """
    return _report("suspect", agent_id, attempt)


def lose(agent_id: str, attempt: AttemptKey, message: str) -> Operation[ReportReply]:
    """End a delivered offer whose process is gone. It counts as an attempt, as it may have run."""
    return _report("lose", agent_id, attempt, message)


def report_progress(
    agent_id: str,
    attempt: AttemptKey,
    kept: int,
    index: int,
    payload: bytes,
    missing: int = 0,
    dropped: bool = False,
) -> Operation[ProgressReply]:
    """Report progress of an attempt.

    An index that was reported before changes nothing. An index that does not follow the last one is refused with `GAP`
    unless at most `missing` deltas are between them; then the gap is stored.

    Args:
        agent_id: The agent.
        attempt: The attempt.
        kept: Approximate number of entries that the task keeps.
        index: Number of the delta within the attempt, from 1.
        payload: The progress message, serialized.
        missing: Number of deltas directly before it that may be missing.
        dropped: Whether the delta itself is missing.
    """
    task_id = attempt.task_id
    arguments = (task_id, attempt.fence, agent_id, kept, index, payload, missing, int(dropped))
    return Operation("progress", shard_of(task_id), arguments, progress_reply)


def succeed(agent_id: str, attempt: AttemptKey, response: bytes) -> Operation[ReportReply]:
    """End an attempt with a response."""
    return _report("succeed", agent_id, attempt, response)


def fail(
    agent_id: str, attempt: AttemptKey, reason: Reason.ValueType, message: str, error_type: str, retryable: bool
) -> Operation[ReportReply]:
    """End an attempt with a failure."""
    return _report("fail", agent_id, attempt, reason, message, error_type, int(retryable))


def confirm_cancelled(agent_id: str, attempt: AttemptKey, reason: Reason.ValueType) -> Operation[ReportReply]:
    """End an attempt as cancelled."""
    return _report("cancelled", agent_id, attempt, reason)


def acknowledge_cancel(agent_id: str, attempt: AttemptKey) -> Operation[ReportReply]:
    """Record that the agent received the cancel."""
    return _report("acknowledge_cancel", agent_id, attempt)


def renew(shard: int, agent_id: str, attempts: Sequence[AttemptKey]) -> Operation[Renewed]:
    """Renew the leases of an agent's attempts on one shard.

    It does not wait while the store is down: the agent may have given up the attempts when it is back.
    """

    def outcome(reply: list[bytes]) -> Renewed:
        rest = 1 + int(reply[0])
        cancelling = zip(reply[rest::2], reply[rest + 1 :: 2], strict=True)
        return Renewed(
            tuple(attempts[int(each)] for each in reply[1:rest]),
            tuple((attempts[int(each)], int(grace) / 1000) for each, grace in cancelling),
        )

    return Operation("renew", shard, _held(agent_id, attempts), outcome, patient=False)


def _held(agent_id: str, attempts: Sequence[AttemptKey]) -> list[Argument]:
    return [agent_id, *(argument for each in attempts for argument in (each.task_id, each.fence))]


@dataclass(frozen=True, slots=True)
class ResumedAttempt:
    """An attempt that an agent brings to a new session and keeps.

    Attributes:
        attempt: The attempt.
        traceparent: Its span.
        state: The task's state.
        cancel_grace: Cancel grace of its method.
    """

    attempt: AttemptKey
    traceparent: str
    state: TaskState.ValueType
    cancel_grace: float


def resume(shard: int, agent_id: str, attempts: Sequence[AttemptKey]) -> Operation[list[ResumedAttempt]]:
    """Renew the attempts of a returning agent on one shard. The outcome lists those that it still holds."""

    def outcome(reply: list[bytes]) -> list[ResumedAttempt]:
        rows = zip(attempts, reply[::3], reply[1::3], reply[2::3], strict=True)
        return [
            ResumedAttempt(attempt, traceparent.decode(), TaskState.ValueType(int(state)), int(grace) / 1000)
            for attempt, traceparent, state, grace in rows
            if traceparent
        ]

    return Operation("resume", shard, _held(agent_id, attempts), outcome, patient=False)


@dataclass(frozen=True, slots=True)
class Recipient:
    """An agent with free slots.

    Attributes:
        agent_id: The agent.
        instance_id: Its process.
        slots: Number of tasks that it takes.
        methods: Methods that it serves, as `package.Service/Method`.
        labels: Its labels, as `name=value`.
    """

    agent_id: str
    instance_id: str
    slots: int
    methods: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OfferedAttempt:
    """A task that was assigned to an agent.

    Attributes:
        recipient: Position of the recipient in the operation.
        attempt: The attempt.
        method: Its method, as `package.Service/Method`.
        request: The request message, serialized.
        traceparent: Span of the attempt.
        lease: Time for which the attempt survives without a heartbeat.
        attempt_timeout: Maximum time of the attempt.
        checkpoint: The task's last checkpoint; None without one.
        answer: Answer to the task's last suspension; None without one.
        answer_overdue: Whether that suspension ended without an answer.
        accounts: The tasks to whose budgets it is charged, the topmost first.
    """

    recipient: int
    attempt: AttemptKey
    method: str
    request: bytes
    traceparent: str
    lease: float
    attempt_timeout: float
    checkpoint: bytes | None = None
    answer: bytes | None = None
    answer_overdue: bool = False
    accounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Assigned:
    """The outcome of an offer.

    Attributes:
        offers: The tasks that were assigned.
        damaged: Tasks and queues that cannot be read and were left out.
        again: Set if tasks are left that other agents or limits keep waiting: the time after which a limit admits one,
            or 0 if that depends on agents.
    """

    offers: tuple[OfferedAttempt, ...]
    damaged: tuple[str, ...] = ()
    again: float | None = None


def offer(shard: int, accept_timeout: float, recipients: Sequence[Recipient]) -> Operation[Assigned]:
    """Assign queued tasks of one shard to recipients, one to each in turn, at most `MAX_OFFERS`.

    When it is sent again, it assigns *more* tasks: a lost reply costs an accept timeout, but no attempt.
    """
    flat: list[Argument] = [round(accept_timeout * 1000)]
    for each in recipients:
        flat += (each.agent_id, each.instance_id, each.slots, len(each.methods), len(each.labels))
        flat += (*each.methods, *each.labels)
    return Operation("offer", shard, flat, _assigned, patient=False)


def damaged_of(reply: list[bytes], at: int) -> tuple[str, ...]:
    """Return the names that follow their number at a position."""
    return tuple(each.decode(errors="replace") for each in reply[at + 1 : at + 1 + int(reply[at])])


def _assigned(reply: list[bytes]) -> Assigned:
    damaged = damaged_of(reply, 1)
    rows = (reply[at : at + 12] for at in range(2 + len(damaged), len(reply), 12))
    offers = (
        OfferedAttempt(
            int(recipient),
            AttemptKey(task.decode(), int(attempt), int(fence)),
            method.decode(),
            request,
            traceparent.decode(),
            int(lease) / 1000,
            int(timeout) / 1000,
            kept[1:] if kept else None,
            answered[1:] if answered[:1] == b"1" else None,
            answered == b"0",
            tuple(paid.decode().split(",")) if paid else (),
        )
        for recipient, task, attempt, fence, method, request, traceparent, lease, timeout, kept, answered, paid in rows
    )
    return Assigned(tuple(offers), damaged, int(reply[0]) / 1000 if int(reply[0]) >= 0 else None)
