"""The delivery machine's rules under any interleaving, against a model of the server, other consumers and handlers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orki_contract.errors import Reason
from orki_contract.model import Backoff
from orki_events._delivery import DeliveryMachine
from orki_events._delivery_table import (
    Ack,
    Acked,
    Claim,
    CreateGroups,
    DeadLetter,
    DeadLettered,
    Dispatch,
    DrainRequested,
    EntriesClaimed,
    EntriesRead,
    Failed,
    GroupMissing,
    GroupsReady,
    HandBack,
    HandedBack,
    Opened,
    Outcome,
    Read,
    Renew,
    Renewed,
    Requested,
    Returned,
    State,
    Succeeded,
    no_reply,
)
from orki_events._delivery_windows import DeliverySettings

KEYS = ("a", "b")
LIMITS = DeliverySettings(
    prefetch=8,
    max_deliveries=3,
    ack_deadline=10.0,
    sweep_interval=3.0,
    hold_limit=100_000.0,
    backoff=Backoff(initial=0.5, maximum=2.0),
    retry_entries=3,
)
US, THEM, NOBODY = "us", "them", "nobody"


@dataclass
class Pending:
    owner: str
    since: float
    deliveries: int = 1


@dataclass
class Partition:
    """One partition and the group's view of it, as Redis keeps them."""

    entries: dict[int, None] = field(default_factory=dict)
    group: bool = False
    delivered: int = 0
    pending: dict[int, Pending] = field(default_factory=dict)
    settled: dict[int, str] = field(default_factory=dict)
    newest: int = 0


def wire(number: int) -> bytes:
    return b"%d-0" % number


def number_of(entry_id: bytes) -> int:
    return int(entry_id.split(b"-")[0])


class Server:
    """Executes commands and replies like Redis."""

    def __init__(self) -> None:
        self.partitions = {key: Partition() for key in KEYS}
        self.now = 0.0
        self.letters: list[tuple[str, int]] = []

    def entry(self, key: str, number: int) -> list[Any]:
        return [wire(number), [b"e", b"", b"d", b""] if number in self.partitions[key].entries else None]

    def run(self, command: Any) -> Any:
        if isinstance(command, CreateGroups):
            for partition in self.partitions.values():
                if not partition.group:
                    # The saved position: everything up to it is settled.
                    partition.group = True
                    partition.delivered = min(
                        (number - 1 for number in range(1, partition.newest + 1) if number not in partition.settled),
                        default=partition.newest,
                    )
            return GroupsReady(command)
        keys = [key for key, _ in command.positions] if isinstance(command, Read) else [command.key]
        if not all(self.partitions[key].group for key in keys) and not isinstance(command, Ack | DeadLetter):
            return GroupMissing(command)
        match command:
            case Read():
                return self.read(command)
            case Claim():
                return self.claim(command)
            case Ack():
                return self.ack(command)
            case DeadLetter():
                self.letters += [(command.key, number_of(letter.entry[0])) for letter in command.letters]
                return DeadLettered(command)
            case Renew():
                gone = self.touch(command.key, command.entry_ids, US, command.deliveries, self.now)
                return Renewed(command, *gone)
            case HandBack():
                trimmed = []
                for entry_id, made in command.deliveries.items():
                    since = self.now - LIMITS.ack_deadline + command.wait
                    trimmed += self.touch(command.key, [entry_id], NOBODY, made, since)[1]
                return HandedBack(command, trimmed)
        raise AssertionError(command)

    def read(self, command: Read) -> EntriesRead:
        found: dict[str, list[Any]] = {}
        deliveries: dict[str, dict[bytes, int]] = {}
        for key, place in command.positions:
            partition = self.partitions[key]
            if command.history:
                mine = [n for n, each in sorted(partition.pending.items()) if each.owner == US]
                chosen = [number for number in mine if number > number_of(place)][: command.count]
                for number in chosen:
                    partition.pending[number].deliveries += 1
                    partition.pending[number].since = self.now
            else:
                chosen = [number for number in partition.entries if number > partition.delivered][: command.count]
                for number in chosen:
                    partition.pending[number] = Pending(US, self.now)
                    partition.delivered = number
            found[key] = [self.entry(key, number) for number in chosen]
            deliveries[key] = {wire(number): partition.pending[number].deliveries for number in chosen}
        return EntriesRead(command, found, deliveries)

    def claim(self, command: Claim) -> EntriesClaimed:
        partition = self.partitions[command.key]
        idle = [
            number
            for number, each in sorted(partition.pending.items())
            if number > number_of(command.cursor) and self.now - each.since >= LIMITS.ack_deadline
        ]
        chosen, rest = idle[: command.count], idle[command.count :]
        deleted = [number for number in chosen if number not in partition.entries]
        for number in deleted:
            del partition.pending[number]
        taken = [number for number in chosen if number in partition.entries]
        for number in taken:
            partition.pending[number] = Pending(US, self.now, partition.pending[number].deliveries + 1)
        counts = {wire(number): partition.pending[number].deliveries for number in taken}
        cursor = wire(chosen[-1]) if rest else b"0-0"
        entries = [self.entry(command.key, number) for number in taken]
        return EntriesClaimed(command, cursor, entries, counts, [wire(number) for number in deleted])

    def ack(self, command: Ack) -> Acked:
        partition = self.partitions[command.key]
        count = 0
        for number in map(number_of, command.entry_ids):
            if partition.group and partition.pending.pop(number, None) is not None:
                count += 1
            partition.settled.setdefault(number, command.outcome.value)
        return Acked(command, count)

    def touch(
        self, key: str, entry_ids: list[bytes], owner: str, deliveries: int, since: float
    ) -> tuple[list[bytes], list[bytes]]:
        partition = self.partitions[key]
        gone, trimmed = [], []
        for entry_id in entry_ids:
            held = partition.pending.get(number_of(entry_id))
            exists = number_of(entry_id) in partition.entries
            if held is None or held.owner != US:
                if exists or held is not None:
                    gone.append(entry_id)
            elif not exists:
                trimmed.append(entry_id)
            else:
                made = deliveries if owner == NOBODY or deliveries else held.deliveries
                partition.pending[number_of(entry_id)] = Pending(owner, since, made)
        return gone, trimmed


