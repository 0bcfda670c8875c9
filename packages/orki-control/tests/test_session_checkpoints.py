"""Checkpoints, suspensions and usage between both ends of a session."""

from __future__ import annotations

from typing import Any

import pytest

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import ProtocolVersion, RemoteProtocolError, StoreFull, TooLarge
from orki_control import session as s
from orki_control.session import MAX_CHECKPOINT_BYTES, AttemptKey

KEY = AttemptKey("t1", 1, 7)
NEXT = AttemptKey("t2", 1, 9)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Pair:
    """Both ends of one session, joined, with one accepted attempt."""

    def __init__(self, agent_protocol: int = 3, protocol: int = 3) -> None:
        options = s.AgentSessionOptions(agent_id="a", instance_id="i", services=(), slots=2)
        self.agent = s.AgentSession(options)
        self.agent_protocol = agent_protocol
        self.protocol = protocol
        self.connect()
        self.events = self.settle()
        self.server.offer(self.offer(KEY), TRACE, 0.0)
        self.settle()
        assert self.agent.accept(KEY, 0.0)
        self.settle()

    def offer(self, key: AttemptKey, **fields: Any) -> pb.Offer:
        return pb.Offer(attempt=key.ref(), lease_ms=10_000, accept_timeout_ms=5_000, **fields)

    def connect(self) -> None:
        self.server = s.OrchestratorSession(s.OrchestratorSessionOptions(orchestrator_id="o"), 0.0)
        self.agent.connection_made(0.0)
        hello = self.agent.messages_to_send()
        assert hello is not None
        hello.messages[0].hello.protocol_max = min(self.agent_protocol, self.protocol)
        self.server.receive_batch(hello.messages, 0.0)
        keep = [(AttemptKey.of(each.attempt), TRACE) for each in hello.messages[0].hello.held]
        self.server.welcome(session_epoch=1, keep=keep, now=0.0)

    def cut(self) -> None:
        self.server.connection_lost(0.0)
        self.agent.connection_lost(0.0)

    def settle(self) -> list[Any]:
        """Carry all messages; return the events of both ends."""
        events: list[Any] = []
        moved = True
        while moved:
            moved = False
            while (up := self.agent.messages_to_send()) is not None:
                moved = True
                events += self.server.receive_batch(up.messages, 0.0)
            while (down := self.server.messages_to_send()) is not None:
                moved = True
                events += self.agent.receive_batch(down.messages, 0.0)
        return events


def arrived(events: list[Any]) -> list[tuple[int, bytes]]:
    found = [each for event in events if isinstance(event, s.CheckpointsArrived) for each in event.checkpoints]
    return [(each.number, each.payload) for each in found]


def stored(events: list[Any]) -> list[tuple[int, Reason.ValueType | None]]:
    found = [each for event in events if isinstance(event, s.CheckpointsStored) for each in event.checkpoints]
    return [(each.number, each.failure.reason if each.failure else None) for each in found]


def test_a_checkpoint_is_sent_again_until_it_is_stored() -> None:
    pair = Pair()
    assert pair.agent.save_checkpoint(KEY, b"one") == 1
    assert arrived(pair.settle()) == [(1, b"one")]
    pair.cut()
    pair.connect()
    assert arrived(pair.settle()) == [(1, b"one")]
    pair.server.acknowledge_checkpoint(KEY, 1)
    assert stored(pair.settle()) == [(1, None)]
    pair.cut()
    pair.connect()
    assert arrived(pair.settle()) == []


def test_a_checkpoint_that_is_saved_during_a_cut_is_sent_after_it() -> None:
    pair = Pair()
    pair.cut()
    pair.agent.save_checkpoint(KEY, b"one")
    assert pair.agent.save_checkpoint(KEY, b"two") == 2
    pair.connect()
    # The newer one replaces the older.
    assert arrived(pair.settle()) == [(2, b"two")]


