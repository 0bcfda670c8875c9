"""Lists tasks, page by page."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import TaskSnapshot
from orki_contract.errors import InvalidArgument, UnknownTask
from orki_server._keys import SNAPSHOT, ShardKeys
from orki_server._store.operations import shard_of
from orki_server._store.replies import task_snapshot
from orki_server._store.store import Store

_WITHOUT_RESPONSE: Final = tuple(name for name in SNAPSHOT if name != "response")
_SCAN: Final = 5_000
"""Maximum number of tasks that one page examines before it ends early."""


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
        task_snapshot(task_id, {name: value or b"" for name, value in zip(_WITHOUT_RESPONSE, values, strict=True)})
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
