"""Ownership of partitions: its transition table, the shares of members, and the delivery machine as an owner."""

from __future__ import annotations

import random
from typing import Any

import pytest

from orki_contract.errors import LocalProtocolError, Reason
from orki_contract.model import Backoff
from orki_events._delivery import DeliveryMachine
from orki_events._delivery_queue import KeyedQueue
from orki_events._delivery_table import (
    Acked,
    Claim,
    CreateGroups,
    Dispatch,
    EntriesClaimed,
    EntriesRead,
    EntriesUnknown,
    Failed,
    GivenUp,
    GiveUp,
    GroupsReady,
    HandBack,
    HandedBack,
    Opened,
    PartitionGained,
    PartitionKept,
    PartitionLost,
    PartitionWithdrawn,
    Read,
    Requested,
    Returned,
    State,
    Succeeded,
)
from orki_events._delivery_windows import DeliverySettings
from orki_events._ownership import (
    LEASE_TRANSITIONS,
    Acquired,
    Expired,
    Extended,
    LeaseState,
    Ownership,
    Released,
    Withdrawn,
)

# Written by hand: the next state for each legal event.
NEXT = {
    ("FREE", "Acquired"): "OWNED",
    ("FREE", "Released"): "FREE",
    ("OWNED", "Extended"): "OWNED",
    ("OWNED", "Expired"): "FREE",
    ("OWNED", "Withdrawn"): "LEAVING",
    ("OWNED", "Released"): "OWNED",
    ("LEAVING", "Extended"): "LEAVING",
    ("LEAVING", "Expired"): "FREE",
    ("LEAVING", "Released"): "FREE",
}
EVENTS = (Acquired(), Extended(), Expired(), Withdrawn(), Released())


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", LeaseState)
def test_each_event_of_a_lease_moves_as_listed_or_is_refused(state: LeaseState, event: object) -> None:
    ownership = Ownership(["a"], "me", 10.0)
    if state is not LeaseState.FREE:
        ownership.receive("a", Acquired())
    if state is LeaseState.LEAVING:
        ownership.receive("a", Withdrawn())
    following = NEXT.get((state.name, type(event).__name__))
    if following is None:
        with pytest.raises(LocalProtocolError, match="partition lease"):
            ownership.receive("a", event)
    else:
        assert ownership.receive("a", event).name == following
    assert {type(each) for each in EVENTS} == LEASE_TRANSITIONS.events()


@pytest.mark.parametrize("partitions", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(20))
def test_members_that_come_and_go_end_with_equal_shares(partitions: int, seed: int) -> None:
    dice = random.Random(seed)
    keys = [f"k{number}" for number in range(partitions)]
    owners: dict[str, str] = {}
    members: dict[str, Ownership] = {}
    for step in range(60):
        if step < 30 and dice.random() < 0.3:
            if members and dice.random() < 0.4:
                gone = dice.choice(list(members))
                del members[gone]
                owners = {key: owner for key, owner in owners.items() if owner != gone}
            else:
                members[f"m{step}"] = Ownership(keys, f"m{step}", 10.0)
        names = sorted(members)
        for name, member in members.items():
            for key in member.excess(names):
                member.receive(key, Withdrawn())
                member.receive(key, Released())
                del owners[key]
            lacking = member.lacking(names)
            for key in member.wanted(names):
                if lacking and key not in owners:
                    owners[key] = name
                    lacking -= 1
                    member.receive(key, Acquired())
                    member.extend(key, 0.0)
    if members:
        counts = [list(owners.values()).count(name) for name in members]
        assert len(owners) == partitions
        assert max(counts) - min(counts) <= 1


def test_a_lease_expires_before_the_server_ends_it() -> None:
    ownership = Ownership(["a", "b"], "me", 10.0)
    ownership.receive("a", Acquired())
    until = ownership.extend("a", 100.0)
    assert 109 < until < 110
    assert ownership.expired(until - 0.01) == []
    assert ownership.expired(until) == ["a"]
    assert ownership.held() == ["a"]


