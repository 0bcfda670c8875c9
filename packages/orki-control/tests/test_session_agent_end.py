"""Tests of the agent's end of a session, with orchestrators that keep and break the laws."""

from __future__ import annotations

from typing import Any

import pytest

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    ContractMismatch,
    InvalidSetting,
    LocalProtocolError,
    OrkiError,
    RemoteProtocolError,
    StaleFence,
    StoreUnavailable,
    TooLarge,
)
from orki_control import session as s
from orki_control.session import AttemptKey

KEY = AttemptKey("t1", 1, 7)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def hello(**changes: Any) -> pb.Hello:
    fields = {
        "agent_id": "a",
        "instance_id": "i",
        "protocol_min": 1,
        "protocol_max": 1,
        "slots": 2,
        "max_message_bytes": 1 << 20,
        **changes,
    }
    return pb.Hello(**fields)


def agent(**changes: Any) -> s.AgentSession:
    options = {"agent_id": "a", "instance_id": "i", "services": (), "slots": 2, **changes}
    return s.AgentSession(s.AgentSessionOptions(**options))


def orchestrator(**changes: Any) -> s.OrchestratorSession:
    return s.OrchestratorSession(s.OrchestratorSessionOptions(**{"orchestrator_id": "o", **changes}), 0.0)


def welcome(**changes: Any) -> pb.OrchestratorMessage:
    fields = {
        "protocol": 1,
        "orchestrator_id": "o",
        "session_epoch": 1,
        "heartbeat_interval_ms": 2000,
        "max_message_bytes": 1 << 20,
        **changes,
    }
    return pb.OrchestratorMessage(welcome=pb.Welcome(**fields))


def offer(key: AttemptKey = KEY, lease_ms: int = 9000) -> pb.Offer:
    return pb.Offer(attempt=key.ref(), method="x.Y/Z", request=b"r", lease_ms=lease_ms, accept_timeout_ms=2000)


def open_agent(**changes: Any) -> s.AgentSession:
    session = agent(**changes)
    session.connection_made(0.0)
    session.receive_batch((welcome(),), 0.0)
    sent(session)
    return session


def sent(session: Any) -> list[Any]:
    messages = []
    while (batch := session.messages_to_send()) is not None:
        messages += batch.messages
    return messages


def kinds(session: Any) -> list[str | None]:
    return [each.WhichOneof("body") for each in sent(session)]


def running(session: s.AgentSession, key: AttemptKey = KEY, now: float = 0.0) -> None:
    session.receive_batch((pb.OrchestratorMessage(traceparent=TRACE, offer=offer(key)),), now)
    assert session.accept(key, now)
    sent(session)


def test_a_result_too_large_for_the_orchestrator_becomes_a_failure() -> None:
    session = open_agent()
    running(session)
    session.report(KEY, b"x" * (1 << 20), 0.0)
    (word,) = sent(session)
    assert word.result.failure.reason == Reason.REASON_TOO_LARGE
    assert word.traceparent == TRACE


def test_a_result_is_sent_after_every_welcome_until_it_is_acknowledged() -> None:
    session = open_agent()
    running(session)
    session.report(KEY, b"done", 0.0)
    for now in (1.0, 2.0):
        session.connection_lost(now)
        session.connection_made(now)
        (greeting,) = sent(session)
        assert greeting.hello.held[0].has_result
        session.receive_batch((welcome(keep=[KEY.ref()]),), now)
        assert kinds(session) == ["result"]
    acknowledged = pb.OrchestratorMessage(result_acknowledged=pb.ResultAcknowledged(attempt=KEY.ref()))
    assert session.receive_batch((acknowledged,), 3.0) == [s.ResultsAcknowledged((KEY,))]
    assert session.receive_batch((acknowledged,), 3.0) == []
    assert session.attempts == {}


def test_attempts_that_the_welcome_does_not_keep_are_stopped() -> None:
    session = open_agent(slots=1)
    running(session)
    session.connection_lost(1.0)
    session.connection_made(1.0)
    (revoked, opened) = session.receive_batch((welcome(),), 1.0)
    assert isinstance(revoked, s.AttemptsRevoked)
    assert isinstance(opened, s.SessionOpened)
    assert session.free_slots == 0, "its handler still runs"
    assert not session.report(KEY, b"late", 1.0)
    session.release(KEY)
    assert session.free_slots == 1


