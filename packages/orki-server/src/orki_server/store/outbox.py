"""The outbox: records of transitions, written with them, waiting to become events."""

from __future__ import annotations

from typing import NamedTuple

from orki_server.keys import ShardKeys
from orki_server.store.link import Link

__all__ = ["Outbox", "Record"]


class Record(NamedTuple):
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

    def __init__(self, link: Link, shards: int) -> None:
        self._link = link
        self._names = [ShardKeys(shard).out for shard in range(shards)]

    async def read(self, limit: int) -> list[list[Record]]:
        """The oldest records of each shard, up to `limit` of each.

        Raises:
            StoreUnavailable: The store is away.
        """
        replies = await self._link.calls([("XRANGE", name, "-", "+", "COUNT", limit) for name in self._names])
        return [[_record(entry, fields) for entry, fields in reply] for reply in replies]

    async def trim(self, published: list[list[Record]]) -> None:
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


def _record(entry: bytes, fields: list[bytes]) -> Record:
    # In the order in which `record` in shared.lua writes them, always.
    task, revision, kind, method, attempt, fence, agent, instance, span, parent, when, reason, words, number, actor = (
        fields[1::2]
    )
    return Record(
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
