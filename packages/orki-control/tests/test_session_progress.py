"""Progress between both ends of a session and a store: no delta is lost silently."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orki.control.v1 import session_pb2 as pb
from orki_contract import ProgressPolicy
from orki_contract.errors import Overloaded, RemoteProtocolError
from orki_control import session as s
from orki_control.session import AttemptKey

KEY = AttemptKey("t1", 1, 7)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WINDOW = 4
STEPS = ("send", "send", "up", "down", "store", "cut", "link")


class Model:
    """One attempt of one agent, the streams between it and an orchestrator, and a store that answers late."""

    def __init__(self, policy: ProgressPolicy = ProgressPolicy.BLOCK, protocol: int = 2) -> None:
        options = s.AgentSessionOptions(
            agent_id="a",
            instance_id="i",
            services=(),
            slots=1,
            progress_window=WINDOW,
            progress_bytes=1000,
            bounds=s.BatchBounds(count=2, size=10_000),
        )
        self.agent = s.AgentSession(options)
        self.policy = policy
        self.protocol = protocol
        self.server: s.OrchestratorSession | None = None
        self.up: deque[pb.ConnectRequest] = deque()
        self.down: deque[pb.ConnectResponse] = deque()
        self.waiting: deque[tuple[s.OrchestratorSession, s.ArrivedProgress | None]] = deque()
        self.sent = 0
        self.last = 0
        self.log: list[tuple[int, bool]] = []
        self.ended = False
        self.full = False
        self.postponed: list[s.OrchestratorSession] = []
        self.link()
        offer = pb.Offer(attempt=KEY.ref(), lease_ms=10_000, accept_timeout_ms=5_000)
        assert self.server is not None
        self.server.offer(offer, TRACE, 0.0)
        self.settle()
        self.agent.accept(KEY, 0.0)
        self.settle()

    def link(self) -> None:
        if self.server is not None:
            return
        self.server = s.OrchestratorSession(s.OrchestratorSessionOptions(orchestrator_id="o"), 0.0)
        self.agent.connection_made(0.0)
        hello = self.agent.messages_to_send()
        assert hello is not None
        hello.messages[0].hello.protocol_max = self.protocol
        self.server.receive_batch(hello.messages, 0.0)
        keep = [(KEY, TRACE)] if hello.messages[0].hello.held else []
        self.server.welcome(session_epoch=1, keep=keep, now=0.0)
        self.read_down()

    def cut(self) -> None:
        if self.server is not None:
            self.server.connection_lost(0.0)
            self.agent.connection_lost(0.0)
            self.up.clear()
            self.down.clear()
            self.server = None

    def send(self) -> None:
        """The handler sends progress; it waits if the policy says so."""
        if self.policy is ProgressPolicy.BLOCK and self.agent.unstored(KEY)[0] >= WINDOW:
            return
        self.sent += 1
        assert self.agent.progress(KEY, b"%d" % self.sent, self.policy)

    def write_up(self) -> None:
        if self.server is not None and (batch := self.agent.messages_to_send()) is not None:
            self.up.append(batch)

    def read_up(self) -> None:
        if self.server is not None and self.up:
            for event in self.server.receive_batch(self.up.popleft().messages, 0.0):
                if isinstance(event, s.ProgressArrived) and self.full and self.server.acknowledges:
                    self.postponed.append(self.server)
                elif isinstance(event, s.ProgressArrived):
                    self.waiting.extend((self.server, each) for each in event.progress)
                elif isinstance(event, s.ResultsArrived):
                    last = event.results[0].result.progress
                    if last:
                        self.waiting.append((self.server, s.ArrivedProgress(KEY, last, b"", last - 1)))
                    self.waiting.append((self.server, None))

    def read_down(self) -> None:
        if self.server is not None:
            while (batch := self.server.messages_to_send()) is not None:
                self.down.append(batch)
            while self.down:
                events = self.agent.receive_batch(self.down.popleft().messages, 0.0)
                for event in events:
                    if isinstance(event, s.AttemptsRevoked):
                        raise AssertionError(f"the attempt was revoked: {event}")

    def toggle(self) -> None:
        """The store takes no progress for a while; what arrives is set aside."""
        self.full = not self.full
        if not self.full:
            for server in self.postponed:
                server.replay_progress(KEY)
            self.postponed.clear()

    def store(self) -> None:
        """Apply the next operation and answer it, perhaps to a session that has ended."""
        if not self.waiting:
            return
        server, arrived = self.waiting.popleft()
        if arrived is None:
            self.ended = True
            server.acknowledge(KEY)
            return
        missing = arrived.number - self.last - 1
        if self.ended or missing < 0:
            server.acknowledge_progress(KEY, arrived.number if self.ended else self.last)
        elif missing > arrived.missing:
            server.replay_progress(KEY, self.last)
        else:
            self.log += [(index, False) for index in range(self.last + 1, arrived.number)]
            self.log.append((arrived.number, bool(arrived.payload)))
            if arrived.payload:
                assert arrived.payload == b"%d" % arrived.number
            self.last = arrived.number
            server.acknowledge_progress(KEY, self.last)

    def lose(self) -> None:
        """The store comes back without its newest entries."""
        del self.log[self.last // 2 :]
        self.last //= 2

    def step(self, name: str) -> None:
        steps: dict[str, Callable[[], None]] = {
            "send": self.send,
            "store": self.store,
            "cut": self.cut,
            "link": self.link,
            "lose": self.lose,
            "full": self.toggle,
        }
        if name == "up":
            self.write_up()
            self.read_up()
        elif name == "write":
            self.write_up()
        elif name == "down":
            self.read_down()
        else:
            steps[name]()

    def settle(self) -> None:
        self.link()
        if self.full:
            self.toggle()
        for _ in range(60):
            for name in ("up", "up", "store", "store", "store", "down"):
                self.step(name)

    def finish(self) -> list[int]:
        """End the attempt; return the numbers of the missing deltas."""
        self.settle()
        self.agent.report(KEY, b"", 0.0)
        self.settle()
        assert not self.agent.attempts
        assert [index for index, _ in self.log] == list(range(1, self.sent + 1)), "a delta is lost silently or doubled"
        return [index for index, kept in self.log if not kept]


@given(st.lists(st.sampled_from((*STEPS, "write", "full")), max_size=80))
def test_no_delta_is_lost_or_doubled_whatever_happens(steps: list[str]) -> None:
    model = Model()
    for name in steps:
        model.step(name)
    assert model.finish() == []


@given(
    st.lists(st.sampled_from((*STEPS, "write", "full", "lose")), max_size=80),
    st.sampled_from(list(ProgressPolicy)),
    st.sampled_from([1, 2]),
)
def test_every_gap_is_explicit_whatever_happens(steps: list[str], policy: ProgressPolicy, protocol: int) -> None:
    model = Model(policy, protocol)
    for name in steps:
        model.step(name)
    if protocol == 1:
        # This protocol has no marker: what is lost at the end shows only when another delta follows.
        model.policy = ProgressPolicy.BLOCK
        model.settle()
        model.send()
    model.finish()


def test_progress_that_a_cut_swallows_is_sent_again() -> None:
    model = Model()
    for _ in range(3):
        model.send()
    model.write_up()
    model.write_up()
    model.cut()
    model.link()
    model.send()
    assert model.finish() == []
    assert model.sent == 4


def test_credits_return_when_progress_is_stored_and_not_when_it_is_sent() -> None:
    model = Model()
    for _ in range(WINDOW):
        model.send()
    with pytest.raises(Overloaded, match="not stored yet"):
        model.agent.progress(KEY, b"x")
    for _ in range(3):
        model.step("up")
    assert model.agent.unstored(KEY)[0] == WINDOW
    model.store()
    model.store()
    model.read_down()
    assert model.agent.unstored(KEY) == (2, 2)


def test_the_window_is_bounded_in_bytes_and_takes_a_large_delta_alone() -> None:
    model = Model()
    model.agent.progress(KEY, b"x" * 5_000)
    with pytest.raises(Overloaded):
        model.agent.progress(KEY, b"x")


def test_acknowledgements_are_cumulative_and_batched() -> None:
    model = Model()
    for _ in range(WINDOW):
        model.send()
    for _ in range(3):
        model.step("up")
    for _ in range(WINDOW):
        model.store()
    assert model.server is not None
    batch = model.server.messages_to_send()
    assert batch is not None
    (message,) = batch.messages
    assert message.progress_acknowledged == pb.ProgressAcknowledged(attempt=KEY.ref(), index=WINDOW)
    assert message.traceparent == TRACE


@pytest.mark.parametrize(
    ("policy", "kept"),
    [(ProgressPolicy.KEEP_LATEST, [1, 2, 3, 4, 20]), (ProgressPolicy.DROP, [1, 2, 3, 4])],
)
def test_a_full_window_follows_the_policy(policy: ProgressPolicy, kept: list[int]) -> None:
    model = Model(policy)
    for number in range(1, 21):
        model.send()
        if number == WINDOW:
            for _ in range(4):
                model.step("up")
    missing = model.finish()
    assert [index for index in range(1, 21) if index not in missing] == kept


def test_a_gap_without_a_count_is_refused_until_it_is_explicit() -> None:
    model = Model()
    for _ in range(6):
        model.send()
        model.settle()
    model.lose()
    model.send()
    assert model.finish() == [4, 5, 6]


def test_a_gap_within_a_session_violates_the_protocol() -> None:
    model = Model()
    model.send()
    model.settle()
    assert model.server is not None
    wrong = pb.AgentMessage(progress=pb.Progress(attempt=KEY.ref(), index=3, payload=b""))
    with pytest.raises(RemoteProtocolError, match="progress 3 came after progress 1"):
        model.server.receive_batch([wrong], 0.0)


@pytest.mark.parametrize(("index", "missing"), [(0, 0), (2, 2), (3, 9)])
def test_progress_that_counts_too_much_violates_the_protocol(index: int, missing: int) -> None:
    model = Model()
    assert model.server is not None
    wrong = pb.AgentMessage(progress=pb.Progress(attempt=KEY.ref(), index=index, missing=missing))
    with pytest.raises(RemoteProtocolError, match="cannot follow"):
        model.server.receive_batch([wrong], 0.0)


def test_an_acknowledgement_of_unsent_progress_violates_the_protocol() -> None:
    model = Model()
    model.send()
    acknowledged = pb.ProgressAcknowledged(attempt=KEY.ref(), index=1)
    with pytest.raises(RemoteProtocolError, match="before it was sent"):
        model.agent.receive_batch([pb.OrchestratorMessage(progress_acknowledged=acknowledged)], 0.0)


def test_an_orchestrator_with_protocol_1_stores_progress_by_taking_it() -> None:
    model = Model(protocol=1)
    for _ in range(WINDOW):
        model.send()
    for _ in range(3):
        model.step("up")
    assert model.agent.unstored(KEY) == (0, 0)
    assert model.finish() == []


def directive(model: Model, payload: bytes) -> int:
    assert model.server is not None
    return model.server.direct(KEY, payload)


def test_a_directive_is_acknowledged_with_its_fate() -> None:
    model = Model()
    assert [directive(model, b"one"), directive(model, b"two")] == [1, 2]
    model.read_down()
    model.agent.report(KEY, b"", 0.0)
    directive(model, b"late")
    model.read_down()
    answers = []
    assert model.server is not None
    while (batch := model.agent.messages_to_send()) is not None:
        for event in model.server.receive_batch(batch.messages, 0.0):
            if isinstance(event, s.DirectivesAcknowledged):
                answers += event.answers
    assert [(each.number, each.delivered) for each in answers] == [(1, True), (2, True), (3, False)]


def test_a_directive_to_an_agent_with_protocol_1_has_no_number() -> None:
    model = Model(protocol=1)
    assert directive(model, b"one") == 1
    assert model.server is not None
    assert not model.server.acknowledges
    batch = model.server.messages_to_send()
    assert batch is not None
    assert batch.messages[0].directive.number == 0
