"""Reading tasks: one with its progress, and pages of many."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2 import TaskSnapshot, WatchedProgress
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import InvalidArgument, UnknownTask
from orki_server._keys import ShardKeys
from orki_server._store.connection import StoreConnection
from orki_server._store.ids import shard_of
from orki_server._store.operations import Argument, Operation

TERMINAL: Final = frozenset(
    (TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED)
)
"""The states that never change."""

_FIELDS: Final = ("s", "m", "a", "f", "g", "r", "xc", "xm", "xt", "e", "su", "eu", "tp", "n")
_WITHOUT_RESPONSE: Final = tuple(field for field in _FIELDS if field != "r")
_SCAN: Final = 5_000
"""Most tasks that one page looks at before it ends early."""


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task at one moment.

    Attributes:
        task: Its snapshot.
        progress: What came after the cursor.
    """

    task: TaskSnapshot
    progress: tuple[WatchedProgress, ...]


@dataclass(frozen=True, slots=True)
class ReadTask(Operation[TaskView | None]):
    """Reads a task, with up to `limit` entries of progress after the cursor `after` ("": from the beginning).

    It goes the way of the transitions, and so shares their round trips. None: there is no such task.
    """

    op: ClassVar[str] = "look"
    patient: ClassVar[bool] = False
    task_id: str
    limit: int = 0
    after: str = ""

    def route(self) -> int:
        return shard_of(self.task_id)

    def arguments(self) -> Sequence[Argument]:
        return (self.task_id, self.limit, self.after)

    def outcome(self, reply: list[bytes]) -> TaskView | None:
        if not reply:
            return None
        width = len(_FIELDS)
        rows = (reply[at : at + 4] for at in range(width, len(reply), 4))
        progress = (
            WatchedProgress(cursor=cursor.decode(), attempt=int(attempt), index=int(index), payload=payload)
            for cursor, attempt, index, payload in rows
        )
        return TaskView(_snapshot(self.task_id, dict(zip(_FIELDS, reply[:width], strict=True))), tuple(progress))


def _snapshot(task_id: str, field: dict[str, bytes]) -> TaskSnapshot:
    state = TaskState.ValueType(int(field["s"]))
    snapshot = TaskSnapshot(
        task_id=task_id,
        method=field["m"].decode(),
        state=state,
        agent_id=field["g"].decode(),
        submitted_us=int(field["su"]),
        ended_us=int(field["eu"] or 0),
        traceparent=field["tp"].decode(),
        revision=int(field["n"]),
    )
    if int(field["a"]):
        snapshot.attempt.CopyFrom(AttemptRef(task_id=task_id, attempt=int(field["a"]), fence=int(field["f"])))
    if state == TaskState.TASK_STATE_SUCCEEDED:
        snapshot.response = field.get("r", b"")
    elif field["xc"]:
        snapshot.failure.CopyFrom(_failure(field["xc"], field["xt"], field["xm"]))
    for entry in field["e"].split(b"\x1e")[:-1]:
        snapshot.earlier_failures.append(_failure(*entry.split(b"\x1f", 2)))
    return snapshot


