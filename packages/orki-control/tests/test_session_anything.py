"""Both machines survive any messages in any order, or end the session with a typed error."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from orki.control.v1 import session_pb2 as pb
from orki_contract.errors import (
    RemoteProtocolError,
)
from orki_control import session as s
from orki_control.session import AttemptKey, AttemptState

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


def running(session: s.AgentSession, key: AttemptKey = KEY, now: float = 0.0) -> None:
    session.receive_batch((pb.OrchestratorMessage(traceparent=TRACE, offer=offer(key)),), now)
    assert session.accept(key, now)
    sent(session)


keys = st.builds(AttemptKey, st.sampled_from(["t1", "t2", ""]), st.integers(0, 2), st.integers(0, 3))
refs = keys.map(AttemptKey.ref)
agent_bodies = st.one_of(
    refs.map(lambda ref: pb.AgentMessage(accepted=pb.Accepted(attempt=ref))),
    refs.map(lambda ref: pb.AgentMessage(declined=pb.Declined(attempt=ref))),
    refs.map(lambda ref: pb.AgentMessage(progress=pb.Progress(attempt=ref, index=1))),
    refs.map(lambda ref: pb.AgentMessage(result=pb.Result(attempt=ref, response=b"r"))),
    refs.map(lambda ref: pb.AgentMessage(cancel_acknowledged=pb.CancelAcknowledged(attempt=ref))),
    st.lists(refs).map(lambda held: pb.AgentMessage(heartbeat=pb.Heartbeat(number=1, running=held))),
    st.just(pb.AgentMessage(drain=pb.AgentDrain())),
    st.just(pb.AgentMessage(hello=hello())),
    st.just(pb.AgentMessage()),
)
orchestrator_bodies = st.one_of(
    keys.map(lambda key: pb.OrchestratorMessage(offer=offer(key))),
    refs.map(lambda ref: pb.OrchestratorMessage(cancel=pb.Cancel(attempt=ref))),
    refs.map(lambda ref: pb.OrchestratorMessage(directive=pb.Directive(attempt=ref))),
    refs.map(lambda ref: pb.OrchestratorMessage(result_acknowledged=pb.ResultAcknowledged(attempt=ref))),
    refs.map(lambda ref: pb.OrchestratorMessage(refused=pb.Refused(attempt=ref))),
    st.integers(0, 3).map(lambda n: pb.OrchestratorMessage(heartbeat_echo=pb.HeartbeatEcho(number=n))),
    st.sampled_from(
        [
            welcome(),
            pb.OrchestratorMessage(refused=pb.Refused()),
            pb.OrchestratorMessage(drain=pb.OrchestratorDrain()),
            pb.OrchestratorMessage(replaced=pb.Replaced()),
            pb.OrchestratorMessage(),
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(st.lists(agent_bodies, max_size=5), max_size=8), welcomed=st.booleans())
def test_the_orchestrator_survives_any_messages_of_an_agent(
    batches: list[list[pb.AgentMessage]], welcomed: bool
) -> None:
    session = open_orchestrator() if welcomed else orchestrator()
    for now, batch in enumerate(batches):
        if session.free_slots and not session.attempts:
            session.offer(offer(AttemptKey("t1", 1, 1)), TRACE, float(now))
        try:
            session.receive_batch(batch, float(now))
        except RemoteProtocolError:
            assert session.state is s.OrchestratorState.ENDED
        sent(session)
        assert 0 <= session.free_slots <= 2


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(st.lists(orchestrator_bodies, max_size=5), max_size=8), answer=st.booleans())
def test_the_agent_survives_any_messages_of_an_orchestrator(
    batches: list[list[pb.OrchestratorMessage]], answer: bool
) -> None:
    session = open_agent()
    for now, batch in enumerate(batches):
        try:
            events = session.receive_batch(batch, float(now))
        except RemoteProtocolError:
            events = session.connection_lost(float(now))
        for event in events:
            if isinstance(event, s.OffersArrived) and answer:
                for each in event.offers:
                    session.accept(each.attempt, float(now))
        session.handle_timer(float(now))
        sent(session)
        if session.state is s.AgentState.DISCONNECTED:
            session.connection_made(float(now))
        held = [state for state in session.attempts.values() if state is not AttemptState.REPORTED]
        assert len(held) <= 2