def test_a_checkpoint_comes_before_the_result_of_its_attempt() -> None:
    pair = Pair()
    pair.agent.save_checkpoint(KEY, b"one")
    pair.agent.report(KEY, pb.SuspendedOutcome(question="?"), 0.0)
    events = pair.settle()
    kinds = [type(event) for event in events]
    assert kinds.index(s.CheckpointsArrived) < kinds.index(s.ResultsArrived)
    pair.server.acknowledge_checkpoint(KEY, 1)
    pair.server.acknowledge(KEY)
    assert stored(pair.settle()) == [(1, None)]
    assert not pair.agent.attempts


def test_a_refused_checkpoint_has_its_reason_and_is_not_repeated() -> None:
    pair = Pair()
    pair.agent.save_checkpoint(KEY, b"one")
    pair.settle()
    pair.server.acknowledge_checkpoint(KEY, 1, StoreFull("full"))
    assert stored(pair.settle()) == [(1, Reason.REASON_STORE_FULL)]
    pair.cut()
    pair.connect()
    assert arrived(pair.settle()) == []


def test_a_checkpoint_has_a_maximum_size_at_both_ends() -> None:
    pair = Pair()
    pair.agent.save_checkpoint(KEY, bytes(MAX_CHECKPOINT_BYTES))
    assert len(arrived(pair.settle())[0][1]) == MAX_CHECKPOINT_BYTES
    with pytest.raises(TooLarge, match="checkpoint"):
        pair.agent.save_checkpoint(KEY, bytes(MAX_CHECKPOINT_BYTES + 1))
    large = pb.Checkpoint(attempt=KEY.ref(), number=2, payload=bytes(MAX_CHECKPOINT_BYTES + 1))
    assert arrived(pair.server.receive_batch([pb.AgentMessage(checkpoint=large)], 0.0)) == []
    (answer,) = pair.server.messages_to_send().messages  # type: ignore[union-attr]
    assert answer.checkpoint_acknowledged.failure.reason == Reason.REASON_TOO_LARGE


def test_numbers_of_checkpoints_rise() -> None:
    pair = Pair()
    message = pb.AgentMessage(checkpoint=pb.Checkpoint(attempt=KEY.ref(), number=1))
    pair.server.receive_batch([message], 0.0)
    with pytest.raises(RemoteProtocolError, match="checkpoint 1 came after 1"):
        pair.server.receive_batch([message], 0.0)
    early = pb.CheckpointAcknowledged(attempt=KEY.ref(), number=1)
    with pytest.raises(RemoteProtocolError, match="before it was sent"):
        pair.agent.receive_batch([pb.OrchestratorMessage(checkpoint_acknowledged=early)], 0.0)


def test_only_the_holder_saves_checkpoints() -> None:
    pair = Pair()
    stale = AttemptKey("t1", 1, 6)
    message = pb.AgentMessage(checkpoint=pb.Checkpoint(attempt=stale.ref(), number=1))
    assert pair.server.receive_batch([message], 0.0) == [s.ReportsRefused((stale,))]
    assert pair.agent.save_checkpoint(stale, b"") == 0


def test_an_older_orchestrator_stores_no_checkpoint_and_suspends_nothing() -> None:
    pair = Pair(protocol=2)
    with pytest.raises(ProtocolVersion, match="protocol 2"):
        pair.agent.save_checkpoint(KEY, b"one")
    pair.agent.report(KEY, pb.SuspendedOutcome(question="?"), 0.0)
    (arrived,) = [event for event in pair.settle() if isinstance(event, s.ResultsArrived)]
    # Another attempt follows, as soon as an orchestrator can suspend the task.
    assert arrived.results[0].result.failure.reason == Reason.REASON_ABANDONED


def test_a_checkpoint_that_meets_an_older_orchestrator_after_a_cut_is_refused() -> None:
    pair = Pair()
    pair.agent.save_checkpoint(KEY, b"one")
    pair.cut()
    pair.protocol = 2
    pair.connect()
    assert stored(pair.settle()) == [(1, Reason.REASON_PROTOCOL_VERSION)]


