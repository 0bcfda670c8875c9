"""What the orchestrator tells the event plane of its own accord: the lives of agents, and refusals.

What happens to tasks goes through the store's outbox instead, where it cannot be lost. These here are collected, and
lost with the process: agents' lives can be seen in the fleet's table as well.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from google.protobuf.message import Message

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentConnected, AgentDisconnected, AgentEvent, AgentReplaced
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki_contract.errors import OrkiError
from orki_contract.handles import EventStream
from orki_events import Events
from orki_server.sessions.live import LiveSession

__all__ = ["Announcer"]

E = TypeVar("E", bound=Message)
_log = logging.getLogger("orki.server")


class Announcer:
    """Publishes what happened here."""

    def __init__(self, events: Events, orchestrator_id: str) -> None:
        self._events = events
        self._orchestrator_id = orchestrator_id

    def connected(self, session: LiveSession, resumed: int) -> None:
        """An agent was welcomed."""
        event = AgentConnected(
            orchestrator_id=self._orchestrator_id, session_epoch=session.epoch, resumed_attempts=resumed
        )
        self._agent(session, AgentEvent(connected=event))

    def disconnected(self, session: LiveSession) -> None:
        """An agent's stream was lost."""
        event = AgentDisconnected(
            orchestrator_id=self._orchestrator_id, session_epoch=session.epoch, cause=session.cause[:1000]
        )
        self._agent(session, AgentEvent(disconnected=event))

    def replaced(self, session: LiveSession, older_instance_id: str) -> None:
        """A newer instance, that of `session`, took the session from an older one."""
        event = AgentEvent(replaced=AgentReplaced(successor_instance_id=session.instance_id))
        event.agent_id, event.instance_id = session.agent_id, older_instance_id
        self._collect(AGENTS, event)

    def refused(self, actor: str, subject: str, error: OrkiError) -> None:
        """Somebody was refused something."""
        event = AuditEvent(
            actor=actor,
            action="refuse",
            subject=subject,
            outcome=Reason.Name(error.reason),
            detail=error.message[:1000],
        )
        self._collect(AUDIT, event)

    def _agent(self, session: LiveSession, event: AgentEvent) -> None:
        event.agent_id, event.instance_id = session.agent_id, session.instance_id
        self._collect(AGENTS, event)

    def _collect(self, stream: EventStream[E, Any], event: E) -> None:
        try:
            self._events.collect(stream, event)
        except OrkiError as error:
            _log.warning("an event for stream %s was not taken: %s", stream.contract.name, error.message)
