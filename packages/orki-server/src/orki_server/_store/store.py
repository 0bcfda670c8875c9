"""The store as the rest of the server sees it: the lane of transitions, tasks, fleet and outbox over one link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from orki.control.v1.task_pb2 import TaskSnapshot
from orki_control.session import AttemptKey
from orki_server._store.connection import Batcher, StoreConnection
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import Fleet
from orki_server._store.ids import shard_of
from orki_server._store.operations import Offer, OfferedAttempt, Operation, RaiseEpoch
from orki_server._store.queries import Outbox, TaskFilter, list_tasks
from orki_server._store.scripts import EPOCH_STEP, shard_script

R = TypeVar("R")


class Store:
    """Tasks, agents and services in Redis.

    Attributes:
        shards: Number of shards.
        fleet: Agents.
        contracts: What services are registered.
        outbox: Records that wait to become events.
    """

    def __init__(self, url: str, *, shards: int = 8, retention_ms: int = 3_600_000) -> None:
        self.shards = shards
        self._link = StoreConnection(url)
        self._lane = Batcher(self._link, shard_script(retention_ms))
        self.fleet = Fleet(self._link, shards)
        self.contracts = Contracts(self._link, shards)
        self.outbox = Outbox(self._link, shards)
        self._highest: dict[int, int] = {}
        self._lost: list[Callable[[], None]] = []
        self._link.on_recovery(self._look_again)
        self._link.on_change(self._link_changed)

    async def open(self) -> None:
        """Connects.

        Raises:
            StoreUnavailable: The server does not answer, or cannot serve us now.
            InvalidSetting: It holds a store of another layout.
        """
        await self.fleet.claim_layout()
        self._lane.start()

    async def close(self) -> None:
        """Sends no more, and closes the connections."""
        await self._lane.close()
        await self._link.close()

    @property
    def address(self) -> str:
        """Where the server is, without credentials."""
        return self._link.address

    @property
    def up(self) -> bool:
        """Whether the server answered last time."""
        return self._link.up

    @property
    def waiting(self) -> int:
        """Transitions that wait to be sent."""
        return self._lane.waiting

    def on_change(self, tell: Callable[[bool], None]) -> None:
        """Calls `tell` with whether the server is there, each time that changes."""
        self._link.on_change(tell)

    def on_loss(self, tell: Callable[[], None]) -> None:
        """Calls `tell` when the store came back without what it had: everything, or its newest writes."""
        self._lost.append(tell)

    async def wait_up(self) -> None:
        """Waits until the server takes writes."""
        await self._link.wait_up()

    def put(self, transition: Operation[R]) -> asyncio.Future[R]:
        """Hands in a transition without waiting; errors as those of `Batcher.put`."""
        return self._lane.put(transition)

    async def apply(self, transition: Operation[R]) -> R:
        """Applies a transition; errors as those of `Batcher.apply`."""
        return await self._lane.apply(transition)

    async def page(self, which: TaskFilter, page_size: int, page_token: str) -> tuple[list[TaskSnapshot], str]:
        """A page of tasks; see `list_tasks`."""
        return await list_tasks(self._link, self.shards, which, page_size, page_token)

    async def offer(self, transition: Offer) -> list[OfferedAttempt]:
        """Hands out tasks; as `apply`, and remembers the fences, so that a store that forgets them is recognised."""
        offered = await self._lane.apply(transition)
        if offered:
            highest = max(each.attempt.fence for each in offered)
            self._highest[transition.shard] = max(highest, self._highest.get(transition.shard, 0))
        return offered

    async def witness(self, attempt: AttemptKey) -> bool:
        """Somebody holds this attempt's fence: if the store has never given it, it has lost its newest writes.

        Then its epoch rises, so that no fence repeats. Returns whether it rose.

        Raises:
            UnknownTask: The attempt's task id is none.
        """
        shard = shard_of(attempt.task_id)
        if attempt.fence <= self._highest.get(shard, 0):
            return False
        self._highest[shard] = attempt.fence
        return await self.apply(self._epoch_after(shard))

    def _epoch_after(self, shard: int) -> RaiseEpoch:
        seen = self._highest[shard]
        return RaiseEpoch(shard, seen, (seen // EPOCH_STEP + 1) * EPOCH_STEP)

    def _link_changed(self, up: bool) -> None:
        if not up:
            # Patient, so these go first when the server is back, before anything is offered.
            for shard in self._highest:
                self._lane.put(self._epoch_after(shard)).add_done_callback(self._epoch_judged)

    def _epoch_judged(self, answer: asyncio.Future[bool]) -> None:
        if not answer.cancelled() and answer.exception() is None and answer.result():
            self._tell_loss()

    async def _look_again(self) -> None:
        if await self.fleet.claim_layout():
            self._tell_loss()

    def _tell_loss(self) -> None:
        for tell in self._lost:
            tell()


@asynccontextmanager
async def open_fleet(redis_url: str) -> AsyncIterator[tuple[Contracts, Fleet]]:
    """Connects to a store as it is.

    Raises:
        InvalidSetting: The URL cannot be used, or the store was laid out by another version.
        StoreUnavailable: The store is away.
    """
    link = StoreConnection(redis_url)
    try:
        shards = await Fleet(link, 0).laid_out()
        yield Contracts(link, shards), Fleet(link, shards)
    finally:
        await link.close()