def test_an_offer_carries_checkpoint_and_answer_to_agents_that_know_them() -> None:
    for protocol, kept in ((3, (b"c", b"a", True)), (2, (b"", b"", False))):
        pair = Pair(agent_protocol=protocol)
        offer = pair.offer(NEXT, checkpoint=b"c", answer=b"a", answer_overdue=True)
        pair.server.offer(offer, TRACE, 0.0)
        (event,) = [event for event in pair.settle() if isinstance(event, s.OffersArrived)]
        got = event.offers[0].offer
        assert (got.checkpoint, got.answer, got.answer_overdue) == kept


def totals(events: list[Any]) -> list[int]:
    found = [each for event in events if isinstance(event, s.UsageArrived) for each in event.usages]
    return [each.total.tokens for each in found]


def budgeted() -> Pair:
    pair = Pair()
    pair.server.offer(pair.offer(NEXT, budgets=[BudgetBalance(task_id="t0", budget=Budget(tokens=9))]), TRACE, 0.0)
    pair.settle()
    assert pair.agent.accept(NEXT, 0.0)
    pair.settle()
    return pair


def test_the_newest_total_is_sent_again_after_a_cut_and_with_the_result() -> None:
    pair = budgeted()
    # Only the newest total waits.
    for tokens in (1, 2, 3):
        pair.agent.use(NEXT, Budget(tokens=tokens))
    assert totals(pair.settle()) == [3]
    assert totals(pair.settle()) == []
    pair.cut()
    pair.agent.use(NEXT, Budget(tokens=4))
    pair.connect()
    assert totals(pair.settle()) == [4]
    pair.cut()
    pair.connect()
    assert totals(pair.settle()) == [4]
    pair.agent.report(NEXT, b"r", 0.0)
    for _ in range(2):
        events = pair.settle()
        (arrived,) = [each for event in events if isinstance(event, s.ResultsArrived) for each in event.results]
        assert arrived.result.usage.tokens == 4
        assert totals(events) == []
        pair.cut()
        pair.connect()
    pair.settle()
    pair.server.acknowledge(NEXT)
    pair.settle()
    assert NEXT not in pair.agent.attempts


def test_an_attempt_without_budgets_reports_no_usage() -> None:
    pair = Pair()
    pair.agent.use(KEY, Budget(tokens=1))
    assert totals(pair.settle()) == []
    pair.agent.report(KEY, b"r", 0.0)
    events = pair.settle()
    (arrived,) = [each for event in events if isinstance(event, s.ResultsArrived) for each in event.results]
    assert not arrived.result.HasField("usage")


def test_the_agent_learns_the_state_of_its_budgets_once_it_has_accepted() -> None:
    pair = budgeted()
    balance = BudgetBalance(task_id="t0", budget=Budget(tokens=9), used=Budget(tokens=9))
    pair.server.update_budgets(NEXT, [balance], Budget(tokens=4))
    (event,) = [each for each in pair.settle() if isinstance(each, s.BudgetsChanged)]
    (update,) = event.updates
    assert (update.attempt, list(update.update.budgets), update.update.charged.tokens) == (NEXT, [balance], 4)
    # Whoever asks for an attempt that is gone, or not accepted, gets nothing.
    pair.server.update_budgets(KEY._replace(fence=99), [balance], Budget())
    other = Pair()
    other.server.offer(other.offer(NEXT), TRACE, 0.0)
    other.server.update_budgets(NEXT, [balance], Budget())
    assert not [each for each in other.settle() if isinstance(each, s.BudgetsChanged)]


def test_a_forged_total_of_another_attempt_is_refused() -> None:
    pair = Pair()
    forged = pb.AgentMessage(usage=pb.Usage(attempt=KEY._replace(fence=8).ref(), total=Budget(tokens=1)))
    events = pair.server.receive_batch([forged], 0.0)
    assert totals(events) == []
    assert any(isinstance(each, s.ReportsRefused) for each in events)
