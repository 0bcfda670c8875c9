"""FleetService: who and what there is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import Hello
from orki.control.v1.task_pb2 import AgentSnapshot
from orki.control.v1.task_pb2_grpc import FleetServiceServicer
from orki_contract.errors import OrkiError, Overloaded, Replaced, UnknownTask
from orki_control.session import AttemptKey, HelloArrived
from orki_server._registry import ContractRegistry
from orki_server._requests import Context, typed
from orki_server._session import AgentSession, SessionRegistry
from orki_server._store.fleet import SessionGrant
from orki_server._store.ids import shard_of
from orki_server._store.operations import Resume, ResumedAttempt
from orki_server._store.store import Store

_IMAGES: Final = 2 << 20
"""Most bytes of images in one answer; services beyond come without theirs, and can be asked for by name."""
_SILENT: Final = 3
"""Heartbeat intervals without a word after which another orchestrator's agent counts as gone."""


def silence_us(heartbeat_interval_ms: int) -> int:
    """Time without a heartbeat after which an agent counts as gone, in microseconds."""
    return _SILENT * heartbeat_interval_ms * 1000 + 2_000_000


class FleetServicer(FleetServiceServicer):
    """Serves those who look at the fleet."""

    def __init__(self, store: Store, roster: SessionRegistry, heartbeat_interval_ms: int) -> None:
        self._store = store
        self._roster = roster
        self._silent_us = silence_us(heartbeat_interval_ms)

    @typed
    async def ListAgents(self, request: pb.ListAgentsRequest, context: Context) -> pb.ListAgentsResponse:
        """Agents by id: those with a session here as they are now, others as the store last heard of them."""
        return pb.ListAgentsResponse(agents=await self._agents())

    async def _agents(self) -> list[pb.AgentSnapshot]:
        agents = []
        silent_since = time.time_ns() // 1000 - self._silent_us
        for agent in await self._store.fleet.agents():
            session = self._roster.get(agent.agent_id)
            if session is not None:
                agent = session.snapshot()
            elif agent.connected and agent.last_heartbeat_us < silent_since:
                # Its orchestrator may have died without a word: nobody saw whether a drain came to its end.
                agent.connected = agent.draining = False
            agents.append(agent)
        return agents

    @typed
    async def ListServices(self, request: pb.ListServicesRequest, context: Context) -> pb.ListServicesResponse:
        """RegisteredContract services by name, each with its leading contract."""
        services = await self._store.contracts.leading(request.service)
        agents = await self._agents()
        room = _IMAGES
        for service in services:
            service.agent_ids.extend(
                agent.agent_id for agent in agents if agent.connected and service.service in agent.services
            )
            room -= len(service.image)
            if room < 0 and not request.service:
                service.ClearField("image")
        return pb.ListServicesResponse(services=services)


_TRIES: Final = 20
_CANCEL_AGAIN: Final = "the task's end was asked for"
_log = logging.getLogger("orki.server.sessions")


@dataclass(frozen=True, slots=True)
class Welcomed:
    """What came of a hello that was accepted.

    Attributes:
        resumed: Attempts that went on from an earlier session.
        replaced: The instance whose session was taken, if it was another; empty for none.
    """

    resumed: int
    replaced: str


class Handshake:
    """Judges hellos."""

    def __init__(self, store: Store, registry: ContractRegistry, roster: SessionRegistry, max_sessions: int) -> None:
        self._store = store
        self._registry = registry
        self._roster = roster
        self._max_sessions = max_sessions

    async def greet(self, session: AgentSession, arrived: HelloArrived) -> Welcomed | None:
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

    async def _enter(self, session: AgentSession, hello: Hello) -> SessionGrant:
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

    async def _attach(self, hello: Hello, held: Sequence[AttemptKey]) -> list[ResumedAttempt]:
        shards: dict[int, list[AttemptKey]] = {}
        for key in held:
            try:
                shard = shard_of(key.task_id)
            except UnknownTask:
                continue
            if shard < self._store.shards:
                shards.setdefault(shard, []).append(key)
        kept: list[ResumedAttempt] = []
        for shard, keys in shards.items():
            if await self._store.witness(max(keys, key=lambda key: key.fence)):
                _log.warning(
                    "agent %s holds a fence that the store at %s never gave: the store has lost its newest writes; "
                    "shard %d goes on in a new epoch",
                    hello.agent_id,
                    self._store.address,
                    shard,
                )
            attached = await self._store.apply(Resume(shard, hello.agent_id, tuple(keys)))
            kept += attached
        return kept

    def _welcome(self, session: AgentSession, hello: Hello, epoch: int, kept: Sequence[ResumedAttempt]) -> Welcomed:
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
        return Welcomed(len(kept), replaced)


_INTERVAL_S: Final = 0.5
_log = logging.getLogger("orki.server.sessions")


class FleetUpdates:
    """Snapshots of agents on their way to the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed: dict[str, AgentSession] = {}
        self._gone: list[tuple[AgentSnapshot, int]] = []
        self._wake = asyncio.Event()

    def changed(self, session: AgentSession) -> None:
        """The agent has something new to show."""
        self._changed[session.agent_id] = session
        self._wake.set()

    def gone(self, session: AgentSession) -> None:
        """The session has ended."""
        self._changed.pop(session.agent_id, None)
        self._gone.append((session.snapshot(), session.epoch))
        self._wake.set()

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            await self._wake.wait()
            await self._store.wait_up()
            with contextlib.suppress(OrkiError):
                await self.flush()
            await asyncio.sleep(_INTERVAL_S)

    async def flush(self) -> None:
        """Writes what has gathered.

        Raises:
            StoreUnavailable: The store is away; what could not be written is kept.
        """
        self._wake.clear()
        changed, gone = self._changed, self._gone
        self._changed, self._gone = {}, []
        try:
            await self._store.fleet.tell(gone, alive=False)
            await self._store.fleet.tell([(each.snapshot(), each.epoch) for each in changed.values()])
        except OrkiError as error:
            _log.warning("the fleet's view of %d agents is late: %s", len(changed) + len(gone), error.message)
            self._changed = changed | self._changed
            self._gone = gone + self._gone
            self._wake.set()
            raise
