"""Following tasks: snapshots at every transition, progress as it comes, the end last."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Final

from orki.control.v1.task_pb2 import WatchResponse
from orki_contract.errors import StoreUnavailable, UnknownTask
from orki_server.store import TERMINAL, Look, Store

__all__ = ["Watchers"]

_PAGE: Final = 100
"""Most entries of progress in one look."""
_SETTLE_S: Final = 0.005
"""Transitions come in bursts: one look serves those that follow each other this closely. An end is seen at once."""
_POLL_S: Final = 1.0
"""Longest time between two looks: the transition may have been another orchestrator's."""


@dataclass(slots=True, eq=False)
class _Watcher:
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Watchers:
    """Those who follow tasks."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: dict[str, set[_Watcher]] = {}

    def moved(self, task_id: str, ended: bool) -> None:
        """The task has changed, or has news."""
        for watcher in self._watchers.get(task_id, ()):
            watcher.news.set()
            if ended:
                watcher.ended.set()

    async def follow(self, task_id: str, after: str) -> AsyncIterator[WatchResponse]:
        """News of a task until its end.

        A snapshot comes first, and at every transition; the last message is the one with the terminal state. Of a task
        that has ended already, the progress comes before that message, which is then the only snapshot.

        Args:
            task_id: The task.
            after: Cursor of the last progress that was seen; "" for the beginning.

        Raises:
            UnknownTask: There is none of that id, or it was forgotten.
            StoreUnavailable: The store is away at the first look; at later ones, it is waited for.
        """
        revision = 0
        with self._watch(task_id) as watcher:
            while True:
                watcher.news.clear()
                try:
                    seen = await self._store.apply(Look(task_id, _PAGE, after))
                except StoreUnavailable:
                    if not revision:
                        raise
                    await self._store.wait_up()
                    continue
                if seen is None:
                    raise UnknownTask(f"there is no task {task_id}")
                ended = seen.task.state in TERMINAL
                if seen.task.revision != revision and not ended:
                    yield WatchResponse(task=seen.task)
                revision = seen.task.revision
                for progress in seen.progress:
                    after = progress.cursor
                    yield WatchResponse(progress=progress)
                if len(seen.progress) == _PAGE:
                    continue
                if ended:
                    yield WatchResponse(task=seen.task)
                    return
                await _wait(watcher.news, _POLL_S)
                await _wait(watcher.ended, _SETTLE_S)

    @contextlib.contextmanager
    def _watch(self, task_id: str) -> Iterator[_Watcher]:
        watcher = _Watcher()
        self._watchers.setdefault(task_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            left = self._watchers[task_id]
            left.discard(watcher)
            if not left:
                del self._watchers[task_id]


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