def entry(number: int, key: str) -> list[Any]:
    return [b"%d-0" % number, [b"e", b"", b"d", key.encode()]]


def numbers(entries: list[Any]) -> list[int]:
    return [int(each[0].split(b"-")[0]) for each in entries]


def test_a_keyed_queue_gives_no_entry_of_a_busy_key() -> None:
    queue = KeyedQueue(lambda each: each[1][3], single=True)
    queue.put([entry(1, "a"), entry(2, "a"), entry(3, "b")])
    assert numbers(queue.take(10)) == [1, 3]
    assert queue.take(10) == []
    queue.suspend(b"1-0")
    assert queue.blocked == 1
    queue.put([entry(4, "a"), entry(5, "c")])
    assert queue.blocked == 2
    assert numbers(queue.take(10)) == [5]
    queue.resume(entry(1, "a"))
    assert queue.blocked == 0
    assert numbers(queue.take(10)) == [1]
    queue.release([b"1-0"])
    assert numbers(queue.take(10)) == [2]
    queue.put_back([entry(2, "a")])
    assert numbers(queue.take(10)) == [2]
    assert numbers(queue.clear()) == [4]
    queue.release([b"2-0", b"3-0", b"5-0"])
    assert queue._lanes == queue._lane_of == {}


def test_a_keyed_queue_gives_batches_all_entries_of_a_key() -> None:
    queue = KeyedQueue(lambda each: each[1][3], single=False)
    queue.put([entry(4, "b"), entry(1, "a"), entry(3, "a"), entry(2, "b"), entry(5, "c")])
    assert numbers(queue.take(4)) == [1, 2, 3, 4]
    queue.put([entry(6, "a")])
    assert numbers(queue.take(4)) == [5]
    queue.release([b"1-0"])
    assert queue.take(4) == []
    queue.release([b"3-0"])
    assert numbers(queue.take(4)) == [6]


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_a_keyed_queue_keeps_the_order_under_any_interleaving(seed: int, single: bool) -> None:
    dice = random.Random(seed)
    queue = KeyedQueue(lambda each: each[1][3], single)
    busy: dict[bytes, Any] = {}
    suspended: dict[bytes, Any] = {}
    done: dict[bytes, list[int]] = {}
    made = 0
    for step in range(600):
        match dice.randrange(5):
            case 0 if step < 400:
                queue.put([entry(made + more, dice.choice("abcd")) for more in range(1, 4)])
                made += 3
            case 1:
                for taken in queue.take(dice.randint(1, 4)):
                    key = taken[1][3]
                    if single:
                        assert all(each[1][3] != key for each in busy.values())
                    assert all(each[1][3] != key for each in suspended.values())
                    busy[taken[0]] = taken
            case 2 if busy:
                # Of one key, the first of a batch ends first.
                chosen = min(busy.values(), key=lambda each: numbers([each]))
                del busy[chosen[0]]
                queue.release([chosen[0]])
                done.setdefault(chosen[1][3], []).extend(numbers([chosen]))
            case 3 if busy:
                chosen = max(busy.values(), key=lambda each: numbers([each]))
                del busy[chosen[0]]
                if dice.random() < 0.5:
                    suspended[chosen[0]] = chosen
                    queue.suspend(chosen[0])
                else:
                    queue.put_back([chosen])
            case 4 if suspended:
                chosen = suspended.pop(dice.choice(list(suspended)))
                queue.resume(chosen)
        waiting = {each[1][3] for each in suspended.values()}
        blocked = sum(1 for lane in queue._lanes.values() for _ in lane.queued if lane.key in waiting)
        assert queue.blocked == blocked
    for found in done.values():
        assert found == sorted(found)