def _failure(reason: bytes, error_type: bytes, message: bytes) -> Failure:
    return Failure(
        reason=Reason.ValueType(int(reason)), message=message.decode(errors="replace"), error_type=error_type.decode()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Which tasks a list shows; what is empty does not restrict.

    Attributes:
        states: In one of these states.
        method: Of this method.
        agent_id: Whose current or last attempt this agent holds.
    """

    states: frozenset[TaskState.ValueType] = frozenset()
    method: str = ""
    agent_id: str = ""

    def admits(self, task: TaskSnapshot) -> bool:
        """Whether the task is shown."""
        return (
            (not self.states or task.state in self.states)
            and self.method in ("", task.method)
            and self.agent_id in ("", task.agent_id)
        )


async def list_tasks(
    link: StoreConnection, shards: int, which: TaskFilter, page_size: int, page_token: str
) -> tuple[list[TaskSnapshot], str]:
    """A page of tasks, newest first, without their responses, and the token of the next page ("": the last one).

    A page may be short, even empty, and still not be the last: who seeks a needle gets the haystack in pieces.

    Raises:
        InvalidArgument: The token is none of ours.
        StoreUnavailable: The store is away.
    """
    below, last_id = _read_token(page_token)
    found: list[TaskSnapshot] = []
    looked = 0
    while looked < _SCAN:
        window = await _newest(link, shards, below, last_id, page_size)
        if not window:
            return found, ""
        for (submitted_us, task_id), task in zip(window, await _read(link, window), strict=True):
            below, last_id = submitted_us, task_id
            if task is not None and which.admits(task):
                found.append(task)
                if len(found) == page_size:
                    return found, _token(below, last_id)
        looked += len(window)
    return found, _token(below, last_id)


async def _newest(link: StoreConnection, shards: int, below: int, last_id: str, count: int) -> list[tuple[int, str]]:
    """The next tasks by (time, id), falling, over all shards."""
    top = str(below) if below else "+inf"
    commands = [
        ("ZREVRANGEBYSCORE", ShardKeys(shard).index, top, "-inf", "WITHSCORES", "LIMIT", 0, count + 1)
        for shard in range(shards)
    ]
    rows = [
        (int(float(score)), task_id.decode())
        for reply in await link.calls(commands)
        for task_id, score in zip(reply[::2], reply[1::2], strict=True)
    ]
    rows.sort(reverse=True)
    # What lies at the token's very microsecond was shown up to the token's id.
    return [row for row in rows if not below or row < (below, last_id)][:count]


async def _read(link: StoreConnection, rows: list[tuple[int, str]]) -> list[TaskSnapshot | None]:
    replies = await link.calls(
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
        raise InvalidArgument("page_token: it is not one that List gave out; begin with an empty one") from error


class OutboxRecord(NamedTuple):
    """One transition of one task.

    Attributes:
        entry: Its place in the outbox.
        task_id: The task.
        revision: Number of the transition among the task's, from 1.
        kind: Name of the TaskEvent's kind.
        method: As `package.Service/Method`.
        attempt: Number of the attempt; 0 before the first.
        fence: Its fence; 0 before the first.
        agent_id: Who holds or held it.
        instance_id: That agent's process.
        traceparent: Of the span that it happened in: the attempt's for what happens to an attempt, else the task's.
        parent_id: The span above.
        time_us: When it happened, in microseconds since the Unix epoch.
        reason: A reason's number, or 0.
        text: Words that go with the kind.
        number: A number that goes with the kind: bytes, milliseconds.
        actor: Who asked for it, where somebody did.
    """

    entry: str
    task_id: str
    revision: int
    kind: str
    method: str
    attempt: int
    fence: int
    agent_id: str
    instance_id: str
    traceparent: str
    parent_id: str
    time_us: int
    reason: int
    text: str
    number: int
    actor: str


class Outbox:
    """The outboxes of all shards."""

    def __init__(self, link: StoreConnection, shards: int) -> None:
        self._link = link
        self._names = [ShardKeys(shard).out for shard in range(shards)]

    async def read(self, limit: int) -> list[list[OutboxRecord]]:
        """The oldest records of each shard, up to `limit` of each.

        Raises:
            StoreUnavailable: The store is away.
        """
        replies = await self._link.calls([("XRANGE", name, "-", "+", "COUNT", limit) for name in self._names])
        return [[_record(entry, fields) for entry, fields in reply] for reply in replies]

    async def trim(self, published: list[list[OutboxRecord]]) -> None:
        """Removes what was published: of each shard everything up to the last of these records.

        Another orchestrator may have published and removed the same; nobody removes what he has not published.

        Raises:
            StoreUnavailable: The store is away.
        """
        commands = [
            ("XTRIM", name, "MINID", "=", _after(records[-1].entry))
            for name, records in zip(self._names, published, strict=True)
            if records
        ]
        if commands:
            await self._link.calls(commands)

    async def length(self) -> int:
        """Number of records in all shards."""
        return sum(await self._link.calls([("XLEN", name) for name in self._names]))


def _after(entry: str) -> str:
    milliseconds, _, number = entry.partition("-")
    return f"{milliseconds}-{int(number) + 1}"


def _record(entry: bytes, fields: list[bytes]) -> OutboxRecord:
    # In the order in which `record` in shared.lua writes them, always.
    task, revision, kind, method, attempt, fence, agent, instance, span, parent, when, reason, words, number, actor = (
        fields[1::2]
    )
    return OutboxRecord(
        entry.decode(),
        task.decode(),
        int(revision),
        kind.decode(),
        method.decode(),
        int(attempt),
        int(fence),
        agent.decode(),
        instance.decode(),
        span.decode(),
        parent.decode(),
        int(when),
        int(reason),
        words.decode(errors="replace"),
        int(number),
        actor.decode(),
    )