class Interleavings(RuleBasedStateMachine):
    """Any events in any order: the rules always hold, and everything is settled in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()
        self.machine = DeliveryMachine(KEYS, LIMITS)
        self.open: list[Any] = []
        self.at_work: list[tuple[str, list[Any]]] = []
        self.tries: dict[tuple[str, int], int] = {}
        self.succeeded: set[tuple[str, int]] = set()
        self.wanted = 0
        self.draining = False
        self.steps = 0

    @initialize()
    def begin(self) -> None:
        self.tell(Opened())

    def tell(self, event: Any) -> None:
        self.obey(self.machine.receive(event, self.server.now))

    def obey(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Dispatch):
                assert 1 <= len(command.entries) <= 5
                self.wanted -= 1
                self.at_work.append((command.key, list(command.entries)))
                for entry in command.entries:
                    assert entry[1] is not None
                    assert command.deliveries.get(entry[0], 1) <= LIMITS.max_deliveries
            else:
                if isinstance(command, Ack):
                    self.check_ack(command)
                elif isinstance(command, Read) and not command.history:
                    self.check_pending_entries_are_known()
                self.open.append(command)

    def check_ack(self, command: Ack) -> None:
        """Rule 1."""
        for entry_id in command.entry_ids:
            position = (command.key, number_of(entry_id))
            if command.outcome is Outcome.PROCESSED:
                assert position in self.succeeded
            elif command.outcome is Outcome.DEAD_LETTERED:
                assert position in self.server.letters
            else:
                assert number_of(entry_id) not in self.server.partitions[command.key].entries

    def check_pending_entries_are_known(self) -> None:
        """Rule 2."""
        for key, partition in self.server.partitions.items():
            known = self.machine._partitions[key]
            ids = known.held.keys() | known.settled | known.leaving
            for number, held in partition.pending.items():
                assert held.owner != US or wire(number) in ids, (key, number)

    @rule(key=st.sampled_from(KEYS), count=st.integers(1, 12))
    def publish(self, key: str, count: int) -> None:
        partition = self.server.partitions[key]
        for _ in range(count):
            partition.newest += 1
            partition.entries[partition.newest] = None

    @rule(key=st.sampled_from(KEYS), count=st.integers(1, 4))
    def trim(self, key: str, count: int) -> None:
        partition = self.server.partitions[key]
        for number in list(partition.entries)[:count]:
            del partition.entries[number]
            if number > partition.delivered:
                partition.settled[number] = "unread"

    @precondition(lambda self: not self.draining and self.wanted < 3)
    @rule(count=st.integers(1, 5))
    def want(self, count: int) -> None:
        self.wanted += 1
        self.tell(Requested(count))

    @precondition(lambda self: self.at_work)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "succeed", "fail", "fail", "fail", "reject", "give back"]))
    def finish(self, data: Any, how: str) -> None:
        place = data.draw(st.integers(0, len(self.at_work) - 1))
        key, entries = self.at_work.pop(place)
        part = data.draw(st.integers(1, len(entries)))
        if part < len(entries):
            self.at_work.append((key, entries[part:]))
        self.settle(key, entries[:part], how)

    def settle(self, key: str, entries: list[Any], how: str) -> None:
        if how == "succeed":
            self.succeeded |= {(key, number_of(entry[0])) for entry in entries}
            self.tell(Succeeded(key, [entry[0] for entry in entries]))
        elif how == "give back":
            self.tell(Returned(key, entries))
        else:
            self.tell(Failed(key, entries, Reason.REASON_HANDLER_FAILED, "no", final=how == "reject"))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), fate=st.sampled_from(["answered", "answered", "answered", "lost on its way", "answer lost"]))
    def act(self, data: Any, fate: str) -> None:
        command = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.perform(command, fate)

    def perform(self, command: Any, fate: str) -> None:
        answer = no_reply(command) if fate == "lost on its way" else self.server.run(command)
        self.tell(no_reply(command) if fate == "answer lost" else answer)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 1.0, 4.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.steps += 1
        self.server.now += seconds
        self.fire()

    def fire(self) -> None:
        due = self.machine.next_timer()
        if due is not None and due <= self.server.now:
            self.obey(self.machine.handle_timer(self.server.now))

    @rule(key=st.sampled_from(KEYS), acknowledges=st.booleans())
    def another_consumer_claims(self, key: str, acknowledges: bool) -> None:
        partition = self.server.partitions[key]
        for number, held in list(partition.pending.items()):
            if self.server.now - held.since >= LIMITS.ack_deadline and number in partition.entries:
                if acknowledges:
                    del partition.pending[number]
                    partition.settled.setdefault(number, "processed")
                else:
                    partition.pending[number] = Pending(THEM, self.server.now, held.deliveries + 1)

    @rule(key=st.sampled_from(KEYS), dice=st.integers(1, 6))
    def group_destroyed(self, key: str, dice: int) -> None:
        partition = self.server.partitions[key]
        if partition.group and dice == 6:
            partition.group = False
            partition.pending.clear()

    @precondition(lambda self: not self.draining and self.steps > 8)
    @rule()
    def drain(self) -> None:
        self.draining = True
        self.tell(DrainRequested())
        self.wanted = 0

    @invariant()
    def held_entries_are_bounded(self) -> None:
        """Rule 3: reading and claiming each fill `prefetch`, and draining one more entry of each partition."""
        waiting = sum(len(partition.waiting) for partition in self.machine._partitions.values())
        # Trimmed entries cannot wait on the server.
        parkable = (partition.waiting - partition.detached for partition in self.machine._partitions.values())
        assert sum(map(len, parkable)) <= LIMITS.retry_entries
        assert self.machine.held - waiting <= 2 * LIMITS.prefetch + len(KEYS) * 2

    @invariant()
    def a_closed_machine_issues_nothing(self) -> None:
        if self.machine.state is State.CLOSED:
            assert self.open == []
            assert self.machine.held == 0
            assert self.machine.next_timer() is None

    def teardown(self) -> None:
        """Without further faults, the machine must settle everything and drain."""
        self.quiet()
        if not self.draining:
            for key, partition in self.server.partitions.items():
                for number in partition.entries:
                    assert number in partition.settled, (key, number, partition)
                assert partition.pending == {}
            self.drain()
            self.quiet()
        assert self.machine.state is State.CLOSED
        for partition in self.server.partitions.values():
            # Rule 5.
            assert not any(held.owner == US for held in partition.pending.values()) or not partition.group

    def quiet(self) -> None:
        for _ in range(2_000):
            commands, self.open = self.open, []
            for command in commands:
                self.perform(command, "answered")
            while self.at_work:
                key, entries = self.at_work.pop()
                self.settle(key, entries, "succeed")
            if not self.draining and self.wanted < 3:
                self.want(5)
            if self.machine.state is State.CLOSED or (self.idle() and not self.draining):
                return
            self.server.now += 1.0
            self.fire()
        raise AssertionError((self.machine.state, self.machine.held, self.open, self.server.partitions))

    def idle(self) -> bool:
        """Whether nothing remains to be done for any entry."""
        return (
            not self.at_work
            and self.machine.held == 0
            and self.machine.state is State.READING
            and not any(isinstance(each, Ack | DeadLetter) for each in self.open)
            and all(
                each.group and not each.pending and all(number <= each.delivered for number in each.entries)
                for each in self.server.partitions.values()
            )
        )


@pytest.mark.timeout(400)
def test_the_rules_hold_under_any_interleaving() -> None:
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=150,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def check_walk(seed: int, steps: int) -> None:
    """Run one long random sequence with realistic odds; it goes deeper than hypothesis does."""
    try:
        walk(seed, steps)
    except AssertionError as error:
        raise AssertionError(f"walk({seed}, {steps}) breaks a rule: {error}") from error


def walk(seed: int, steps: int) -> None:
    dice = random.Random(seed)
    run = Interleavings()
    run.begin()
    fates = ["answered"] * 8 + ["lost on its way", "answer lost"]
    hows = ["succeed"] * 4 + ["fail"] * 4 + ["reject", "give back"]
    for _ in range(steps):
        key = dice.choice(KEYS)
        match dice.choices(range(8), [4, 12, 4, 4, 3, 1, 1, 1])[0]:
            case 0:
                run.publish(key, dice.randint(1, 12))
            case 1 if run.open:
                command = run.open.pop(dice.randrange(len(run.open)))
                run.perform(command, dice.choice(fates))
            case 2 if run.wanted < 3:
                run.want(dice.randint(1, 5))
            case 3 if run.at_work:
                place, entries = run.at_work.pop(dice.randrange(len(run.at_work)))
                cut = dice.randint(1, len(entries))
                if cut < len(entries):
                    run.at_work.append((place, entries[cut:]))
                run.settle(place, entries[:cut], dice.choice(hows))
            case 4:
                run.wait(dice.choice([0.01, 0.3, 1.0, 2.5, 4.0, 12.0]))
            case 5:
                run.another_consumer_claims(key, dice.random() < 0.5)
            case 6:
                run.trim(key, dice.randint(1, 4))
            case 7:
                run.group_destroyed(key, dice.randint(1, 6))
        run.held_entries_are_bounded()
    if seed % 2:
        run.drain()
    run.teardown()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("batch", range(8))
def test_the_rules_hold_on_long_random_walks(batch: int) -> None:
    for seed in range(batch * 50, batch * 50 + 50):
        check_walk(seed, 200)


def test_a_drain_hands_back_a_partition_although_the_group_of_another_is_missing() -> None:
    server, machine = Server(), DeliveryMachine(KEYS, LIMITS)
    server.partitions["a"].entries[1] = None
    server.partitions["a"].newest = 1
    commands = list(machine.receive(Opened(), 0.0))
    while not (isinstance(command := commands.pop(0), Read) and not command.history):
        commands += machine.receive(server.run(command), 0.0)
    server.run(command)  # The reply is lost, so entry 1 is pending.
    server.partitions["b"].group = False
    commands += machine.receive(no_reply(command), 0.0)
    commands += machine.receive(DrainRequested(), 0.0)
    for step in range(100):
        while commands:
            commands += machine.receive(server.run(commands.pop(0)), float(step))
        commands += machine.handle_timer(float(step))
    assert machine.state is State.CLOSED
    assert server.partitions["a"].pending[1].owner == NOBODY
