"""Lists tasks, page by page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki.control.v1.task_pb2 import TaskSnapshot
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import DamagedRecord, InvalidArgument, OrkiError, UnknownTask
from orki_events.connection import Reply
from orki_server._fields import SNAPSHOT
from orki_server._keys import ShardKeys
from orki_server._store.operations import shard_of
from orki_server._store.replies import task_snapshot
from orki_server._store.store import Store

_WITHOUT_RESPONSE: Final = tuple(name for name in SNAPSHOT if name != "response")
_WINDOW: Final = 256
"""Minimum number of index entries that are read at once."""
_SCAN: Final = 5_000
"""Maximum number of tasks that one page examines before it ends early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFilter:
    """Selects the tasks of a list. An empty field does not restrict it.

    Attributes:
        states: The states.
        method: The method.
        agent_id: Agent of the current or last attempt.
        labels: Labels that the task asks for.
    """

    states: frozenset[TaskState.ValueType] = frozenset()
    method: str = ""
    agent_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def admits(self, task: TaskSnapshot) -> bool:
        return (
            (not self.states or task.state in self.states)
            and self.method in ("", task.method)
            and self.agent_id in ("", task.agent_id)
            and all(task.labels.get(name) == value for name, value in self.labels.items())
        )


async def list_tasks(
    store: Store, which: TaskFilter, page_size: int, page_token: str
) -> tuple[list[TaskSnapshot], str]:
    """Return a page of tasks, newest first and without responses, and the token of the next page (empty: none).

    A page may have fewer tasks than `page_size`, or none, and not be the last: the number of examined tasks is limited.

    A task whose record is damaged has no state, and a failure that says so; only a list without a filter shows it.

    Raises:
        InvalidArgument: The token is not one that this function returned.
        DamagedRecord: The list of a shard's tasks cannot be read.
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
    """Return the newest tasks before a position: time of submission and id, which are a total order."""
    top = str(below) if below else "+inf"
    found: dict[int, list[tuple[int, str]]] = {shard: [] for shard in range(store.shards)}
    size = max(count + 1, _WINDOW)
    unread, offset = list(found), 0
    # Many tasks may share the position's microsecond, and those up to the position are skipped here.
    while unread:
        replies = await store.connection.replies(
            [
                ("ZREVRANGEBYSCORE", ShardKeys(shard).index, top, "-inf", "WITHSCORES", "LIMIT", offset, size)
                for shard in unread
            ]
        )
        for shard, reply in zip(list(unread), replies, strict=True):
            if isinstance(reply, OrkiError):
                raise DamagedRecord(f"the list of tasks of shard {shard} cannot be read: {reply.message}")
            rows = [(int(float(score)), each.decode()) for each, score in zip(reply[::2], reply[1::2], strict=True)]
            found[shard] += [row for row in rows if not below or row < (below, last_id)]
            if len(rows) < size or len(found[shard]) >= count:
                unread.remove(shard)
        offset += size
    return sorted((row for rows in found.values() for row in rows), reverse=True)[:count]


async def _read(store: Store, rows: list[tuple[int, str]]) -> list[TaskSnapshot | None]:
    replies = await store.connection.replies(
        [("HMGET", ShardKeys(shard_of(task_id)).task(task_id), *_WITHOUT_RESPONSE) for _, task_id in rows]
    )
    return [_snapshot(*row, values) for row, values in zip(rows, replies, strict=True)]


def _snapshot(submitted_us: int, task_id: str, values: Reply) -> TaskSnapshot | None:
    """Return a task's snapshot; one with a failure and without a state if its record is damaged."""
    if not isinstance(values, OrkiError) and values[0] is None and values[1] is None:
        return None
    try:
        if isinstance(values, OrkiError):
            raise ValueError(values.message)
        return task_snapshot(task_id, dict(zip(_WITHOUT_RESPONSE, (value or b"" for value in values), strict=True)))
    except (ValueError, KeyError) as error:
        failure = Failure(reason=Reason.REASON_DAMAGED_RECORD, message=f"the record cannot be read: {error}")
        return TaskSnapshot(task_id=task_id, submitted_us=submitted_us, failure=failure)


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