def test_an_attempt_stops_before_its_lease_ends() -> None:
    session = open_agent()
    running(session, now=0.0)
    assert session.handle_timer(0.0) == []
    assert [each.heartbeat.number for each in sent(session)] == [1]
    session.receive_batch((pb.OrchestratorMessage(heartbeat_echo=pb.HeartbeatEcho(number=1)),), 1.0)
    session.connection_lost(1.0)
    assert session.next_timer() == pytest.approx(8.1)
    assert session.handle_timer(8.0) == []
    assert session.handle_timer(8.1) == [s.LeasesLost((KEY,))]
    assert session.next_timer() is None


def test_short_leases_shorten_the_heartbeat_interval() -> None:
    session = open_agent()
    session.receive_batch((pb.OrchestratorMessage(offer=offer(lease_ms=900)),), 0.0)
    session.accept(KEY, 0.0)
    session.handle_timer(0.0)
    assert session.next_timer() == pytest.approx(0.3)


def test_every_cancel_is_acknowledged_at_once() -> None:
    session = open_agent()
    running(session)
    cancel = pb.OrchestratorMessage(traceparent=TRACE, cancel=pb.Cancel(attempt=KEY.ref(), grace_ms=50))
    for _ in range(2):
        assert session.receive_batch((cancel,), 0.0) == [s.CancelsArrived((s.ArrivedCancel(KEY, 50, ""),))]
        assert kinds(session) == ["cancel_acknowledged"]
    unknown = AttemptKey("t5", 1, 50)
    cancel.cancel.attempt.CopyFrom(unknown.ref())
    assert session.receive_batch((cancel,), 0.0) == []
    assert kinds(session) == ["cancel_acknowledged"]
    assert session.receive_batch((pb.OrchestratorMessage(offer=offer(unknown)),), 0.0) == []
    assert sent(session)[0].result.HasField("cancelled")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([welcome()], "Welcome is illegal in state OPEN"),
        ([pb.OrchestratorMessage(offer=pb.Offer())], "lacks a task"),
        ([pb.OrchestratorMessage(offer=offer(lease_ms=0))], "lacks a task, an attempt, a fence or a lease"),
        ([pb.OrchestratorMessage(offer=offer())] * 2, "held already"),
        (
            [pb.OrchestratorMessage(offer=offer(AttemptKey(f"t{n}", 1, n))) for n in (1, 2, 3)],
            "exceeds the 2 slots",
        ),
        (
            [
                pb.OrchestratorMessage(offer=offer(AttemptKey("t", 2, 5))),
                pb.OrchestratorMessage(offer=offer(AttemptKey("t", 1, 4))),
            ],
            "came after fence 5",
        ),
        ([pb.OrchestratorMessage(heartbeat_echo=pb.HeartbeatEcho(number=1))], "echo of heartbeat 1"),
        (
            [
                pb.OrchestratorMessage(offer=offer()),
                pb.OrchestratorMessage(directive=pb.Directive(attempt=KEY.ref())),
            ],
            "Directive is illegal in state OFFERED",
        ),
        (
            [
                pb.OrchestratorMessage(offer=offer()),
                pb.OrchestratorMessage(result_acknowledged=pb.ResultAcknowledged(attempt=KEY.ref())),
            ],
            "ResultAcknowledged is illegal in state OFFERED",
        ),
        (
            [pb.OrchestratorMessage(drain=pb.OrchestratorDrain()), pb.OrchestratorMessage(offer=offer())],
            "Offer is illegal in state PEER_DRAINING",
        ),
    ],
)
def test_an_orchestrator_that_breaks_a_law_causes_a_remote_error(
    messages: list[pb.OrchestratorMessage], words: str
) -> None:
    session = open_agent()
    with pytest.raises(RemoteProtocolError, match=words):
        session.receive_batch(messages, 0.0)
    assert isinstance(session.connection_lost(0.0)[-1], s.SessionLost)


@pytest.mark.parametrize(
    "bad", [{"protocol": 4}, {"protocol": 0}, {"heartbeat_interval_ms": 0}, {"max_message_bytes": 1}]
)
def test_an_invalid_welcome_causes_a_remote_error(bad: dict[str, Any]) -> None:
    session = agent()
    session.connection_made(0.0)
    with pytest.raises(RemoteProtocolError, match="welcome"):
        session.receive_batch((welcome(**bad),), 0.0)


