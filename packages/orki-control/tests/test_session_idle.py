"""Heartbeats of agents without attempts: an orchestrator with many sessions asks for fewer."""

from __future__ import annotations

from typing import Any

import pytest

from orki.control.v1 import session_pb2 as pb
from orki_control import session as s
from orki_control.session import AttemptKey

KEY = AttemptKey("t1", 1, 7)
HELLO = pb.Hello(agent_id="a", instance_id="i", protocol_min=1, protocol_max=3, slots=4, max_message_bytes=1 << 20)
INTERVAL, IDLE = 2.0, 5.0


def offer(lease_ms: int = 60_000) -> pb.Offer:
    return pb.Offer(attempt=KEY.ref(), method="x.Y/Z", request=b"r", lease_ms=lease_ms, accept_timeout_ms=2000)


def say(session: Any, now: float, **body: Any) -> None:
    kind = pb.OrchestratorMessage if isinstance(session, s.AgentSession) else pb.AgentMessage
    session.receive_batch((kind(**body),), now)


def sent(session: Any) -> list[Any]:
    found: list[Any] = []
    while (batch := session.messages_to_send()) is not None:
        found += batch.messages
    return found


def heartbeats(session: s.AgentSession, until: float, idle: float = 0.0) -> list[float]:
    """Run the timers until a time, and echo each heartbeat at once. Returns the times of the heartbeats."""
    found: list[float] = []
    while (due := session.next_timer()) is not None and due <= until:
        session.handle_timer(due)
        for each in sent(session):
            if each.HasField("heartbeat"):
                found.append(due)
                echo = pb.HeartbeatEcho(number=each.heartbeat.number, idle_interval_ms=round(idle * 1000))
                say(session, due, heartbeat_echo=echo)
    return found


def open_agent() -> s.AgentSession:
    session = s.AgentSession(s.AgentSessionOptions(agent_id="a", instance_id="i", services=(), slots=4))
    session.connection_made(0.0)
    welcome = pb.Welcome(
        protocol=3, orchestrator_id="o", session_epoch=1, heartbeat_interval_ms=2000, max_message_bytes=1 << 20
    )
    say(session, 0.0, welcome=welcome)
    return session


def open_orchestrator() -> s.OrchestratorSession:
    options = s.OrchestratorSessionOptions(orchestrator_id="o", heartbeat_interval=INTERVAL)
    session = s.OrchestratorSession(options, 0.0)
    session.receive_batch((pb.AgentMessage(hello=HELLO),), 0.0)
    session.welcome(session_epoch=1, now=0.0)
    return session


def beat(session: s.OrchestratorSession, number: int, now: float, idle: float = IDLE) -> None:
    say(session, now, heartbeat=pb.Heartbeat(number=number, free_slots=4))
    session.echo(number, idle)


def test_an_agent_without_attempts_sends_fewer_heartbeats() -> None:
    assert heartbeats(open_agent(), 20.0, IDLE) == [0.0, 2.0, 7.0, 12.0, 17.0]
    assert heartbeats(open_agent(), 9.0) == [0.0, 2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize(("lease_ms", "expected"), [(60_000, [5.0, 7.0, 9.0]), (3_000, [4.0, 5.0, 6.0, 7.0])])
def test_an_accepted_attempt_brings_the_heartbeats_back(lease_ms: int, expected: list[float]) -> None:
    session = open_agent()
    heartbeats(session, 2.5, IDLE)
    say(session, 3.0, offer=offer(lease_ms))
    assert session.accept(KEY, 3.0)
    assert heartbeats(session, 12.0, IDLE)[: len(expected)] == expected


def test_both_ends_wait_longer_for_a_peer_without_attempts() -> None:
    agent = open_agent()
    heartbeats(agent, 3.0, IDLE)
    assert agent.handle_timer(16.9) == []
    assert agent.handle_timer(17.0) == [s.SessionLost("the orchestrator fell silent", True)]
    orchestrator = open_orchestrator()
    beat(orchestrator, 1, 0.0)
    beat(orchestrator, 2, 2.0)
    assert orchestrator.handle_timer(16.9) == []
    (ended,) = orchestrator.handle_timer(17.0)
    assert isinstance(ended, s.SessionEnded)


def test_both_ends_miss_a_peer_with_attempts_as_before() -> None:
    agent = open_agent()
    heartbeats(agent, 3.0, IDLE)
    say(agent, 4.0, offer=offer())
    agent.accept(KEY, 4.0)
    assert agent.handle_timer(10.0) == [s.SessionLost("the orchestrator fell silent", True)]
    orchestrator = open_orchestrator()
    beat(orchestrator, 1, 0.0)
    orchestrator.offer(offer(), "", 1.0)
    say(orchestrator, 2.0, accepted=pb.Accepted(attempt=KEY.ref()))
    (ended,) = orchestrator.handle_timer(8.0)
    assert isinstance(ended, s.SessionEnded)


def test_an_interval_that_is_not_longer_changes_nothing() -> None:
    session = open_orchestrator()
    sent(session)
    beat(session, 1, 0.0, INTERVAL)
    (echo,) = sent(session)
    assert echo.heartbeat_echo == pb.HeartbeatEcho(number=1)
