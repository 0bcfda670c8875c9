"""The operations and queries of submitters: submit, cancel, direct, read and list."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import TaskSnapshot, WatchedProgress
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import InvalidArgument, UnknownTask
from orki_contract.model import TaskMethod, milliseconds
from orki_contract.trace import Span
from orki_control.session import AttemptKey
from orki_server._keys import SNAPSHOT, ShardKeys
from orki_server._store.lifecycle import VISIBLE, Life
from orki_server._store.operations import shard_of
from orki_server._store.script import Call, Operation
from orki_server._store.store import Store

_WITHOUT_RESPONSE: Final = tuple(name for name in SNAPSHOT if name != "response")
_SCAN: Final = 5_000
"""Maximum number of tasks that one page examines before it ends early."""


def submission_digest(method: str, request: bytes) -> str:
    """Return the digest that compares submissions with the same idempotency key: 64 hex digits."""
    return hashlib.sha256(method.encode() + b"\0" + request).hexdigest()


@dataclass(frozen=True, slots=True)
class Submitted:
    """The outcome of a submission.

    Attributes:
        status: `new`, `same` (found by its key) or `conflict` (the key belongs to another request).
        task_id: The task, new or found.
        submitted_us: Time of submission of a new task, in microseconds since the Unix epoch.
    """

    status: str
    task_id: str
    submitted_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit(Operation[Submitted]):
    """Creates a task, or finds it by its idempotency key.

    Attributes:
        task_id: The new id. Its shard is that of the key, if there is one.
        method: Its method; timeouts and attempts are fixed from now on.
        request: The request message, serialized.
        digest: Digest of method and request, 64 hex digits.
        idempotency_key: The key, or empty.
        span: The task's span; its parent is the submitter's.
        actor: The submitter.
        contract: Digest of the service's contract; empty if unknown.
    """

    op: ClassVar[str] = "submit"
    patient: ClassVar[bool] = False
    task_id: str
    method: TaskMethod
    request: bytes
    digest: str
    idempotency_key: str
    span: Span
    actor: str
    contract: str = ""

    def call(self) -> Call:
        key = self.idempotency_key
        return shard_of(self.task_id), (
            self.task_id,
            self.method.full_name,
            self.request,
            _options(self.method),
            self.digest,
            hashlib.sha256(key.encode()).hexdigest() if key else "",
            key,
            self.span.traceparent,
            self.span.parent_id,
            self.actor,
            self.contract,
        )

    def outcome(self, reply: list[bytes]) -> Submitted:
        return Submitted(reply[0].decode(), reply[1].decode(), int(reply[2]))


def _options(method: TaskMethod) -> str:
    backoff = method.backoff
    numbers = (
        milliseconds(method.heartbeat_timeout),
        milliseconds(method.attempt_timeout),
        milliseconds(method.stall_timeout),
        milliseconds(method.total_timeout),
        method.max_attempts,
        milliseconds(backoff.initial),
        milliseconds(backoff.maximum),
        f"{backoff.multiplier:f}",
        milliseconds(method.cancel_grace),
    )
    return ",".join(map(str, numbers))


@dataclass(frozen=True, slots=True)
class TaskReply:
    """The outcome of a cancel or a directive.

    Attributes:
        status: `unknown`, `ended`; for cancels `done` (the task was not started), `requested`, `repeated`; for
            directives `idle` and `running`.
        state: The task's state.
        agent_id: Holder of the attempt.
        attempt: The current or last attempt.
        traceparent: Span of that attempt.
        cancel_grace: Cancel grace of the method.
    """

    status: str
    state: TaskState.ValueType
    agent_id: str
    attempt: AttemptKey
    traceparent: str
    cancel_grace: float

    @classmethod
    def read(cls, task_id: str, reply: list[bytes]) -> TaskReply:
        status, state, agent, attempt, fence, traceparent, grace = reply
        return cls(
            status.decode(),
            TaskState.ValueType(int(state)),
            agent.decode(),
            AttemptKey(task_id, int(attempt), int(fence)),
            traceparent.decode(),
            int(grace) / 1000,
        )


@dataclass(frozen=True, slots=True)
class Cancel(Operation[TaskReply]):
    """Requests the end of a task."""

    op: ClassVar[str] = "cancel"
    patient: ClassVar[bool] = False
    task_id: str
    message: str
    actor: str

    def call(self) -> Call:
        return shard_of(self.task_id), (self.task_id, self.message, self.actor)

    def outcome(self, reply: list[bytes]) -> TaskReply:
        return TaskReply.read(self.task_id, reply)


@dataclass(frozen=True, slots=True)
class Direct(Operation[TaskReply]):
    """Records a directive for a running attempt. When it is sent again, it is recorded again."""

    op: ClassVar[str] = "direct"
    patient: ClassVar[bool] = False
    attempt: AttemptKey
    size: int
    actor: str

    def call(self) -> Call:
        return shard_of(self.attempt.task_id), (self.attempt.task_id, self.size, self.actor, self.attempt.fence)

    def outcome(self, reply: list[bytes]) -> TaskReply:
        return TaskReply.read(self.attempt.task_id, reply)


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task at one moment.

    Attributes:
        task: Its snapshot.
        progress: Progress after the cursor.
    """

    task: TaskSnapshot
    progress: tuple[WatchedProgress, ...]


