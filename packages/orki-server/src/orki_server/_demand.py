"""Demand: the methods that have queued tasks, and the sessions that have free slots for them.

A task's queue belongs to its method and its shard. No work here grows with the number of idle sessions: a session
enters or leaves the index of its methods when its slots change, and a request for tasks names only as many sessions as
there are tasks to assign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from orki_server._session import AgentSession
from orki_server._store.operations import MAX_OFFERS, OfferedAttempt, Recipient

_MANY: Final = 1 << 20
"""Stands for an unknown number of queued tasks."""
_WINDOW: Final = 64
"""Maximum number of sessions of a method that one request names; those with more free slots come first."""
_OFFERS: Final = 64
"""Maximum number of tasks for one agent in one request, so that an agent with many slots does not take all."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request for queued tasks of one shard.

    Attributes:
        shard: The shard.
        sessions: The sessions that get tasks.
        recipients: The same sessions as the store needs them.
        wanted: The methods, with the known number of queued tasks.
    """

    shard: int
    sessions: tuple[AgentSession, ...]
    recipients: tuple[Recipient, ...]
    wanted: dict[str, int]


class Demand:
    """Queued tasks that agents of this orchestrator may take. Calls `on_ready` when a request may get some."""

    def __init__(self, shards: int, on_ready: Callable[[], None]) -> None:
        self._shards = shards
        self._on_ready = on_ready
        self._queued: dict[str, dict[int, int]] = {}
        self._serving: dict[str, dict[AgentSession, None]] = {}
        # Each in the order in which the sessions get tasks. One without free slots is removed when it is found.
        self._free: dict[str, dict[AgentSession, None]] = {}

    # --- Sessions. ---

    def opened(self, session: AgentSession) -> None:
        """A session was welcomed. Every shard may have tasks for it."""
        for method in session.methods:
            self._serving.setdefault(method, {})[session] = None
            self._queued[method] = dict.fromkeys(range(self._shards), _MANY)
        self.slots_changed(session)

    def ended(self, session: AgentSession) -> None:
        """A session has ended; it need not have been welcomed."""
        for method in session.methods:
            for index in (self._serving, self._free):
                _drop(index, method, session)
            if method not in self._serving:
                self._queued.pop(method, None)

    def slots_changed(self, session: AgentSession) -> None:
        """Slots of a session may have become free."""
        if not session.machine.free_slots:
            return
        wanted = False
        for method in session.methods:
            if method in self._serving:
                self._free.setdefault(method, {})[session] = None
                wanted = wanted or method in self._queued
        if wanted:
            self._on_ready()

    # --- Tasks. ---

    def queued(self, shard: int, method: str, count: int = 1) -> None:
        """Tasks of a method were queued. Those of a method that no agent serves here are left to others."""
        if method not in self._serving:
            return
        shards = self._queued.setdefault(method, {})
        shards[shard] = shards.get(shard, 0) + count
        if method in self._free:
            self._on_ready()

    def expect(self, shard: int, method: str) -> bool:
        """A task of a method is on its way to the store. Return whether it is asked for in the same batch."""
        if not any(session.machine.free_slots for session in self._free.get(method, ())):
            return False
        self.queued(shard, method)
        return True

    def all_queued(self) -> None:
        """Any shard may have tasks of any method."""
        for method in self._serving:
            self._queued[method] = dict.fromkeys(range(self._shards), _MANY)
        self._on_ready()

    def unmarked(self, shard: int) -> tuple[str, ...]:
        """Return the methods with free slots of which no queued task is known on a shard."""
        return tuple(method for method in self._free if shard not in self._queued.get(method, ()))

    # --- Requests. ---

    def shards(self) -> list[int]:
        """Return the shards with queued tasks for which slots are free."""
        found: dict[int, None] = {}
        for method, shards in self._queued.items():
            if method in self._free:
                found.update(dict.fromkeys(shards))
        return list(found)

    def take(self, shard: int) -> Request | None:
        """Return a request for the queued tasks of a shard, which count as taken; None if no slot is free for them."""
        wanted: dict[str, int] = {}
        chosen: dict[AgentSession, list[str]] = {}
        for method in [each for each, shards in self._queued.items() if shard in shards and each in self._free]:
            sessions = self._candidates(method)[: self._queued[method][shard]]
            if not sessions:
                continue
            wanted[method] = self._take_one(method, shard)
            for session in sessions:
                chosen.setdefault(session, [])
        for session, methods in chosen.items():
            methods += [method for method in wanted if session in self._serving[method]]
        recipients = tuple(
            Recipient(
                each.agent_id, each.instance_id, min(each.machine.free_slots, _OFFERS), tuple(methods), each.labels
            )
            for each, methods in chosen.items()
        )
        return Request(shard, tuple(chosen), recipients, wanted) if chosen else None

    def give_back(self, request: Request) -> None:
        """The request failed."""
        for method, count in request.wanted.items():
            self.queued(request.shard, method, count)

    def settle(self, request: Request, offers: Sequence[OfferedAttempt]) -> None:
        """The request was answered. A queue is empty if a session that serves its method has slots left."""
        left = [each.slots for each in request.recipients]
        for offered in offers:
            left[offered.recipient] -= 1
            self._put_last(offered.method, request.sessions[offered.recipient])
        emptied: set[str] = set()
        if len(offers) < MAX_OFFERS:
            for recipient, slots in zip(request.recipients, left, strict=True):
                if slots > 0:
                    emptied.update(recipient.methods)
        for method in request.wanted:
            if method not in emptied:
                self.queued(request.shard, method, _MANY)

    def wait(self, request: Request) -> None:
        """Tasks of the request wait for other agents or for a limit. They are asked for again when slots change."""
        narrowed = False
        for method, count in request.wanted.items():
            self._queued.setdefault(method, {})[request.shard] = _MANY
            narrowed |= count < _MANY and len(self._free.get(method, ())) > len(request.sessions)
        for session in request.sessions:
            # If there are more sessions than a request names, the others come first next time.
            for method in request.wanted:
                self._put_last(method, session)
        if narrowed:
            # It named as many sessions as tasks; others may have the labels.
            self._on_ready()

    def _candidates(self, method: str) -> list[AgentSession]:
        """Return sessions with free slots: those with more slots first, and of these the one that waited longest."""
        free = self._free[method]
        found: list[AgentSession] = []
        busy: list[AgentSession] = []
        for session in free:
            (found if session.machine.free_slots else busy).append(session)
            if len(found) == _WINDOW:
                break
        for session in busy:
            _drop(self._free, method, session)
        return sorted(found, key=lambda each: -each.machine.free_slots)

    def _put_last(self, method: str, session: AgentSession) -> None:
        free = self._free.get(method, {})
        if session in free:
            del free[session]
            free[session] = None

    def _take_one(self, method: str, shard: int) -> int:
        shards = self._queued[method]
        count = shards.pop(shard)
        if not shards:
            del self._queued[method]
        return count


def _drop(index: dict[str, dict[AgentSession, None]], method: str, session: AgentSession) -> None:
    sessions = index.get(method)
    if sessions is not None:
        sessions.pop(session, None)
        if not sessions:
            del index[method]
