"""The position machine: its transition table, and its conclusions from single snapshots."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from orki_contract.errors import LocalProtocolError
from orki_events._position_table import (
    TRANSITIONS,
    Arrived,
    Counted,
    Declared,
    GroupRecord,
    GroupState,
    Id,
    Loss,
    LossKind,
    Measure,
    Observed,
    Outdated,
    Reopened,
    Settled,
    Snapshot,
    State,
    StreamRecord,
    Tell,
    Unanswered,
    Write,
    Written,
)
from orki_events._positions import PositionMachine, View, progress

# Written by hand: the legal events of each state, by the next state.
LEGAL = {
    "NEW": {"NEW": "Reopened Arrived Settled", "COMPARING": "Observed"},
    "DOUBTFUL": {"DOUBTFUL": "Reopened Arrived Settled", "COMPARING": "Observed"},
    "FOLLOWING": {"FOLLOWING": "Arrived Settled", "DOUBTFUL": "Reopened", "COMPARING": "Observed"},
    "COMPARING": {"MEASURING": "CountNeeded", "WRITING": "ChangeFound", "FOLLOWING": "Agreed"},
    "MEASURING": {"MEASURING": "Reopened Arrived Settled", "COMPARING": "Observed", "DOUBTFUL": "Unanswered"},
    "WRITING": {"WRITING": "Reopened Arrived Settled", "FOLLOWING": "Written", "DOUBTFUL": "Outdated Unanswered"},
}
NEXT = {
    (State[state], name): State[following]
    for state, row in LEGAL.items()
    for following, names in row.items()
    for name in names.split()
}
EVENTS = sorted(TRANSITIONS.events(), key=lambda event: event.__name__)
PAIRS = list(itertools.product(State, EVENTS))


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=[f"{s.name}-{e.__name__}" for s, e in PAIRS])
def test_every_pair_of_state_and_event(state: State, event: type) -> None:
    expected = NEXT.get((state, event.__name__))
    if expected is None:
        with pytest.raises(LocalProtocolError, match=r"legal there: \w+"):
            TRANSITIONS.next(state, event, LocalProtocolError)
    else:
        assert TRANSITIONS.next(state, event, LocalProtocolError) is expected


def at(number: int) -> Id:
    return (number, 0)


def partition(added: int, length: int | None = None, server: str = "one", **values: Any) -> Snapshot:
    """A partition whose entries have the ids 1-0, 2-0, …"""
    kept = added if length is None else length
    first = at(added - kept + 1) if kept else (0, 0)
    return Snapshot(length=kept, added=added, last=at(added), first=first, server=server, **values)


def group(read: int, processed: int, record: GroupRecord | None = None, **values: Any) -> dict[str, GroupState]:
    raw = None if record is None else record.text().encode()
    state = GroupState(read=at(read), processed=processed, start=((0, 0), 0), record=record, raw=raw, **values)
    return {"work": state}


def with_record(snapshot: Snapshot, record: StreamRecord) -> Snapshot:
    return replace(snapshot, record=record, raw=record.text().encode())


def observe(machine: PositionMachine, snapshot: Snapshot) -> tuple[Write | None, list[Declared]]:
    """Pass a snapshot, count what the machine asks for, let it write, and return what it wrote and told."""
    wrote: Write | None = None
    commands = machine.receive(Observed(snapshot))
    told: list[Declared] = []
    while commands:
        command, *commands = commands
        if isinstance(command, Measure):
            state = snapshot.groups.get(machine.group)
            ids = [*command.ids, *([state.read] if command.position and state is not None else [])]
            counted = {}
            for each in ids:
                upto = max(min(each[0], snapshot.last[0]) - snapshot.first[0] + 1, 0)
                counted[each] = Counted(upto, snapshot.length - upto, at(min(each[0], snapshot.last[0])))
            commands = machine.receive(Observed(replace(snapshot, counted={**snapshot.counted, **counted})))
        elif isinstance(command, Write):
            wrote = command
            commands = machine.receive(Written())
        else:
            assert isinstance(command, Tell)
            told += command.losses
    assert machine.state is State.FOLLOWING
    return wrote, told


def test_records_survive_their_text() -> None:
    stream = StreamRecord(
        added=7, length=3, last=at(9), first=at(2), server="a/b", rolled_back=4, losses=(Loss(at(1), at(5), 4),)
    )
    assert StreamRecord.parse(stream.text().encode()) == stream
    assert StreamRecord.parse(b"added=7 unknown=1 last=x") == StreamRecord(added=7)
    assert GroupRecord.parse(None) is None
    record = GroupRecord(read=at(3), reach=4, received=5, lost=6, kept=7, kept_until=8, told_trimmed=9)
    assert GroupRecord.parse(record.text().encode()) == record


def test_a_group_that_read_everything_lost_nothing() -> None:
    machine = PositionMachine("work", consumes=True)
    wrote, told = observe(machine, partition(10, groups=group(10, 10)))
    assert told == []
    assert wrote is not None
    assert {change.name for change in wrote.changes} == {"stream", "group:work", "cursor:work"}
    _, told = observe(
        machine, partition(500, 5, groups=group(500, 500, GroupRecord(read=at(10), reach=10, received=10)))
    )
    assert told == []


@pytest.mark.parametrize("read", [4, 97, 100])
def test_entries_that_were_trimmed_unread_are_counted(read: int) -> None:
    # 100 entries, 5 left; the group had 4, and perhaps read on after the trim.
    received = 4 + max(read - 95, 0)
    record = GroupRecord(read=at(4), reach=4, received=4)
    machine = PositionMachine("work", consumes=True)
    wrote, told = observe(machine, partition(100, 5, groups=group(read, received, record)))
    assert [(each.kind, each.count, each.exact) for each in told] == [(LossKind.TRIMMED_UNREAD, 91, True)]
    assert (told[0].after, told[0].until[0]) == (at(4), 95)
    assert wrote is not None
    assert wrote.losses == tuple(told)


def test_pending_entries_count_as_received() -> None:
    record = GroupRecord(read=at(0), reach=0, received=0)
    machine = PositionMachine("work", consumes=True)
    state = group(96, 0, record, pending=96, oldest=at(1))
    _, told = observe(machine, partition(100, 5, groups=state))
    assert told == []


def test_a_loss_is_computed_again_before_it_is_declared() -> None:
    # A claim has removed a trimmed entry from the pending ones, and its counter follows.
    record = GroupRecord(read=at(90), reach=90, received=90)
    machine = PositionMachine("work", consumes=True)
    first = partition(100, 5, groups=group(98, 94, record))
    (measure,) = machine.receive(Observed(first))
    assert measure == Measure((), True)
    (confirm,) = machine.receive(Observed(replace(first, counted={at(98): Counted(3, 2)})))
    assert isinstance(confirm, Measure)
    assert confirm.pause > 0
    second = partition(100, 5, groups=group(98, 98, record), counted={at(98): Counted(3, 2)})
    _, told = observe(machine, second)
    assert told == []


def test_deleted_consumers_do_not_make_a_loss_by_trimming() -> None:
    # Ten were received and dropped; afterwards the stream was trimmed up to there.
    record = GroupRecord(read=at(10), reach=10, received=0)
    machine = PositionMachine("work", consumes=True)
    _, told = observe(machine, partition(20, 10, groups=group(10, 0, record)))
    assert told == []


def test_a_group_that_was_set_back_reads_again() -> None:
    record = GroupRecord(read=at(50), reach=50, received=50)
    machine = PositionMachine("work", consumes=True)
    wrote, told = observe(machine, partition(60, groups=group(10, 50, record)))
    assert told == []
    assert wrote is not None
    (change,) = [change for change in wrote.changes if change.name == "group:work"]
    assert (GroupRecord.parse(change.value.encode()) or record).reach == 10


def test_a_count_that_is_impossible_gives_a_lower_bound() -> None:
    record = GroupRecord(read=at(4), reach=4, received=4)
    snapshot = partition(1_000, 500, groups=group(600, 54, record), counted={at(600): Counted(None, None)})
    found = progress(View.of(snapshot), snapshot.groups["work"])
    assert found is not None
    assert (found.lost, found.exact) == (446, False)


@pytest.mark.parametrize("published", [0, 30, 600])
def test_a_server_with_older_data_is_a_rollback(published: int) -> None:
    machine = PositionMachine()
    observe(machine, partition(700))
    # It lost 500 entries, and others have arrived since, with later ids.
    last = at(10_000 + published) if published else at(200)
    older = replace(partition(200 + published, server="two"), last=last)
    counted = {at(700): Counted(200, published, at(200))} if published else {}
    wrote, told = observe(machine, replace(older, counted=counted))
    (loss,) = told
    assert (loss.kind, loss.group, loss.count, loss.exact) == (LossKind.ROLLED_BACK, "", 500, True)
    assert (loss.after, loss.until) == (at(200), at(700))
    assert wrote is not None
    assert wrote.losses == (loss,)


def test_entries_that_this_process_published_since_are_part_of_the_rollback() -> None:
    machine = PositionMachine()
    observe(machine, partition(100))
    machine.receive(Arrived(at(101), at(700), 600))
    _, told = observe(machine, partition(200, server="two"))
    assert [each.count for each in told] == [500]


def test_a_second_witness_adds_only_what_it_knows_more() -> None:
    first, second = PositionMachine(), PositionMachine()
    observe(first, partition(600))
    observe(second, partition(700))
    wrote, told = observe(first, partition(200, server="two"))
    assert [each.count for each in told] == [400]
    assert wrote is not None
    record = StreamRecord.parse(wrote.changes[0].value.encode())
    assert record is not None
    _, told = observe(second, with_record(partition(200, server="two"), record))
    assert [(each.count, each.total) for each in told] == [(100, 500)]
    # A third one knows nothing new.
    third = PositionMachine()
    _, told = observe(third, with_record(partition(200, server="two"), replace(record, rolled_back=500)))
    assert told == []


def test_a_group_has_not_lost_what_it_had_settled() -> None:
    machine = PositionMachine("work", consumes=True)
    observe(machine, partition(700, groups=group(650, 640, pending=10, oldest=at(641))))
    machine.receive(Settled(4))
    wrote, told = observe(
        machine,
        partition(200, server="two", groups=group(200, 200, GroupRecord(read=at(200), reach=200, received=200))),
    )
    assert [(each.group, each.count) for each in told] == [("", 500), ("work", 500 - 444)]
    assert wrote is not None
    record = GroupRecord.parse(next(each.value for each in wrote.changes if each.name == "group:work").encode())
    assert record is not None
    assert (record.kept, record.told_rolled_back) == (444, 56)


def test_a_restart_that_loses_nothing_is_no_rollback() -> None:
    machine = PositionMachine()
    observe(machine, partition(100))
    machine.receive(Arrived(at(101), at(110), 10))
    machine.receive(Reopened())
    _, told = observe(machine, partition(500, 50, server="two"))
    assert told == []


def test_what_arrives_during_a_comparison_is_remembered() -> None:
    machine = PositionMachine()
    machine.receive(Observed(partition(100)))
    assert machine.state is State.WRITING
    machine.receive(Arrived(at(95), at(99), 5))
    machine.receive(Arrived(at(101), at(105), 5))
    machine.receive(Written())
    _, told = observe(machine, partition(90, server="two"))
    assert [each.count for each in told] == [15]


@pytest.mark.parametrize("reply", [Outdated(), Unanswered()])
def test_a_write_that_was_not_done_is_compared_again(reply: Any) -> None:
    machine = PositionMachine("work", consumes=True)
    record = GroupRecord(read=at(4), reach=4, received=4)
    snapshot = partition(100, 5, groups=group(4, 4, record))
    machine.receive(Observed(snapshot))
    machine.receive(reply)
    assert machine.state is State.DOUBTFUL
    _, told = observe(machine, snapshot)
    assert [each.count for each in told] == [91]


def test_a_consumer_is_told_what_others_declared() -> None:
    machine = PositionMachine("work", consumes=True)
    record = GroupRecord(read=at(4), reach=4, received=4)
    observe(machine, partition(10, groups=group(4, 4, record)))
    declared = GroupRecord(read=at(4), reach=95, received=4, lost=91, told_trimmed=91)
    _, told = observe(machine, partition(100, 5, groups=group(4, 4, declared)))
    assert [each.count for each in told] == [91]
    # A process that starts later is told what no consumer was told.
    late = PositionMachine("work", consumes=True)
    _, told = observe(late, partition(100, 5, groups=group(4, 4, declared)))
    assert told == []
    late = PositionMachine("work", consumes=True)
    _, told = observe(late, partition(100, 5, groups=group(4, 4, replace(declared, told_trimmed=1))))
    assert [each.count for each in told] == [90]