@dataclass(frozen=True, slots=True)
class ReadTask(Operation[TaskView | None]):
    """Reads a task, with at most `limit` entries of progress after the cursor `after` (empty: from the beginning).

    It changes nothing, but shares the round trips of the operations. The outcome is None if there is no such task.
    """

    op: ClassVar[str] = "read"
    patient: ClassVar[bool] = False
    task_id: str
    limit: int = 0
    after: str = ""

    def call(self) -> Call:
        return shard_of(self.task_id), (self.task_id, self.limit, self.after)

    def outcome(self, reply: list[bytes]) -> TaskView | None:
        if not reply:
            return None
        width = len(SNAPSHOT)
        rows = (reply[at : at + 4] for at in range(width, len(reply), 4))
        progress = (
            WatchedProgress(cursor=cursor.decode(), attempt=int(attempt), index=int(index), payload=payload)
            for cursor, attempt, index, payload in rows
        )
        return TaskView(_snapshot(self.task_id, dict(zip(SNAPSHOT, reply[:width], strict=True))), tuple(progress))


def _snapshot(task_id: str, field: Mapping[str, bytes]) -> TaskSnapshot:
    state = VISIBLE[Life[field["state"].decode()]]
    snapshot = TaskSnapshot(
        task_id=task_id,
        method=field["method"].decode(),
        state=state,
        agent_id=field["agent_id"].decode(),
        submitted_us=int(field["submitted_us"]),
        ended_us=int(field["ended_us"] or 0),
        traceparent=field["traceparent"].decode(),
        revision=int(field["revision"]),
    )
    if attempt := int(field["attempt"] or 0):
        snapshot.attempt.CopyFrom(AttemptRef(task_id=task_id, attempt=attempt, fence=int(field["fence"])))
    if state == TaskState.TASK_STATE_SUCCEEDED:
        snapshot.response = field.get("response", b"")
    elif field["failure_reason"]:
        failure = _failure(field["failure_reason"], field["failure_type"], field["failure_message"])
        snapshot.failure.CopyFrom(failure)
    for entry in field["earlier_failures"].split(b"\x1e")[:-1]:
        snapshot.earlier_failures.append(_failure(*entry.split(b"\x1f", 2)))
    return snapshot


def _failure(reason: bytes, error_type: bytes, message: bytes) -> Failure:
    return Failure(
        reason=Reason.ValueType(int(reason)), message=message.decode(errors="replace"), error_type=error_type.decode()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Selects the tasks of a list. An empty field does not restrict it.

    Attributes:
        states: The states.
        method: The method.
        agent_id: Agent of the current or last attempt.
    """

    states: frozenset[TaskState.ValueType] = frozenset()
    method: str = ""
    agent_id: str = ""

    def admits(self, task: TaskSnapshot) -> bool:
        return (
            (not self.states or task.state in self.states)
            and self.method in ("", task.method)
            and self.agent_id in ("", task.agent_id)
        )


async def list_tasks(
    store: Store, which: TaskFilter, page_size: int, page_token: str
) -> tuple[list[TaskSnapshot], str]:
    """Return a page of tasks, newest first and without responses, and the token of the next page (empty: none).

    A page may have fewer tasks than `page_size`, or none, and not be the last: the number of examined tasks is limited.

    Raises:
        InvalidArgument: The token is not one that this function returned.
        StoreUnavailable: The store is down.
    """
    below, last_id = _read_token(page_token)
    found: list[TaskSnapshot] = []
    examined = 0
    while examined < _SCAN:
        window = await _newest(store, below, last_id, page_size)
        if not window:
            return found, ""
        for (submitted_us, task_id), task in zip(window, await _read(store, window), strict=True):
            below, last_id = submitted_us, task_id
            if task is not None and which.admits(task):
                found.append(task)
                if len(found) == page_size:
                    return found, _token(below, last_id)
        examined += len(window)
    return found, _token(below, last_id)


async def _newest(store: Store, below: int, last_id: str, count: int) -> list[tuple[int, str]]:
    top = str(below) if below else "+inf"
    commands = [
        ("ZREVRANGEBYSCORE", ShardKeys(shard).index, top, "-inf", "WITHSCORES", "LIMIT", 0, count + 1)
        for shard in range(store.shards)
    ]
    rows = [
        (int(float(score)), task_id.decode())
        for reply in await store.connection.calls(commands)
        for task_id, score in zip(reply[::2], reply[1::2], strict=True)
    ]
    rows.sort(reverse=True)
    # Earlier pages showed the tasks of the token's microsecond up to the token's id.
    return [row for row in rows if not below or row < (below, last_id)][:count]


async def _read(store: Store, rows: list[tuple[int, str]]) -> list[TaskSnapshot | None]:
    replies = await store.connection.calls(
        [("HMGET", ShardKeys(shard_of(task_id)).task(task_id), *_WITHOUT_RESPONSE) for _, task_id in rows]
    )
    return [
        _snapshot(task_id, {name: value or b"" for name, value in zip(_WITHOUT_RESPONSE, values, strict=True)})
        if values[0] is not None
        else None
        for (_, task_id), values in zip(rows, replies, strict=True)
    ]


def _token(submitted_us: int, task_id: str) -> str:
    return base64.urlsafe_b64encode(f"{submitted_us} {task_id}".encode()).decode()


def _read_token(token: str) -> tuple[int, str]:
    if not token:
        return 0, ""
    try:
        submitted, task_id = base64.urlsafe_b64decode(token.encode()).decode().split(" ")
        shard_of(task_id)
        return int(submitted), task_id
    except (ValueError, binascii.Error, UnknownTask) as error:
        raise InvalidArgument("page_token: List did not return this token; begin with an empty one") from error
