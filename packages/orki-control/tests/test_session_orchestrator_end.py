"""Tests of the orchestrator's end of a session, with agents that keep and break the laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    StaleFence,
    TooLarge,
)
from orki_control import session as s
from orki_control.session import AttemptKey

KEY = AttemptKey("t1", 1, 7)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DIGEST = "sha256:" + "a" * 64


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


def open_orchestrator(**changes: Any) -> s.OrchestratorSession:
    session = orchestrator(**changes)
    session.receive_batch((pb.AgentMessage(hello=hello()),), 0.0)
    session.welcome(session_epoch=1, now=0.0)
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agent_id": ""}, "agent_id"),
        ({"agent_id": "a b"}, "agent_id"),
        ({"agent_id": "a" * 129}, "agent_id"),
        ({"instance_id": ""}, "instance_id"),
        ({"instance_id": "i" * 300}, "instance_id"),
        ({"slots": 0}, "slots"),
        ({"slots": 5000}, "slots"),
        ({"max_message_bytes": 10}, "max_message_bytes"),
        ({"protocol_min": 0}, "protocol versions"),
        ({"protocol_min": 2}, "protocol versions"),
        ({"services": [pb.ServedService(service="x.Y", digest="md5:1")]}, "digest"),
        ({"services": [pb.ServedService(service="", digest=DIGEST)]}, "no name"),
        ({"services": [pb.ServedService(service="x.Y", digest=DIGEST)] * 2}, "twice"),
        ({"held": [pb.HeldAttempt(attempt=AttemptRef(task_id="t"))]}, "held"),
    ],
)
def test_a_malformed_hello_is_refused(changes: dict[str, Any], words: str) -> None:
    session = orchestrator()
    with pytest.raises(RemoteProtocolError, match=words):
        session.receive_batch((pb.AgentMessage(hello=hello(**changes)),), 0.0)
    assert session.state is s.OrchestratorState.ENDED
    assert [each.refused.failure.reason for each in sent(session)] == [Reason.REASON_PROTOCOL_VIOLATION]


def test_an_unsupported_protocol_version_is_refused() -> None:
    session = orchestrator()
    (ended,) = session.receive_batch((pb.AgentMessage(hello=hello(protocol_min=9, protocol_max=10)),), 0.0)
    assert isinstance(ended, s.SessionEnded)
    assert ended.reason == Reason.REASON_PROTOCOL_VERSION
    assert sent(session)[0].refused.failure.reason == Reason.REASON_PROTOCOL_VERSION


def test_no_hello_in_time_ends_the_stream() -> None:
    session = orchestrator(hello_timeout=5.0)
    assert session.next_timer() == 5.0
    assert session.handle_timer(4.9) == []
    (ended,) = session.handle_timer(5.0)
    assert isinstance(ended, s.SessionEnded)
    assert ended.reason == Reason.REASON_HELLO_TIMEOUT
    assert sent(session)[0].refused.failure.reason == Reason.REASON_HELLO_TIMEOUT
    assert session.next_timer() is None


@pytest.mark.parametrize(
    "message",
    [
        pb.AgentMessage(accepted=pb.Accepted(attempt=KEY.ref())),
        pb.AgentMessage(heartbeat=pb.Heartbeat(number=1)),
        pb.AgentMessage(drain=pb.AgentDrain()),
    ],
)
def test_other_messages_before_the_hello_or_the_welcome_are_refused(message: pb.AgentMessage) -> None:
    with pytest.raises(RemoteProtocolError, match="AWAITING_HELLO"):
        orchestrator().receive_batch((message,), 0.0)
    session = orchestrator()
    session.receive_batch((pb.AgentMessage(hello=hello()),), 0.0)
    with pytest.raises(RemoteProtocolError, match="CHECKING_HELLO"):
        session.receive_batch((message,), 0.0)


@pytest.mark.parametrize(
    "act",
    [
        lambda session: session.offer(offer(), TRACE, 0.0),
        lambda session: session.cancel(KEY, grace_ms=1),
        lambda session: session.acknowledge(KEY),
        lambda session: session.echo(1),
        lambda session: session.drain(1),
        lambda session: session.welcome(session_epoch=1, now=0.0),
    ],
)
def test_a_call_before_the_hello_raises_a_local_error(act: Callable[[Any], object]) -> None:
    with pytest.raises(LocalProtocolError, match="AWAITING_HELLO"):
        act(orchestrator())


def test_slots_bound_offers() -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 0.0)
    with pytest.raises(LocalProtocolError, match="on this session already"):
        session.offer(offer(), TRACE, 0.0)
    session.offer(offer(AttemptKey("t2", 1, 8)), TRACE, 0.0)
    assert session.free_slots == 0
    with pytest.raises(LocalProtocolError, match="no slot is free"):
        session.offer(offer(AttemptKey("t3", 1, 9)), TRACE, 0.0)


def test_blocked_handlers_occupy_slots() -> None:
    session = open_orchestrator()
    session.receive_batch((pb.AgentMessage(heartbeat=pb.Heartbeat(number=1, free_slots=1)),), 0.0)
    assert session.free_slots == 1
    session.receive_batch((pb.AgentMessage(heartbeat=pb.Heartbeat(number=2, free_slots=2)),), 0.0)
    assert session.free_slots == 2


def test_an_unanswered_offer_is_withdrawn() -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 1.0)
    sent(session)
    session.receive_batch((pb.AgentMessage(heartbeat=pb.Heartbeat(number=1, free_slots=2)),), 2.9)
    assert session.next_timer() == 3.0
    assert session.handle_timer(3.0) == [s.OffersExpired((KEY,))]
    (word,) = sent(session)
    assert word.refused.failure.reason == Reason.REASON_OFFER_TIMEOUT
    assert word.traceparent == TRACE
    assert session.free_slots == 2
    late = session.receive_batch((pb.AgentMessage(accepted=pb.Accepted(attempt=KEY.ref())),), 3.1)
    assert late == [s.ReportsRefused((KEY,))]
    assert sent(session)[0].refused.failure.reason == Reason.REASON_STALE_FENCE


def test_an_offer_that_expires_in_the_queue_is_never_sent() -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 1.0)
    session.handle_timer(3.0)
    assert kinds(session) == ["refused"]


def test_reports_about_attempts_that_are_not_held_are_refused() -> None:
    session = open_orchestrator()
    stranger = AttemptKey("t9", 1, 99).ref()
    reports = [
        pb.AgentMessage(accepted=pb.Accepted(attempt=stranger)),
        pb.AgentMessage(progress=pb.Progress(attempt=stranger, index=1)),
        pb.AgentMessage(result=pb.Result(attempt=stranger, response=b"")),
        pb.AgentMessage(declined=pb.Declined(attempt=stranger)),
    ]
    (event,) = session.receive_batch(reports, 0.0)
    assert isinstance(event, s.ReportsRefused)
    assert [each.refused.failure.reason for each in sent(session)] == [Reason.REASON_STALE_FENCE] * 4
    assert (
        session.receive_batch((pb.AgentMessage(cancel_acknowledged=pb.CancelAcknowledged(attempt=stranger)),), 0.0)
        == []
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([pb.AgentMessage(heartbeat=pb.Heartbeat(number=2))], "heartbeat 2 came after heartbeat 0"),
        ([pb.AgentMessage(hello=hello())], "Hello is illegal in state OPEN"),
        ([pb.AgentMessage(drain=pb.AgentDrain())] * 2, "AgentDrain is illegal"),
        ([pb.AgentMessage(progress=pb.Progress(attempt=KEY.ref(), index=1))], "Progress is illegal in state OFFERED"),
        ([pb.AgentMessage(result=pb.Result(attempt=KEY.ref(), response=b""))], "Result is illegal in state OFFERED"),
        ([pb.AgentMessage(result=pb.Result(attempt=KEY.ref()))], "without an outcome"),
        (
            [pb.AgentMessage(accepted=pb.Accepted(attempt=KEY.ref()))]
            + [pb.AgentMessage(progress=pb.Progress(attempt=KEY.ref(), index=n)) for n in (2, 2)],
            "progress 2 came after progress 2",
        ),
        (
            [
                pb.AgentMessage(accepted=pb.Accepted(attempt=KEY.ref())),
                pb.AgentMessage(cancel_acknowledged=pb.CancelAcknowledged(attempt=KEY.ref())),
            ],
            "CancelAcknowledged is illegal in state RUNNING",
        ),
    ],
)
def test_an_agent_that_breaks_a_law_is_refused_and_its_session_ends(
    messages: list[pb.AgentMessage], words: str
) -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 0.0)
    sent(session)
    with pytest.raises(RemoteProtocolError, match=words):
        session.receive_batch(messages, 0.0)
    assert session.state is s.OrchestratorState.ENDED
    assert [each.refused.failure.reason for each in sent(session)] == [Reason.REASON_PROTOCOL_VIOLATION]
    assert session.receive_batch((pb.AgentMessage(heartbeat=pb.Heartbeat(number=1)),), 0.0) == []


def test_control_messages_overtake_work_and_batches_are_bounded() -> None:
    session = open_orchestrator(bounds=s.BatchBounds(count=3, size=1000))
    session.offer(offer(), TRACE, 0.0)
    session.offer(offer(AttemptKey("t2", 1, 8)), TRACE, 0.0)
    session.receive_batch((pb.AgentMessage(heartbeat=pb.Heartbeat(number=1, free_slots=2)),), 0.0)
    session.echo(1)
    session.cancel(KEY, grace_ms=5)
    first = session.messages_to_send()
    assert first is not None
    assert [each.WhichOneof("body") for each in first.messages] == ["heartbeat_echo", "cancel", "offer"]
    assert kinds(session) == ["offer"]
    assert session.messages_to_send() is None


def test_the_end_tells_sent_offers_from_unsent_ones() -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 0.0)
    assert session.messages_to_send() is not None
    other = KEY._replace(task_id="t2")
    unsent = offer()
    unsent.attempt.task_id = "t2"
    session.offer(unsent, TRACE, 0.0)
    (ended,) = session.connection_lost(0.0)
    assert (ended.unanswered, ended.unsent, ended.running) == ((KEY,), (other,), ())


def test_calls_after_the_end_of_the_session_have_no_effect() -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 0.0)
    (ended,) = session.connection_lost(0.0)
    assert ended == s.SessionEnded("the stream ended", Reason.REASON_PEER_LOST, (), (), unsent=(KEY,))
    assert session.connection_lost(0.0) == []
    assert not session.acknowledge(KEY)
    assert not session.refuse(KEY, StaleFence("no"))
    assert not session.cancel(KEY, grace_ms=1)
    assert session.drain(5) == ()
    assert session.replace("i2") == []
    assert session.free_slots == 0
    assert sent(session) == []
    with pytest.raises(LocalProtocolError):
        session.offer(offer(), TRACE, 0.0)


def test_a_drain_removes_unsent_offers() -> None:
    session = open_orchestrator()
    session.offer(offer(), TRACE, 0.0)
    assert session.drain(3000) == (KEY,)
    assert session.attempts == {}
    (word,) = sent(session)
    assert word.drain.grace_ms == 3000
    with pytest.raises(LocalProtocolError, match="Offer is illegal in state DRAINING"):
        session.offer(offer(), TRACE, 0.0)


def test_a_silent_agent_ends_its_session_and_keeps_its_leases() -> None:
    session = open_orchestrator(heartbeat_interval=2.0)
    session.offer(offer(), TRACE, 0.0)
    session.receive_batch((pb.AgentMessage(accepted=pb.Accepted(attempt=KEY.ref())),), 1.0)
    assert session.next_timer() == 7.0
    (ended,) = session.handle_timer(7.0)
    assert isinstance(ended, s.SessionEnded)
    assert (ended.running, ended.unanswered) == ((KEY,), ())


def test_only_held_attempts_can_be_kept() -> None:
    session = orchestrator()
    session.receive_batch((pb.AgentMessage(hello=hello()),), 0.0)
    with pytest.raises(LocalProtocolError, match="does not hold"):
        session.welcome(session_epoch=1, keep=[(KEY, TRACE)], now=0.0)


def test_a_message_that_is_too_large_raises_a_local_error() -> None:
    session = open_orchestrator()
    large = offer()
    large.request = b"x" * (1 << 20)
    with pytest.raises(TooLarge, match="agent a accepts messages of at most 1048576 bytes"):
        session.offer(large, TRACE, 0.0)
    session.offer(offer(), TRACE, 0.0)
    session.receive_batch((pb.AgentMessage(accepted=pb.Accepted(attempt=KEY.ref())),), 0.0)
    with pytest.raises(TooLarge):
        session.direct(KEY, b"x" * (1 << 20))
    with pytest.raises(LocalProtocolError, match="did not arrive"):
        session.echo(1)
