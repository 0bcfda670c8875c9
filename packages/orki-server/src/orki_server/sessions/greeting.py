"""A hello is judged: contracts, the attempts that the agent still holds, and which of its instances is the newest."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import Hello
from orki_contract.errors import OrkiError, Overloaded, Replaced, UnknownTask
from orki_control.attempt import AttemptKey
from orki_control.session import HelloArrived
from orki_server import store
from orki_server.registry import Registry
from orki_server.sessions.live import LiveSession
from orki_server.sessions.roster import Roster
from orki_server.store import Greeting, Kept, Store

__all__ = ["Greeted", "Greeter"]

_TRIES: Final = 20
_CANCEL_AGAIN: Final = "the task's end was asked for"
_log = logging.getLogger("orki.server.sessions")


@dataclass(frozen=True, slots=True)
class Greeted:
    """What came of a hello that was accepted.

    Attributes:
        resumed: Attempts that went on from an earlier session.
        replaced: The instance whose session was taken, if it was another; empty for none.
    """

    resumed: int
    replaced: str


class Greeter:
    """Judges hellos."""

    def __init__(self, store: Store, registry: Registry, roster: Roster, max_sessions: int) -> None:
        self._store = store
        self._registry = registry
        self._roster = roster
        self._max_sessions = max_sessions

    async def greet(self, session: LiveSession, arrived: HelloArrived) -> Greeted | None:
        """Welcomes the session, or refuses it; None when it was refused, or ended meanwhile.

        Raises:
            OrkiError: Why it was refused; the agent has been told.
        """
        hello = arrived.hello
        try:
            if len(self._roster) >= self._max_sessions and self._roster.get(hello.agent_id) is None:
                raise Overloaded(
                    f"this orchestrator takes {self._max_sessions} sessions, and has them; try another one"
                )
            await self._registry.admit(hello.agent_id, hello.services)
            kept = await self._attach(hello, [key for key, _ in arrived.held])
            greeting = await self._enter(session, hello)
        except OrkiError as error:
            if not session.over:
                session.refuse(error)
            raise
        if session.over:
            return None
        older = self._roster.get(hello.agent_id)
        if older is not None and older.epoch > greeting.epoch:
            session.refuse(Replaced(f"instance {older.instance_id} of agent {hello.agent_id} has the session"))
            return None
        return self._welcome(session, hello, greeting.epoch, kept)

    async def _enter(self, session: LiveSession, hello: Hello) -> Greeting:
        """The agent serves from now on, for all the fleet to see, under contracts that stand at that moment."""
        session.heard()
        for _ in range(_TRIES):
            greeting = await self._store.fleet.greet(session.snapshot(), session.digests)
            if not greeting.missing:
                return greeting
            # Since it was judged, its contract gave way to another one, or the store lost it.
            self._registry.overtaken(greeting.missing)
            await self._registry.admit(hello.agent_id, hello.services)
        raise Overloaded("the contracts of the agent's services change all the time; connect again")

    async def _attach(self, hello: Hello, held: Sequence[AttemptKey]) -> list[Kept]:
        shards: dict[int, list[AttemptKey]] = {}
        for key in held:
            try:
                shard = store.shard_of(key.task_id)
            except UnknownTask:
                continue
            if shard < self._store.shards:
                shards.setdefault(shard, []).append(key)
        kept: list[Kept] = []
        for shard, keys in shards.items():
            if await self._store.witness(max(keys, key=lambda key: key.fence)):
                _log.warning(
                    "agent %s holds a fence that the store at %s never gave: the store has lost its newest writes; "
                    "shard %d goes on in a new epoch",
                    hello.agent_id,
                    self._store.address,
                    shard,
                )
            attached = await self._store.apply(store.Attach(shard, hello.agent_id, tuple(keys)))
            kept += attached
        return kept

    def _welcome(self, session: LiveSession, hello: Hello, epoch: int, kept: Sequence[Kept]) -> Greeted:
        session.epoch = epoch
        session.methods = tuple(
            method.full_name
            for service, digest in session.digests.items()
            for method in self._registry.methods_of(service, digest)
        )
        older = self._roster.enter(session)
        replaced = ""
        if older is not None:
            replaced = older.instance_id if older.instance_id != session.instance_id else ""
            older.replace(session.instance_id)
        keep = [(each.attempt, each.traceparent) for each in kept]
        session.machine.welcome(session_epoch=epoch, keep=keep, now=time.monotonic())
        for each in kept:
            # The cancel may have been lost with the stream before.
            if each.state == TaskState.TASK_STATE_CANCELLING:
                session.machine.cancel(each.attempt, grace_ms=each.grace_ms, message=_CANCEL_AGAIN)
        session.changed()
        return Greeted(len(kept), replaced)
