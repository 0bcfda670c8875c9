"""Agents of the fleet: the handshake of a new session, agents' snapshots in the store, and FleetService."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import Hello
from orki.control.v1.task_pb2_grpc import FleetServiceServicer
from orki_contract.errors import InvalidArgument, OrkiError, Overloaded, Replaced
from orki_contract.read import read_image
from orki_control.session import AttemptKey, HelloArrived
from orki_server._calls import Context, actor_of, typed
from orki_server._identity import Action, caller, unknown_method
from orki_server._pauses import Pauses
from orki_server._registry import ContractRegistry
from orki_server._session import AgentSession, SessionRegistry
from orki_server._store.contracts import Contracts
from orki_server._store.fleet import AgentContracts, Fleet, SessionGrant
from orki_server._store.limits import check_limit, read_limits, set_limit
from orki_server._store.operations import ResumedAttempt, resume, shard_of
from orki_server._store.store import Store
from orki_server._tasks import MAX_MESSAGE

CANCEL_REQUESTED: Final = "the cancel of the task was requested"
_TRIES: Final = 20
_UPDATE_INTERVAL: Final = 0.5
_IMAGE_BYTES: Final = 2 << 20
"""Maximum size of the images in one answer. Further services come without image and can be requested by name."""
TARGET: Final = re.compile(r"[A-Za-z_][\w.]{0,500}(/[A-Za-z_]\w{0,200})?\Z", re.ASCII)
_log = logging.getLogger("orki.server.sessions")


class Handshake:
    """Checks hellos: contracts, attempts that the agent still holds, and which of its instances is the newest.

    Attributes:
        false_claims: Number of attempts that agents claimed without the proof of an offer.
    """

    def __init__(
        self, store: Store, fleet: Fleet, registry: ContractRegistry, sessions: SessionRegistry, max_sessions: int
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._registry = registry
        self._sessions = sessions
        self._max_sessions = max_sessions
        self.false_claims = 0

    async def run(self, session: AgentSession, arrived: HelloArrived) -> tuple[int, str] | None:
        """Welcome or refuse the session.

        Returns:
            The number of attempts that continue from an earlier session, and the instance that lost its session to this
            one (empty for none or for the same instance); None if the session ended meanwhile or was refused.

        Raises:
            OrkiError: The session was refused for this reason; the agent has been notified.
        """
        hello = arrived.hello
        try:
            if len(self._sessions) >= self._max_sessions and self._sessions.get(hello.agent_id) is None:
                raise Overloaded(f"this orchestrator has its maximum of {self._max_sessions} sessions; try another one")
            caller().check_agent(hello.agent_id, [each.service for each in hello.services])
            await self._registry.admit(hello.agent_id, hello.services)
            resumed = await self._resume(hello)
            grant = await self._open(session, hello)
        except OrkiError as error:
            if not session.over:
                session.refuse(error)
            raise
        if session.over:
            return None
        older = self._sessions.get(hello.agent_id)
        if older is not None and older.epoch > grant.epoch:
            session.refuse(Replaced(f"instance {older.instance_id} of agent {hello.agent_id} has the session"))
            return None
        return self._welcome(session, grant.epoch, resumed)

    async def _open(self, session: AgentSession, hello: Hello) -> SessionGrant:
        """Open the session in the store, under contracts that are registered at that moment."""
        session.record_heartbeat()
        for _ in range(_TRIES):
            grant = await self._fleet.open_session(session.snapshot(), session.digests)
            if not grant.missing:
                return grant
            # Since the check, the contract was replaced by another one, or the store lost it.
            self._registry.invalidate(grant.missing)
            await self._registry.admit(hello.agent_id, hello.services)
        raise Overloaded("the contracts of the agent's services keep changing; connect again")

    def _proven(self, hello: Hello) -> dict[int, list[AttemptKey]]:
        """Return the attempts that the agent holds with the proofs of their offers, by shard.

        Others are claims without effect: anybody can read a fence or make one up.
        """
        shards: dict[int, list[AttemptKey]] = {}
        false = []
        for held in hello.held:
            key = AttemptKey.of(held.attempt)
            if self._store.is_proven(hello.agent_id, key, held.proof):
                shards.setdefault(shard_of(key.task_id), []).append(key)
            else:
                false.append(key)
        if false:
            self.false_claims += len(false)
            _log.warning(
                "agent %s claims %d attempts without the proof of an offer; they are ignored (the first is %s)",
                *(hello.agent_id, len(false), false[0]),
            )
        return shards

    async def _resume(self, hello: Hello) -> list[ResumedAttempt]:
        resumed: list[ResumedAttempt] = []
        for shard, keys in self._proven(hello).items():
            if await self._store.check_fence(max(keys, key=lambda key: key.fence)):
                _log.warning(
                    "agent %s holds a fence that %s does not know: the store has lost its newest writes; "
                    "shard %d continues in a new epoch",
                    hello.agent_id,
                    self._store.connection.address.shown,
                    shard,
                )
            still_held = await self._store.apply(resume(shard, hello.agent_id, keys))
            resumed += still_held
        return resumed

    def _welcome(self, session: AgentSession, epoch: int, resumed: Sequence[ResumedAttempt]) -> tuple[int, str]:
        session.epoch = epoch
        session.methods = tuple(
            method.full_name
            for service, digest in session.digests.items()
            for method in self._registry.methods_of(service, digest)
        )
        older = self._sessions.get(session.agent_id)
        self._sessions[session.agent_id] = session
        replaced = ""
        if older is not None:
            replaced = older.instance_id if older.instance_id != session.instance_id else ""
            older.replace(session.instance_id)
        keep = [(each.attempt, each.traceparent) for each in resumed]
        session.machine.welcome(session_epoch=epoch, keep=keep, now=time.monotonic())
        for each in resumed:
            # The cancel may have been lost with the earlier stream.
            if each.state == TaskState.TASK_STATE_CANCELLING:
                grace_ms = round(each.cancel_grace * 1000)
                session.machine.cancel(each.attempt, grace_ms=grace_ms, message=CANCEL_REQUESTED)
        return len(resumed), replaced


class FleetUpdates:
    """Writes the snapshots of this orchestrator's agents to the store, several at a time."""

    def __init__(self, store: Store, fleet: Fleet) -> None:
        self._store = store
        self._fleet = fleet
        self._changed: dict[str, AgentSession] = {}
        self._ended: list[tuple[pb.AgentSnapshot, int]] = []
        self._wake = asyncio.Event()

    def changed(self, session: AgentSession) -> None:
        self._changed[session.agent_id] = session
        self._wake.set()

    def ended(self, session: AgentSession) -> None:
        self._changed.pop(session.agent_id, None)
        self._ended.append((session.snapshot(), session.epoch))
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            await self._store.connection.up.wait()
            with contextlib.suppress(OrkiError):
                await self.flush()
            await asyncio.sleep(_UPDATE_INTERVAL)

    async def flush(self) -> None:
        """Write the collected snapshots.

        Raises:
            StoreUnavailable: The store is down; the snapshots are kept.
        """
        self._wake.clear()
        changed, ended = self._changed, self._ended
        self._changed, self._ended = {}, []
        try:
            await self._fleet.update(ended, alive=False)
            await self._fleet.update([(each.snapshot(), each.epoch) for each in changed.values()])
        except OrkiError as error:
            _log.warning("the snapshots of %d agents could not be stored: %s", len(changed) + len(ended), error.message)
            self._changed = changed | self._changed
            self._ended = ended + self._ended
            self._wake.set()
            raise