SETTINGS = DeliverySettings(
    prefetch=10,
    max_deliveries=3,
    ack_deadline=30.0,
    sweep_interval=10.0,
    hold_limit=300.0,
    backoff=Backoff(initial=1.0, maximum=8.0),
    retry_entries=4,
    key_of=lambda each: each[1][3],
    read_time=1.0,
)
KEYS = ("p0", "p1")


class Bench:
    """A machine that reads an ordered stream, and its last commands."""

    def __init__(self) -> None:
        self.machine = DeliveryMachine(KEYS, SETTINGS)
        self.now = 100.0
        self.asked = self.machine.receive(Opened(), self.now)
        self.tell(GroupsReady(self.one(CreateGroups)))

    def tell(self, event: Any) -> list[Any]:
        self.asked = self.machine.receive(event, self.now)
        return self.asked

    def later(self, seconds: float) -> list[Any]:
        self.now += seconds
        self.asked = self.machine.handle_timer(self.now)
        return self.asked

    def all(self, kind: type) -> list[Any]:
        return [command for command in self.asked if type(command) is kind]

    def one(self, kind: type) -> Any:
        (found,) = self.all(kind)
        return found

    def owning(self, key: str = "p0") -> Any:
        """Gain a partition without pending entries, and return the read of its new entries."""
        self.tell(PartitionGained(key, self.now + 28))
        self.later(0)
        claim = self.one(Claim)
        assert claim.takeover
        self.tell(EntriesClaimed(claim, b"0-0", [], {}, ()))
        return self.one(Read)


def test_nothing_is_read_without_ownership() -> None:
    bench = Bench()
    assert bench.machine.state is State.READING
    assert bench.asked == []
    assert bench.later(1_000) == []
    assert bench.machine.next_timer() is None


def test_pending_entries_are_taken_over_before_new_ones_are_read() -> None:
    bench = Bench()
    bench.tell(PartitionGained("p0", 128.0))
    bench.later(0)
    claim = bench.one(Claim)
    assert (claim.cursor, claim.takeover) == (b"0-0", True)
    bench.tell(EntriesClaimed(claim, b"2-0", [entry(1, "a")], {}, ()))
    assert bench.all(Read) == []
    bench.later(0)
    claim = bench.one(Claim)
    assert (claim.cursor, claim.takeover) == (b"2-0", True)
    bench.tell(EntriesClaimed(claim, b"0-0", [entry(2, "a")], {}, ()))
    assert [key for key, _ in bench.one(Read).positions] == ["p0"]
    bench.later(10)
    assert not bench.one(Claim).takeover


def test_no_read_outlives_the_lease_and_no_entry_is_dispatched_after_it() -> None:
    bench = Bench()
    read = bench.owning()
    bench.tell(EntriesRead(read, {"p0": [entry(1, "a"), entry(2, "b")]}, {}))
    read = bench.one(Read)
    bench.now += 27.5
    bench.tell(EntriesRead(read, {}, {}))
    assert bench.all(Read) == []
    bench.tell(Requested(1))
    assert numbers(bench.one(Dispatch).entries) == [1]
    bench.now += 1
    bench.tell(Requested(1))
    assert bench.all(Dispatch) == []
    assert not bench.machine.may_begin("p0", b"1-0", bench.now)
    bench.tell(PartitionKept("p0", bench.now + 20))
    assert numbers(bench.one(Dispatch).entries) == [2]
    assert len(bench.all(Read)) == 1


def test_a_lost_partition_leaves_only_running_handlers_and_no_hand_back() -> None:
    bench = Bench()
    read = bench.owning()
    bench.tell(EntriesRead(read, {"p0": [entry(1, "a"), entry(2, "b"), entry(3, "a")]}, {}))
    read = bench.one(Read)
    bench.tell(Requested(1))
    bench.tell(PartitionLost("p0"))
    assert bench.machine.held == 1
    assert bench.asked == []
    bench.tell(EntriesRead(read, {"p0": [entry(4, "c")]}, {}))
    assert bench.machine.held == 1
    bench.tell(Requested(5))
    assert bench.all(Dispatch) == []
    bench.tell(Failed("p0", [entry(1, "a")], Reason.REASON_HANDLER_FAILED, "boom"))
    assert bench.machine.held == 0
    assert bench.asked == []


