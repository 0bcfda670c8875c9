"""Transitions gathered into few calls: what has come together while one round trip was under way makes the next.

There is one round trip at a time, so transitions apply in the order in which they were handed in. A round trip carries
one script call for each shard that has something, and each call a batch of that shard's transitions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from redis.exceptions import NoScriptError, OutOfMemoryError, ResponseError

from orki_contract.errors import OrkiError, StoreUnavailable
from orki_server.keys import ShardKeys
from orki_server.store.link import Link
from orki_server.store.scripts import Script
from orki_server.store.transition import Argument, Transition

__all__ = ["Lane"]

R = TypeVar("R")

_OPERATIONS: Final = 256
"""Most transitions in one round trip: bounds how long a script holds the server up."""
_BYTES: Final = 8 << 20
"""Most bytes in one round trip."""
_WAITING: Final = 100_000
"""Most transitions in memory."""


@dataclass(slots=True, eq=False)
class _Entry:
    transition: Transition[Any]
    arguments: tuple[Argument, ...]
    size: int
    answer: asyncio.Future[Any]


class Lane:
    """The way of all transitions to the store."""

    def __init__(self, link: Link, script: Script) -> None:
        self._link = link
        self._script = script
        self._waiting: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        link.on_change(self._link_changed)

    def start(self) -> None:
        """Begins to send."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="orki store lane")

    async def close(self) -> None:
        """Stops; what still waits fails as if the store were away."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail(list(self._waiting), StoreUnavailable("the orchestrator stops"))
        self._waiting.clear()

    @property
    def waiting(self) -> int:
        """Transitions in memory."""
        return len(self._waiting)

    def put(self, transition: Transition[R]) -> asyncio.Future[R]:
        """Hands in a transition without waiting; the future gets its outcome or the error.

        Raises:
            StoreUnavailable: The store is away and the transition is not patient, or too many wait.
        """
        if not self._link.up and not transition.patient:
            raise self._link.why_down
        if len(self._waiting) >= _WAITING:
            raise StoreUnavailable(f"the store at {self._link.address} does not keep up: {_WAITING} transitions wait")
        arguments = tuple(transition.arguments())
        size = sum(len(each) for each in arguments if isinstance(each, bytes | str))
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(transition, arguments, size, answer))
        self._wake.set()
        return answer

    async def apply(self, transition: Transition[R]) -> R:
        """Hands in a transition and waits for its outcome.

        Raises:
            StoreUnavailable: The store is away. The transition may have been applied, and may be sent again.
            LocalProtocolError: The script failed: a defect.
        """
        return await self.put(transition)

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            await self._link.wait_up()
            batch = self._take()
            if not batch:
                continue
            try:
                await self._send(batch)
            except OrkiError as error:
                self._return(batch, error)

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        while self._waiting and len(batch) < _OPERATIONS and (size < _BYTES or not batch):
            batch.append(self._waiting.popleft())
            size += batch[-1].size
        return batch

    async def _send(self, batch: Iterable[_Entry]) -> None:
        shards: dict[int, list[_Entry]] = {}
        for entry in batch:
            shards.setdefault(entry.transition.route(), []).append(entry)
        commands = [self._command(shard, entries) for shard, entries in shards.items()]
        replies = await self._link.attempt(commands, in_lane=True)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            # Only what found no script is sent again: the others were applied.
            again = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            _, *second = await self._link.attempt(
                [("SCRIPT", "LOAD", self._script.text), *(commands[place] for place in again)], in_lane=True
            )
            for place, reply in zip(again, second, strict=True):
                replies[place] = reply
        failure: OrkiError | None = None
        for entries, reply in zip(shards.values(), replies, strict=True):
            if isinstance(reply, Exception):
                failure = self._link.failed(reply)
                self._return(entries, failure)
            else:
                self._answer(entries, reply)

    def _command(self, shard: int, entries: Iterable[_Entry]) -> list[Argument]:
        command: list[Argument] = ["EVALSHA", self._script.sha, 1, ShardKeys(shard).base]
        for entry in entries:
            command += (entry.transition.op, len(entry.arguments), *entry.arguments)
        return command

    def _answer(self, entries: list[_Entry], replies: list[list[bytes]]) -> None:
        refused: list[_Entry] = []
        error: OrkiError | None = None
        for entry, reply in zip(entries, replies, strict=True):
            if reply and reply[0] == b"error":
                error = self._link.failed(_script_error(reply[1].decode(errors="replace")))
                refused.append(entry)
            elif not entry.answer.done():
                entry.answer.set_result(entry.transition.outcome(reply))
        if error:
            self._return(refused, error)

    def _return(self, entries: list[_Entry], error: OrkiError) -> None:
        """Puts back what may wait, in its place at the front; fails the rest."""
        away = isinstance(error, StoreUnavailable)
        self._fail([entry for entry in entries if not (away and entry.transition.patient)], error)
        kept = [entry for entry in entries if away and entry.transition.patient and not entry.answer.cancelled()]
        self._waiting.extendleft(reversed(kept))

    @staticmethod
    def _fail(entries: Iterable[_Entry], error: OrkiError) -> None:
        for entry in entries:
            if not entry.answer.done():
                entry.answer.set_exception(type(error)(error.message))

    def _link_changed(self, up: bool) -> None:
        if not up:
            impatient = [entry for entry in self._waiting if not entry.transition.patient]
            self._waiting = deque(entry for entry in self._waiting if entry.transition.patient)
            self._fail(impatient, self._link.why_down)
        self._wake.set()


def _script_error(text: str) -> Exception:
    """The error that redis-py would have made of a failed command inside a script."""
    return OutOfMemoryError(text) if text.startswith("OOM") else ResponseError(text)