class FleetServicer(FleetServiceServicer):
    """Lists agents and services, pauses services, and declares limits."""

    def __init__(
        self,
        store: Store,
        fleet: Fleet,
        contracts: Contracts,
        sessions: SessionRegistry,
        silence_timeout: float,
        on_queued: Callable[[], None],
    ) -> None:
        """Create the servicer, which calls `on_queued` when waiting tasks may be offered."""
        self._store = store
        self._on_limit = on_queued
        self._fleet = fleet
        self._pauses = Pauses(store, on_queued)
        self._contracts = contracts
        self._sessions = sessions
        self._silence_timeout = silence_timeout

    @typed
    async def ListAgents(self, request: pb.ListAgentsRequest, context: Context) -> pb.ListAgentsResponse:
        """List agents by id: those with a session here as they are now, others as the store last heard of them."""
        return pb.ListAgentsResponse(agents=await self._agents())

    async def _agents(self) -> list[pb.AgentSnapshot]:
        agents = []
        for agent in [each.agent for each in await self.agents_now()]:
            readable = [caller().may(Action.READ, service) for service in agent.services]
            if not all(readable):
                # Their attempts may belong to any of their services.
                agent.ClearField("attempts")
            if any(readable) or not readable:
                agents.append(agent)
        return agents

    async def agents_now(self) -> list[AgentContracts]:
        """Return the agents, by id: those with a session here as they are now, others as the store last heard of them.

        Raises:
            StoreUnavailable: The store is down.
        """
        found = []
        silent_since_us = (time.time() - self._silence_timeout) * 1_000_000
        for each in await self._fleet.agents():
            agent = each.agent
            session = self._sessions.get(agent.agent_id)
            if session is not None:
                each = AgentContracts(session.snapshot(), session.digests)
            elif agent.connected and agent.last_heartbeat_us < silent_since_us:
                # Its orchestrator may have died. Whether the agent finished draining is unknown.
                agent.connected = agent.draining = False
            found.append(each)
        return found

    @typed
    async def ListServices(self, request: pb.ListServicesRequest, context: Context) -> pb.ListServicesResponse:
        """List registered services by name, each with its leading contract."""
        services = await self._contracts.leading(request.service)
        services = [each for each in services if caller().may(Action.READ, each.service)]
        agents = await self._agents()
        room = _IMAGE_BYTES
        for service in services:
            service.agent_ids.extend(
                agent.agent_id for agent in agents if agent.connected and service.service in agent.services
            )
            room -= len(service.image)
            if room < 0 and not request.service:
                service.ClearField("image")
        return pb.ListServicesResponse(services=services)

    @typed
    async def Pause(self, request: pb.PauseRequest, context: Context) -> pb.PauseResponse:
        """Pause a registered service or one of its methods."""
        if len(request.message) > MAX_MESSAGE:
            raise InvalidArgument(f"message: at most {MAX_MESSAGE} characters, not {len(request.message)}")
        await self._check_target(request.target)
        made = await self._pauses.pause(request.target, request.message, actor_of(context))
        return pb.PauseResponse(pause=made)

    @typed
    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        """Resume a service or a method, also one that is no longer registered."""
        if not TARGET.match(request.target):
            raise InvalidArgument(f"target: {request.target[:80]!r} is no package.Service or package.Service/Method")
        if not caller().may(Action.PAUSE, request.target):
            raise unknown_method(request.target)
        return pb.ResumeResponse(was_paused=await self._pauses.resume(request.target, actor_of(context)))

    @typed
    async def ListPauses(self, request: pb.ListPausesRequest, context: Context) -> pb.ListPausesResponse:
        """List the pauses of the services that the caller may see."""
        pauses = [each for each in await self._pauses.list() if caller().may(Action.READ, each.target)]
        return pb.ListPausesResponse(pauses=pauses)

    async def _check_target(self, target: str) -> None:
        """Check that a service or a method is registered, and that the caller may pause it."""
        if not TARGET.match(target):
            raise InvalidArgument(f"target: {target[:80]!r} is no package.Service or package.Service/Method")
        service, _, method = target.partition("/")
        found = await self._contracts.leading(service) if caller().may(Action.PAUSE, target) else []
        tasks = [each for image in found for each in read_image(image.image).contract.tasks]
        names = {each.name for each in tasks if each.service == service}
        if not found or (method and method not in names):
            raise unknown_method(target, f"no registered contract has {target}")

    @typed
    async def SetLimit(self, request: pb.SetLimitRequest, context: Context) -> pb.SetLimitResponse:
        """Declare or remove the limit of a key."""
        caller().check_limits()
        check_limit(request.limit)
        await self._store.apply(set_limit(request.limit))
        self._on_limit()
        return pb.SetLimitResponse()

    @typed
    async def ListLimits(self, request: pb.ListLimitsRequest, context: Context) -> pb.ListLimitsResponse:
        """List the declared limits by key."""
        caller().check_limits()
        limits = await self._store.apply(read_limits())
        return pb.ListLimitsResponse(limits=limits)
