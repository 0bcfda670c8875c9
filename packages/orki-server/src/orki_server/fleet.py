"""FleetService: who and what there is."""

from __future__ import annotations

import time
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.task_pb2_grpc import FleetServiceServicer
from orki_server.rpc import Context, typed
from orki_server.sessions.roster import Roster
from orki_server.store import Store

__all__ = ["FleetServicer", "silence_us"]

_IMAGES: Final = 2 << 20
"""Most bytes of images in one answer; services beyond come without theirs, and can be asked for by name."""
_SILENT: Final = 3
"""Heartbeat intervals without a word after which another orchestrator's agent counts as gone."""


def silence_us(heartbeat_interval_ms: int) -> int:
    """Time without a heartbeat after which an agent counts as gone, in microseconds."""
    return _SILENT * heartbeat_interval_ms * 1000 + 2_000_000


class FleetServicer(FleetServiceServicer):
    """Serves those who look at the fleet."""

    def __init__(self, store: Store, roster: Roster, heartbeat_interval_ms: int) -> None:
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
        """Registered services by name, each with its leading contract."""
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