@pytest.mark.parametrize("again", [False, True])
def test_a_partition_that_is_lost_after_an_unanswered_read_does_not_stop_the_consumer(again: bool) -> None:
    bench = Bench()
    read = bench.owning()
    bench.tell(EntriesUnknown(read))
    bench.tell(PartitionLost("p0"))
    assert bench.machine.state is State.READING
    if again:
        bench.tell(PartitionGained("p0", bench.now + 28))
    bench.later(10)
    assert bench.machine.state is State.READING
    if not again:
        bench.owning("p1")


def test_a_claim_from_before_a_loss_does_not_end_the_next_takeover() -> None:
    bench = Bench()
    bench.tell(PartitionGained("p0", 128.0))
    bench.later(0)
    stale = bench.one(Claim)
    bench.tell(PartitionLost("p0"))
    bench.tell(PartitionGained("p0", 228.0))
    bench.tell(EntriesClaimed(stale, b"0-0", [], {}, ()))
    assert bench.all(Read) == []
    bench.later(0)
    claim = bench.one(Claim)
    assert claim.takeover
    bench.tell(EntriesClaimed(claim, b"0-0", [], {}, ()))
    assert len(bench.all(Read)) == 1


def test_a_withdrawn_partition_is_given_up_when_its_handlers_have_ended() -> None:
    bench = Bench()
    read = bench.owning()
    bench.tell(EntriesRead(read, {"p0": [entry(1, "a"), entry(2, "b"), entry(3, "a")]}, {}))
    read = bench.one(Read)
    bench.tell(Requested(1))
    bench.tell(PartitionWithdrawn("p0"))
    back = bench.one(HandBack)
    assert back.deliveries == {b"2-0": 0, b"3-0": 0}
    bench.tell(HandedBack(back))
    bench.tell(EntriesRead(read, {"p0": [entry(4, "c")]}, {}))
    late = bench.one(HandBack)
    assert late.deliveries == {b"4-0": 0}
    bench.tell(HandedBack(late))
    assert bench.all(GiveUp) == []
    bench.tell(Succeeded("p0", [b"1-0"]))
    (ack,) = bench.asked
    bench.tell(Acked(ack, 1))
    bench.tell(GivenUp(bench.one(GiveUp)))
    assert bench.asked == []
    bench.tell(PartitionGained("p0", bench.now + 28))
    bench.later(0)
    assert bench.one(Claim).takeover


def test_an_entry_that_waits_blocks_its_key_and_in_the_end_the_reading() -> None:
    bench = Bench()
    read = bench.owning()
    bench.tell(EntriesRead(read, {"p0": [entry(1, "a"), entry(2, "a"), entry(3, "b")]}, {}))
    read = bench.one(Read)
    bench.tell(Requested(5))
    assert numbers(bench.one(Dispatch).entries) == [1, 3]
    bench.tell(Failed("p0", [entry(1, "a")], Reason.REASON_HANDLER_FAILED, "boom"))
    bench.tell(Succeeded("p0", [b"3-0"]))
    bench.tell(Requested(5))
    assert bench.all(Dispatch) == []
    # Two of four places behind retries are taken; each of two partitions has two.
    bench.tell(EntriesRead(read, {}, {}))
    assert bench.all(Read) == []
    bench.later(1)
    assert numbers(bench.one(Dispatch).entries) == [1]
    bench.tell(Returned("p0", [entry(1, "a")]))
    bench.tell(Requested(5))
    assert numbers(bench.one(Dispatch).entries) == [1]
    bench.tell(Succeeded("p0", [b"1-0"]))
    bench.tell(Requested(5))
    assert numbers(bench.one(Dispatch).entries) == [2]
