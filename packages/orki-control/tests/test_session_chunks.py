"""Large results and offers travel in chunks: bounded, behind small messages, and whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from orki.control.v1 import session_pb2 as pb
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import RemoteProtocolError
from orki_control import session as s
from orki_control.session import AttemptKey
from orki_control.session._chunks import CHUNK_BYTES, WINDOW_BYTES

MOST = 1 << 22
LARGE = os.urandom(1_000_000)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HUGE = 1 << 40


def key(number: int) -> AttemptKey:
    return AttemptKey(f"t{number}", 1, number)


class Link:
    """Both ends of one session, and the messages between them."""

    def __init__(self, protocol: int = 2, limit: int = 2 * MOST) -> None:
        self.agent = s.AgentSession(
            s.AgentSessionOptions(
                agent_id="a", instance_id="i", services=(), slots=8, max_message_bytes=MOST, max_transfer_bytes=limit
            )
        )
        self.options = s.OrchestratorSessionOptions(
            orchestrator_id="o", max_message_bytes=MOST, max_transfer_bytes=limit
        )
        self.protocol = protocol
        self.sizes: list[int] = []
        self.up: list[str] = []
        self.results: dict[AttemptKey, pb.Result] = {}
        self.offers: dict[AttemptKey, bytes] = {}
        self.connect()

    def connect(self) -> None:
        self.server = s.OrchestratorSession(self.options, 0.0)
        self.agent.connection_made(0.0)
        hello = self.agent.messages_to_send()
        assert hello is not None
        hello.messages[0].hello.protocol_max = self.protocol
        self.server.receive_batch(hello.messages, 0.0)
        keep = [(AttemptKey.of(each.attempt), TRACE) for each in hello.messages[0].hello.held]
        self.server.welcome(session_epoch=1, keep=keep, now=0.0)

    def cut(self) -> None:
        self.server.connection_lost(0.0)
        self.agent.connection_lost(0.0)

    def write_up(self) -> bool:
        batch = self.agent.messages_to_send()
        if batch is None:
            return False
        self.sizes.append(batch.ByteSize())
        self.up += [str(each.WhichOneof("body")) for each in batch.messages]
        for event in self.server.receive_batch(batch.messages, 0.0):
            if isinstance(event, s.ResultsArrived):
                for attempt, result in event.results:
                    self.results[attempt] = result
                    self.server.acknowledge(attempt)
        return True

    def write_down(self) -> bool:
        batch = self.server.messages_to_send()
        if batch is None:
            return False
        self.sizes.append(batch.ByteSize())
        for event in self.agent.receive_batch(batch.messages, 0.0):
            if isinstance(event, s.OffersArrived):
                for attempt, offer, _ in event.offers:
                    self.offers[attempt] = offer.request
                    self.agent.accept(attempt, 0.0)
        return True

    def settle(self) -> None:
        while self.write_down() | self.write_up():
            pass

    def offer(self, number: int, request: bytes = b"") -> None:
        offer = pb.Offer(attempt=key(number).ref(), request=request, lease_ms=10_000, accept_timeout_ms=1_000)
        self.server.offer(offer, TRACE, 0.0)

    def run(self, *numbers: int) -> None:
        for number in numbers:
            self.offer(number)
        self.settle()


def test_a_large_result_and_a_large_request_arrive_whole_in_bounded_messages() -> None:
    link = Link()
    link.offer(1, LARGE)
    link.settle()
    assert link.offers[key(1)] == LARGE
    link.agent.report(key(1), LARGE, 0.0)
    link.settle()
    assert link.results[key(1)].response == LARGE
    assert max(link.sizes) < CHUNK_BYTES + 4096
    assert link.agent.attempts == {}


def test_small_messages_overtake_a_transfer() -> None:
    link = Link()
    link.run(1, 2, 3)
    link.agent.report(key(1), LARGE, 0.0)
    link.write_up()
    link.up.clear()
    link.agent.report(key(2), b"small", 0.0)
    link.server.cancel(key(3), grace_ms=1)
    link.write_down()
    link.write_up()
    assert link.up == ["cancel_acknowledged", "result", "chunk"]
    link.settle()
    assert link.results[key(1)].response == LARGE


def test_unacknowledged_chunks_are_bounded() -> None:
    link = Link()
    link.run(1)
    link.agent.report(key(1), LARGE, 0.0)
    sent = 0
    while (batch := link.agent.messages_to_send()) is not None:
        sent += sum(len(each.chunk.data) for each in batch.messages)
    assert sent == WINDOW_BYTES


def test_transfers_take_turns() -> None:
    link = Link()
    link.run(1, 2)
    link.agent.report(key(1), LARGE * 3, 0.0)
    link.agent.report(key(2), LARGE, 0.0)
    while key(2) not in link.results:
        link.write_down()
        link.write_up()
    assert key(1) not in link.results
    link.settle()
    assert link.results[key(1)].response == LARGE * 3


def test_transfers_under_way_stay_within_the_declared_limit() -> None:
    link = Link(limit=1_500_000)
    link.run(1, 2)
    link.agent.report(key(1), LARGE, 0.0)
    link.agent.report(key(2), LARGE, 0.0)
    link.settle()
    assert {each.response for each in link.results.values()} == {LARGE}
    assert len(link.results) == 2


def test_a_cut_begins_a_transfer_again() -> None:
    link = Link()
    link.run(1)
    link.agent.report(key(1), LARGE, 0.0)
    link.write_up()
    link.write_up()
    link.cut()
    link.connect()
    link.settle()
    assert link.results[key(1)].response == LARGE


def test_a_transfer_of_an_attempt_that_is_withdrawn_is_abandoned() -> None:
    link = Link(limit=1_500_000)
    link.run(2)
    link.offer(1, LARGE)
    link.write_down()
    link.server.handle_timer(5.0)
    link.settle()
    link.offer(3, LARGE)
    link.settle()
    assert set(link.offers) == {key(2), key(3)}


def test_a_peer_with_protocol_1_gets_whole_messages() -> None:
    link = Link(protocol=1)
    link.offer(1, LARGE)
    link.settle()
    link.agent.report(key(1), LARGE, 0.0)
    link.settle()
    assert link.offers[key(1)] == link.results[key(1)].response == LARGE
    assert "chunk" not in link.up


def chunk(**fields: object) -> pb.AgentMessage:
    return pb.AgentMessage(chunk=pb.Chunk(attempt=key(1).ref(), **fields))  # type: ignore[arg-type]


def test_a_transfer_above_the_limit_is_refused() -> None:
    link = Link()
    link.run(1)
    link.server.receive_batch([chunk(transfer=1, total=HUGE, data=b"x")], 0.0)
    link.server.receive_batch([chunk(transfer=1, total=HUGE, offset=1, data=b"x")], 0.0)
    batch = link.server.messages_to_send()
    assert batch is not None
    (message,) = batch.messages
    assert message.refused.failure.reason == Reason.REASON_TOO_LARGE
    assert message.refused.attempt == key(1).ref()


@pytest.mark.parametrize(
    "messages",
    [
        lambda: [chunk(transfer=1, total=4, data=b"ab"), chunk(transfer=1, total=4, offset=3, data=b"d")],
        lambda: [chunk(transfer=1, total=4, data=b"ab"), chunk(transfer=1, total=5, offset=2, data=b"cd")],
        lambda: [chunk(transfer=1, total=2, data=b"abc")],
        lambda: [chunk(transfer=1, total=2, data=b"ab", crc=1)],
        lambda: [chunk(transfer=1, total=2, data=b"")],
        lambda: [pb.AgentMessage(chunk_acknowledged=pb.ChunkAcknowledged(transfer=1, received=1))],
    ],
)
def test_chunks_that_do_not_fit_violate_the_protocol(messages: Callable[[], list[pb.AgentMessage]]) -> None:
    link = Link()
    link.run(1)
    with pytest.raises(RemoteProtocolError):
        link.server.receive_batch(messages(), 0.0)