def test_a_refusal_is_final_only_if_a_retry_cannot_help() -> None:
    def refused(error: OrkiError) -> tuple[s.AgentSession, list[s.AgentEvent]]:
        session = agent()
        session.connection_made(0.0)
        failure = Failure(reason=error.reason, message=error.message)
        return session, session.receive_batch((pb.OrchestratorMessage(refused=pb.Refused(failure=failure)),), 0.0)

    session, (event,) = refused(ContractMismatch("x.Y differs"))
    assert isinstance(event, s.SessionClosed)
    assert isinstance(event.error, ContractMismatch)
    assert session.state is s.AgentState.ENDED
    with pytest.raises(LocalProtocolError, match="Connected is illegal in state ENDED"):
        session.connection_made(1.0)
    session, (event,) = refused(StoreUnavailable("soon"))
    assert isinstance(event, s.SessionLost)
    assert session.state is s.AgentState.DISCONNECTED


def test_a_silent_orchestrator_loses_the_session() -> None:
    session = agent(hello_timeout=4.0)
    session.connection_made(0.0)
    assert session.next_timer() == 4.0
    assert session.handle_timer(4.0) == [s.SessionLost("the welcome did not arrive in time", True)]
    session.connection_made(5.0)
    session.receive_batch((welcome(),), 5.0)
    session.handle_timer(5.0)
    assert session.handle_timer(11.0) == [s.SessionLost("the orchestrator fell silent", True)]


def test_a_drain_ends_when_the_last_result_is_acknowledged() -> None:
    session = open_agent()
    running(session)
    assert session.drain(0.0) == []
    assert session.drain(0.0) == []
    assert kinds(session) == ["drain"]
    session.receive_batch((pb.OrchestratorMessage(offer=offer(AttemptKey("t2", 1, 9))),), 0.0)
    assert sent(session)[0].declined.failure.reason == Reason.REASON_DRAINING
    session.report(KEY, b"", 0.0)
    session.connection_lost(0.0)
    session.connection_made(0.0)
    session.receive_batch((welcome(keep=[KEY.ref()]),), 0.0)
    assert kinds(session) == ["hello", "drain", "result"]
    acknowledged = pb.OrchestratorMessage(result_acknowledged=pb.ResultAcknowledged(attempt=KEY.ref()))
    assert session.receive_batch((acknowledged,), 0.0)[-1] == s.DrainCompleted()


def test_an_illegal_call_raises_a_local_error() -> None:
    session = open_agent()
    session.receive_batch((pb.OrchestratorMessage(offer=offer()),), 0.0)
    for act in (lambda: session.progress(KEY, b""), lambda: session.report(KEY, b"", 0.0)):
        with pytest.raises(LocalProtocolError, match="OFFERED"):
            act()
    session.accept(KEY, 0.0)
    with pytest.raises(LocalProtocolError, match="Accepted is illegal in state RUNNING"):
        session.accept(KEY, 0.0)
    with pytest.raises(TooLarge):
        session.progress(KEY, b"x" * (1 << 20))
    session.report(KEY, b"", 0.0)
    with pytest.raises(LocalProtocolError, match="REPORTED"):
        session.progress(KEY, b"")
    assert not session.accept(AttemptKey("t0", 1, 1), 0.0)
    assert not session.decline(AttemptKey("t0", 1, 1), StaleFence(""))


@pytest.mark.parametrize(
    "options",
    [
        {"agent_id": "no spaces please"},
        {"instance_id": ""},
        {"slots": 0},
        {"slots": 100_000},
        {"max_message_bytes": 5},
        {"hello_timeout": 0},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        agent(**options)


@pytest.mark.parametrize(
    "options",
    [{"orchestrator_id": ""}, {"heartbeat_interval": 0}, {"hello_timeout": -1}, {"max_message_bytes": 5}],
)
def test_the_orchestrators_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        orchestrator(**options)
    with pytest.raises(InvalidSetting):
        s.BatchBounds(count=0)


def test_a_replaced_agent_starts_nothing() -> None:
    session = open_agent()
    batch = [
        pb.OrchestratorMessage(offer=offer()),
        pb.OrchestratorMessage(replaced=pb.Replaced(successor_instance_id="i2")),
    ]
    arrived, closed = session.receive_batch(batch, 0.0)
    assert isinstance(arrived, s.OffersArrived)
    assert isinstance(closed, s.SessionClosed)
    assert closed.successor == "i2"
    assert not session.accept(KEY, 0.0)
    assert not session.decline(KEY, StaleFence(""))
    assert session.messages_to_send() is None
    assert session.next_timer() is None
    assert session.handle_timer(99.0) == []
