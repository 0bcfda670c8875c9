"""The delivery machine: its transition table and its behaviour in single cases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from orki_contract.errors import LocalProtocolError, Reason, RemoteProtocolError
from orki_contract.model import Backoff
from orki_events._delivery import DeliveryMachine
from orki_events._delivery_partition import Partition
from orki_events._delivery_table import (
    TRANSITIONS,
    Ack,
    Acked,
    Claim,
    CreateGroups,
    DeadLetter,
    DeadLettered,
    Dispatch,
    Drained,
    DrainRequested,
    EntriesClaimed,
    EntriesRead,
    EntriesUnknown,
    Failed,
    GivenUp,
    GiveUp,
    GroupMissing,
    GroupsReady,
    HandBack,
    HandedBack,
    Opened,
    Outcome,
    PartitionGained,
    PartitionKept,
    PartitionLost,
    PartitionWithdrawn,
    Read,
    ReadDue,
    Recovered,
    Renew,
    RenewalDue,
    Renewed,
    RepeatDue,
    Requested,
    RetryDue,
    Returned,
    State,
    Succeeded,
    SweepDue,
    Unanswered,
)
from orki_events._delivery_windows import DeliverySettings

# Written by hand: the legal events of each state, by the next state.
REPLIES = "EntriesRead EntriesClaimed Acked DeadLettered Renewed HandedBack Unanswered"
CALLS = "Returned Succeeded Failed"
OWNERSHIP = "PartitionGained PartitionKept PartitionLost PartitionWithdrawn GivenUp"
LEGAL = {
    "NEW": {"CREATING": "Opened", "CLOSED": "DrainRequested"},
    "CREATING": {
        "RECOVERING": "GroupsReady",
        "CREATING": f"{REPLIES} EntriesUnknown GroupMissing Requested {CALLS} RepeatDue RetryDue RenewalDue ReadDue"
        f" {OWNERSHIP}",
        "DRAINING": "DrainRequested",
    },
    "RECOVERING": {
        "RECOVERING": f"{REPLIES} EntriesUnknown Requested {CALLS} RepeatDue RetryDue RenewalDue ReadDue {OWNERSHIP}",
        "CREATING": "GroupMissing",
        "READING": "Recovered",
        "DRAINING": "DrainRequested",
    },
    "READING": {
        "READING": f"{REPLIES} Requested {CALLS} RepeatDue RetryDue RenewalDue ReadDue SweepDue {OWNERSHIP}",
        "RECOVERING": "EntriesUnknown",
        "CREATING": "GroupMissing",
        "DRAINING": "DrainRequested",
    },
    "DRAINING": {
        "DRAINING": f"GroupsReady {REPLIES} EntriesUnknown GroupMissing {CALLS} RepeatDue RenewalDue ReadDue"
        " DrainRequested PartitionKept PartitionLost GivenUp",
        "CLOSED": "Drained",
    },
    "CLOSED": {"CLOSED": "DrainRequested"},
}
NEXT = {
    (state, event): following
    for state, row in LEGAL.items()
    for following, events in row.items()
    for event in events.split()
}
SETTINGS = DeliverySettings(
    prefetch=10,
    max_deliveries=3,
    ack_deadline=30.0,
    sweep_interval=10.0,
    hold_limit=300.0,
    backoff=Backoff(initial=1.0, maximum=8.0),
)
KEY = "orki:ev:{s}"


def entry(number: int) -> list[Any]:
    return [b"%d-0" % number, [b"e", b"", b"d", b""]]


class Bench:
    """A machine and its last commands."""

    def __init__(self, settings: DeliverySettings = SETTINGS, keys: tuple[str, ...] = (KEY,)) -> None:
        self.machine = DeliveryMachine(keys, settings)
        self.now = 100.0
        self.asked: list[Any] = []

    def tell(self, event: Any) -> list[Any]:
        self.asked = self.machine.receive(event, self.now)
        return self.asked

    def later(self, seconds: float) -> list[Any]:
        self.now += seconds
        self.asked = self.machine.handle_timer(self.now)
        return self.asked

    def one(self, kind: type) -> Any:
        (found,) = [command for command in self.asked if type(command) is kind]
        return found

    def reading(self) -> Any:
        """Advance to the first read of new entries and return it; the concurrent sweep is answered."""
        self.tell(Opened())
        self.tell(GroupsReady(self.one(CreateGroups)))
        self.tell(EntriesRead(self.one(Read), {}, {}))
        read = self.one(Read)
        self.later(0)
        self.tell(EntriesClaimed(self.one(Claim), b"0-0", [], {}, ()))
        return read

    def holding(self, count: int) -> list[Any]:
        """Advance to a dispatch of `count` entries and return them."""
        self.tell(EntriesRead(self.reading(), {KEY: [entry(number) for number in range(1, count + 1)]}, {}))
        self.tell(Requested(count))
        return self.one(Dispatch).entries

    def drained(self) -> None:
        self.tell(DrainRequested())


def in_state(state: State) -> Bench:
    bench = Bench()
    if state is State.NEW:
        return bench
    if state is State.CREATING:
        bench.tell(Opened())
    elif state is State.RECOVERING:
        bench.tell(Opened())
        bench.tell(GroupsReady(bench.one(CreateGroups)))
    elif state is State.READING:
        bench.reading()
    elif state is State.DRAINING:
        bench.reading()
        bench.drained()
    else:
        bench.drained()
    assert bench.machine.state is state
    return bench


SAMPLES: dict[str, Any] = {
    "Opened": Opened(),
    "GroupsReady": GroupsReady(CreateGroups()),
    "EntriesRead": EntriesRead(Read((), 1, False), {}, {}),
    "EntriesClaimed": EntriesClaimed(Claim(KEY, b"0-0", 1), b"0-0", [], {}, ()),
    "Acked": Acked(Ack(KEY, [], Outcome.PROCESSED), 0),
    "DeadLettered": DeadLettered(DeadLetter(KEY, ())),
    "Renewed": Renewed(Renew(KEY, []), ()),
    "HandedBack": HandedBack(HandBack(KEY, {})),
    "Unanswered": Unanswered(CreateGroups()),
    "EntriesUnknown": EntriesUnknown(Claim(KEY, b"0-0", 1)),
    "GroupMissing": GroupMissing(Renew(KEY, [])),
    "Requested": Requested(1),
    "Returned": Returned(KEY, [entry(1)]),
    "Succeeded": Succeeded(KEY, [b"1-0"]),
    "Failed": Failed(KEY, [entry(1)], Reason.REASON_HANDLER_FAILED, "no"),
    "DrainRequested": DrainRequested(),
    "PartitionGained": PartitionGained("other", 200.0),
    "PartitionKept": PartitionKept("other", 200.0),
    "PartitionLost": PartitionLost("other"),
    "PartitionWithdrawn": PartitionWithdrawn("other"),
    "GivenUp": GivenUp(GiveUp("other")),
    "RepeatDue": RepeatDue(),
    "RetryDue": RetryDue(),
    "RenewalDue": RenewalDue(),
    "SweepDue": SweepDue(),
    "ReadDue": ReadDue(),
    "Recovered": Recovered(),
    "Drained": Drained(),
}


def test_the_table_lists_the_transitions_written_by_hand() -> None:
    listed = {
        (state.name, event.__name__): following.name
        for state, row in TRANSITIONS.rows.items()
        for event, following in row.items()
    }
    assert listed == NEXT
    assert {event.__name__ for event in TRANSITIONS.events()} == SAMPLES.keys()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("state", State)
def test_each_event_moves_as_listed_or_is_refused(state: State, name: str) -> None:
    bench = in_state(state)
    event = SAMPLES[name]
    if (command := getattr(event, "command", None)) is not None:
        bench.machine._open.add(command)
    bench.machine._partitions[KEY].held[b"1-0"] = bench.now, 0
    bench.machine._partitions["other"] = Partition("other")
    if (state.name, name) in NEXT:
        bench.tell(event)
        assert bench.machine.state.name == NEXT[state.name, name]
    else:
        with pytest.raises(LocalProtocolError, match=f"delivery: {name} is illegal in state {state.name}"):
            bench.tell(event)
        assert bench.machine.state is state


@pytest.mark.parametrize(
    "name", ["GroupsReady", "EntriesRead", "EntriesClaimed", "Acked", "DeadLettered", "Renewed", "Unanswered"]
)
def test_a_reply_to_an_unknown_command_is_a_local_error(name: str) -> None:
    bench = in_state(State.CREATING)
    with pytest.raises(LocalProtocolError, match="answered twice or never issued"):
        bench.tell(SAMPLES[name])


def test_settling_an_entry_that_is_not_held_is_a_local_error() -> None:
    bench = Bench()
    bench.holding(1)
    with pytest.raises(LocalProtocolError, match=r"9-0 of .* is not held"):
        bench.tell(Succeeded(KEY, [b"9-0"]))
    with pytest.raises(LocalProtocolError, match="not a partition"):
        bench.tell(Succeeded("elsewhere", [b"1-0"]))
    with pytest.raises(LocalProtocolError, match="0 entries requested"):
        bench.tell(Requested(0))


def test_entries_of_a_key_that_was_not_read_are_a_remote_error() -> None:
    bench = Bench()
    read = bench.reading()
    with pytest.raises(RemoteProtocolError, match="which was not read"):
        bench.tell(EntriesRead(read, {"orki:ev:{other}": [entry(1)]}, {}))


def test_pending_entries_are_read_before_new_ones() -> None:
    bench = Bench()
    bench.tell(Opened())
    bench.tell(GroupsReady(bench.one(CreateGroups)))
    first = bench.one(Read)
    assert (first.positions, first.history) == (((KEY, b"0-0"),), True)
    bench.tell(EntriesRead(first, {KEY: [entry(1), entry(2)]}, {KEY: {b"1-0": 2}}))
    second = bench.one(Read)
    assert (second.positions, second.history) == (((KEY, b"2-0"),), True)
    bench.tell(EntriesRead(second, {}, {}))
    assert bench.one(Read).history is False
    bench.tell(Requested(5))
    assert bench.one(Dispatch).deliveries == {b"1-0": 2}


def test_pending_entries_are_read_again_after_an_unanswered_read() -> None:
    bench = Bench()
    bench.tell(EntriesUnknown(bench.reading()))
    assert bench.machine.state is State.RECOVERING
    assert bench.asked == []
    bench.later(1.0)
    read = bench.one(Read)
    assert (read.positions, read.history) == (((KEY, b"0-0"),), True)


def test_reading_held_entries_again_does_not_count_as_a_delivery() -> None:
    bench = Bench()
    bench.tell(EntriesRead(bench.reading(), {KEY: [entry(1), entry(2)]}, {}))
    waiting = bench.one(Read)
    bench.later(10)
    bench.tell(EntriesUnknown(bench.one(Claim)))
    bench.tell(Requested(2))
    bench.tell(EntriesRead(waiting, {}, {}))
    bench.tell(EntriesRead(bench.one(Read), {KEY: [entry(1), entry(2), entry(3)]}, {KEY: {b"1-0": 2, b"2-0": 2}}))
    renew = bench.one(Renew)
    assert (renew.entry_ids, renew.deliveries) == ([b"1-0", b"2-0"], 1)
    bench.tell(Requested(9))
    assert [each[0] for each in bench.one(Dispatch).entries] == [b"3-0"]


def test_acknowledgements_are_batched_while_another_one_is_in_progress() -> None:
    bench = Bench()
    bench.holding(4)
    bench.tell(Succeeded(KEY, [b"1-0"]))
    ack = bench.one(Ack)
    assert (ack.entry_ids, ack.outcome) == ([b"1-0"], Outcome.PROCESSED)
    assert not any(isinstance(each, Ack) for each in bench.tell(Succeeded(KEY, [b"2-0"])))
    bench.tell(Succeeded(KEY, [b"3-0", b"4-0"]))
    bench.tell(Acked(ack, 1))
    assert bench.one(Ack).entry_ids == [b"2-0", b"3-0", b"4-0"]


def test_a_failed_entry_is_retried_with_growing_waits_and_then_dead_lettered() -> None:
    bench = Bench()
    (poison,) = bench.holding(1)
    waits = []
    for delivery in (2, 3):
        bench.tell(Failed(KEY, [poison], Reason.REASON_HANDLER_FAILED, "boom"))
        due = min(each[0] for each in bench.machine._retries)
        waits.append(due - bench.now)
        bench.later(due - bench.now)
        assert bench.one(Renew).deliveries == delivery
        bench.tell(Requested(1))
        assert bench.one(Dispatch).deliveries == {b"1-0": delivery}
    assert waits == [1.0, 2.0]
    bench.tell(Failed(KEY, [poison], Reason.REASON_HANDLER_FAILED, "boom"))
    dead = bench.one(DeadLetter)
    assert [(letter.deliveries, letter.reason, letter.message) for letter in dead.letters] == [
        (3, Reason.REASON_DELIVERIES_EXHAUSTED, "boom")
    ]
    bench.tell(DeadLettered(dead))
    assert (bench.one(Ack).entry_ids, bench.one(Ack).outcome) == ([b"1-0"], Outcome.DEAD_LETTERED)


def test_a_final_failure_is_dead_lettered_at_once() -> None:
    bench = Bench()
    (bad,) = bench.holding(1)
    bench.tell(Failed(KEY, [bad], Reason.REASON_EVENT_UNDECODABLE, "no event", final=True))
    assert bench.one(DeadLetter).letters[0].reason == Reason.REASON_EVENT_UNDECODABLE


def test_an_entry_that_killed_its_consumers_is_not_dispatched_again() -> None:
    bench = Bench()
    bench.reading()
    bench.later(10)
    claim = bench.one(Claim)
    bench.tell(EntriesClaimed(claim, b"0-0", [entry(1), entry(2)], {b"1-0": 4, b"2-0": 3}, ()))
    (letter,) = bench.one(DeadLetter).letters
    assert (letter.entry[0], letter.deliveries, letter.reason) == (b"1-0", 3, Reason.REASON_DELIVERIES_EXHAUSTED)
    bench.tell(Requested(5))
    assert [each[0] for each in bench.one(Dispatch).entries] == [b"2-0"]


def test_a_sweep_continues_from_its_cursor_without_a_pause() -> None:
    bench = Bench()
    bench.reading()
    bench.later(10)
    bench.tell(EntriesClaimed(bench.one(Claim), b"500-0", [], {}, ()))
    bench.later(0)
    claim = bench.one(Claim)
    assert claim.cursor == b"500-0"
    bench.tell(EntriesClaimed(claim, b"0-0", [], {}, ()))
    assert not any(isinstance(each, Claim) for each in bench.later(9.9))
    bench.later(0.1)
    assert bench.one(Claim).cursor == b"0-0"


def test_every_partition_is_swept_even_if_little_prefetch_is_free() -> None:
    bench = Bench(keys=("a", "b", "c"))
    bench.tell(Opened())
    bench.tell(GroupsReady(bench.one(CreateGroups)))
    bench.tell(EntriesRead(bench.one(Read), {}, {}))
    read = bench.one(Read)
    bench.tell(EntriesRead(read, {"a": [entry(number) for number in range(1, 10)]}, {}))
    bench.later(10)
    claims = [command for command in bench.asked if isinstance(command, Claim)]
    assert [(claim.key, claim.count) for claim in claims] == [("a", 1), ("b", 1), ("c", 1)]


def test_held_entries_are_renewed_before_others_may_claim_them() -> None:
    bench = Bench()
    bench.holding(2)
    renewed_at = [bench.now]
    while bench.now < 400:
        due = bench.machine.next_timer()
        assert due is not None
        for command in bench.later(max(due - bench.now, 0)):
            if isinstance(command, Renew):
                assert command.entry_ids == [b"1-0", b"2-0"]
                renewed_at.append(bench.now)
                bench.machine.receive(Renewed(command, ()), bench.now)
            elif isinstance(command, Claim):
                bench.machine.receive(EntriesClaimed(command, b"0-0", [], {}, ()), bench.now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(renewed_at)]
    assert max(gaps) < SETTINGS.ack_deadline
    # The hold limit of 300 s ends the renewals.
    assert 100 + 250 < renewed_at[-1] <= 100 + 300


def test_entries_that_others_claimed_are_neither_renewed_nor_retried() -> None:
    bench = Bench()
    first, _ = bench.holding(2)
    bench.later(20)
    bench.tell(Renewed(bench.one(Renew), [b"1-0"]))
    bench.later(20)
    assert bench.one(Renew).entry_ids == [b"2-0"]
    bench.tell(Failed(KEY, [first], Reason.REASON_HANDLER_FAILED, "boom"))
    assert bench.machine.held == 1
    assert bench.machine._retries == []


def test_entries_trimmed_while_pending_are_acknowledged_and_counted_as_lost() -> None:
    bench = Bench()
    bench.reading()
    bench.later(10)
    bench.tell(EntriesClaimed(bench.one(Claim), b"0-0", [[b"1-0", None]], {}, [b"2-0", b"3-0"]))
    ack = bench.one(Ack)
    assert (ack.entry_ids, ack.outcome, ack.extra, ack.kept) == ([b"1-0"], Outcome.DECLARED_LOST, 2, 0)


def test_held_entries_that_were_trimmed_are_dispatched_and_count_as_processed() -> None:
    bench = Bench()
    bench.tell(EntriesRead(bench.reading(), {KEY: [entry(number) for number in range(1, 4)]}, {}))
    bench.later(20)
    bench.tell(Renewed(bench.one(Renew), (), [b"1-0", b"2-0"]))
    lost = bench.one(Ack)
    assert (lost.entry_ids, lost.outcome, lost.kept) == ([b"1-0", b"2-0"], Outcome.DECLARED_LOST, 2)
    bench.tell(Acked(lost, 2))
    bench.tell(Requested(5))
    assert [each[0] for each in bench.one(Dispatch).entries] == [b"1-0", b"2-0", b"3-0"]
    bench.tell(Succeeded(KEY, [b"1-0", b"3-0"]))
    ack = bench.one(Ack)
    assert (ack.entry_ids, ack.outcome, ack.extra, ack.regained) == ([b"3-0"], Outcome.PROCESSED, 1, 1)
    bench.tell(Acked(ack, 1))
    bench.drained()
    bench.tell(Failed(KEY, [entry(2)], Reason.REASON_HANDLER_FAILED, "boom"))
    assert bench.one(Ack).kept == -1
    assert not any(isinstance(each, HandBack) for each in bench.asked)


def test_a_drain_forgets_a_returned_entry_that_another_consumer_claimed() -> None:
    bench = Bench()
    (held,) = bench.holding(1)
    read = bench.one(Read) if any(isinstance(each, Read) for each in bench.asked) else None
    bench.later(20)
    bench.tell(Renewed(bench.one(Renew), [b"1-0"]))
    bench.drained()
    for command in list(bench.machine._open):
        if isinstance(command, Read):
            bench.tell(EntriesRead(command, {}, {}))
        elif isinstance(command, Claim):
            bench.tell(EntriesClaimed(command, b"0-0", [], {}, ()))
    assert bench.machine.state is State.DRAINING
    bench.tell(Returned(KEY, [held]))
    assert bench.machine.state is State.CLOSED
    assert read is None or read not in bench.machine._open


def test_a_missing_group_is_created_once_and_recovery_restarts() -> None:
    bench = Bench()
    read = bench.reading()
    bench.later(10)
    claim = bench.one(Claim)
    bench.tell(GroupMissing(claim))
    bench.tell(GroupMissing(read))
    assert bench.asked == []
    bench.later(0.05)
    create = bench.one(CreateGroups)
    bench.tell(GroupsReady(create))
    assert bench.machine.state is State.RECOVERING
    assert bench.one(Read).history is True


def test_prefetch_is_bounded_and_refilled_when_half_empty() -> None:
    bench = Bench()
    read = bench.reading()
    assert read.count == 10
    bench.tell(EntriesRead(read, {KEY: [entry(number) for number in range(1, 11)]}, {}))
    assert bench.asked == []
    bench.tell(Requested(10))
    bench.tell(Succeeded(KEY, [b"%d-0" % number for number in range(1, 5)]))
    assert not any(isinstance(each, Read) for each in bench.asked)
    bench.tell(Succeeded(KEY, [b"5-0"]))
    assert bench.one(Read).count == 5


def test_a_drain_hands_back_unbegun_entries_and_waits_for_the_others() -> None:
    bench = Bench()
    bench.tell(EntriesRead(bench.reading(), {KEY: [entry(number) for number in range(1, 5)]}, {}))
    read = bench.one(Read) if any(isinstance(each, Read) for each in bench.asked) else None
    bench.tell(Requested(2))
    running = bench.one(Dispatch).entries
    back = [command for command in bench.tell(DrainRequested()) if isinstance(command, HandBack)]
    assert [dict(command.deliveries) for command in back] == [{b"3-0": 0, b"4-0": 0}]
    for command in back:
        bench.tell(HandedBack(command))
    if read is not None:
        bench.tell(EntriesRead(read, {}, {}))
    bench.tell(Failed(KEY, running[1:], Reason.REASON_HANDLER_FAILED, "boom"))
    again = bench.one(HandBack)
    assert again.deliveries == {b"2-0": 1}
    bench.tell(HandedBack(again))
    assert bench.machine.state is State.DRAINING
    bench.tell(Succeeded(KEY, [b"1-0"]))
    bench.tell(Acked(bench.one(Ack), 1))
    assert bench.machine.state is State.CLOSED
    assert bench.machine.next_timer() is None


def test_a_drain_reads_pending_entries_after_an_unanswered_read() -> None:
    bench = Bench()
    read = bench.reading()
    bench.drained()
    bench.tell(EntriesUnknown(read))
    bench.later(2)
    history = bench.one(Read)
    assert history.history
    bench.tell(EntriesRead(history, {KEY: [entry(7)]}, {KEY: {b"7-0": 2}}))
    back = bench.one(HandBack)
    assert back.deliveries == {b"7-0": 1}
    bench.tell(HandedBack(back))
    rest = bench.one(Read) if any(isinstance(each, Read) for each in bench.asked) else None
    assert rest is not None or bench.machine.state is State.DRAINING
