"""One consumer at work: feeds the delivery machine, does what it asks, and hands entries to whoever takes them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from orki_contract.errors import ContractMismatch, EventsUnavailable, LocalProtocolError, OrkiError, Reason
from orki_events import _delivery_table as moves
from orki_events._commands import CommandExecutor, GroupMember
from orki_events._delivery import DeliveryMachine
from orki_events._delivery_table import State
from orki_events._options import ConsumeOptions, Gap, GapKind
from orki_events.connection import Connection
from orki_events.entries import stream_keys
from orki_events.groups import ConsumerGroups

_SAVE_S: Final = 2.0
_UNBLOCK_S: Final = 0.05
_IDLE_MS: Final = 600_000
_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderServices:
    """What a subscription needs of its surroundings.

    Attributes:
        reads: A connection of its own, for reads that wait.
        commands: Another of its own, for everything else.
        keeper: Creates groups.
        prepare: Registers the stream.
        report: Takes what was lost.
        block_ms: Longest time that a read waits in the server.
        dedupe_window: Event ids to remember.
        drain_timeout_s: Longest time that its end waits for what was taken to be settled.
        forget: Called once it has ended.
    """

    reads: Connection
    commands: Connection
    keeper: ConsumerGroups
    prepare: Callable[[Connection], Awaitable[None]]
    report: Callable[[Gap], None]
    block_ms: int
    dedupe_window: int
    drain_timeout_s: float
    forget: Callable[[GroupReader], None]


@dataclass(slots=True)
class ConsumerCounts:
    """What a consumer did since it began.

    Attributes:
        acknowledged: Entries that were pending until this consumer acknowledged them.
        late: Acknowledgements of entries that were not pending any more: others had claimed and settled them.
        dead_lettered: Entries written to the dead letter stream.
        failed: Calls of a handler that raised.
        repeated: Entries dropped because their event was seen already.
        lost: Entries that were trimmed before they were settled.
    """

    acknowledged: int = 0
    late: int = 0
    dead_lettered: int = 0
    failed: int = 0
    repeated: int = 0
    lost: int = 0


class GroupReader:
    """A consumer of one group, from `start` to `close`."""

    def __init__(self, place: GroupMember, wires: ReaderServices, options: ConsumeOptions, hand: int) -> None:
        """Args: place: whose; wires: its surroundings; options: its settings; hand: entries that it can use at once."""
        self.place = place
        self.counts = ConsumerCounts()
        self.seen = SeenEvents(wires.dedupe_window)
        self._wires = wires
        self._chores = CommandExecutor(place, wires.reads, wires.commands, wires.block_ms)
        keys = stream_keys(place.stream)
        deadline = place.group.ack_deadline_ms / 1_000
        sweep = options.sweep_interval_s or min(deadline / 3, 5.0)
        self._machine = DeliveryMachine(
            keys,
            moves.DeliverySettings(
                prefetch=max(options.prefetch or 4 * hand, len(keys), hand),
                max_deliveries=place.group.max_deliveries,
                ack_deadline_s=deadline,
                # Spread, so that the consumers of a group do not sweep all at once.
                sweep_interval_s=sweep * random.uniform(0.8, 1.2),
                hold_limit_s=options.hold_limit_s,
                backoff=options.backoff,
            ),
        )
        self._loop = asyncio.get_running_loop()
        self._waiters: deque[asyncio.Future[moves.Dispatch | None]] = deque()
        self._reads: asyncio.Queue[moves.Read] = asyncio.Queue()
        self._work: asyncio.Queue[moves.CreateGroups | moves.ServerCommand] = asyncio.Queue()
        self._done: dict[str, list[bytes]] = {}
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._arming = False
        self._ending = False
        self._shut = False
        self._registered = False
        self._closed = asyncio.Event()
        self._error: OrkiError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f'consumer "{self.place.consumer}" of group "{self.place.group.name}" on "{self.place.stream.name}"'

    def start(self) -> None:
        """Begins to read."""
        for loop in (self._read_loop(), self._work_loop(), self._keep_loop()):
            self._tasks.append(asyncio.create_task(self._guard(loop), name=f"orki-events {self.name}"))
        self._tell(moves.Opened())

    async def take(self, count: int) -> moves.Dispatch | None:
        """Entries of one partition, at least one and at most so many; None once the consumer ends.

        Raises:
            OrkiError: The server refuses the consumer for good.
        """
        if self._error is not None:
            raise self._error
        if self._ending:
            return None
        waiter: asyncio.Future[moves.Dispatch | None] = self._loop.create_future()
        self._waiters.append(waiter)
        self._tell(moves.Wanted(count))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and (dispatch := waiter.result()) is not None:
                self.give_back(dispatch.key, dispatch.entries)
            raise

    def succeeded(self, key: str, entry_id: bytes) -> None:
        """One entry is done; acknowledgements of one turn of the loop leave together."""
        self._done.setdefault(key, []).append(entry_id)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def succeeded_all(self, key: str, entry_ids: Sequence[bytes]) -> None:
        """Entries are done."""
        if entry_ids:
            self._tell(moves.Succeeded(key, entry_ids))

    def failed(self, key: str, entries: Sequence[moves.Entry], error: BaseException, final: bool = False) -> None:
        """Entries could not be handled."""
        self.counts.failed += 1
        reason = error.reason if isinstance(error, OrkiError) else Reason.REASON_HANDLER_FAILED
        said = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
        self._tell(moves.Failed(key, entries, reason, said, final))

    def give_back(self, key: str, entries: list[moves.Entry]) -> None:
        """Entries were taken and not begun."""
        self._tell(moves.Returned(key, entries))

    def end(self) -> None:
        """Takes no more entries: whoever waits for some gets None, and what nobody took is handed back."""
        if not self._ending:
            self._ending = True
            self._release(None)
            self._tell(moves.DrainAsked())

    async def close(self) -> None:
        """Ends in good order: waits for what was taken to be settled, for the drain timeout at most, and leaves the
        group. Called again, also at once, it waits for the same end; cancelled, it waits for nothing to be settled."""
        closing = self._begin_to_close()
        try:
            await asyncio.wait({closing})
        except asyncio.CancelledError:
            closing.cancel()
            await asyncio.wait({closing})
            raise
        if not closing.cancelled():
            closing.result()

    def abandon(self) -> None:
        """Nobody takes entries any more, and nobody waits for the end either. May be called in any thread."""
        if not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(self._begin_to_close)

    def _begin_to_close(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name=f"orki-events {self.name}, its end")
        return self._closing

    async def _close(self) -> None:
        self.end()
        try:
            if self._error is None:
                async with asyncio.timeout(self._wires.drain_timeout_s):
                    await self._drained()
                    with contextlib.suppress(OrkiError):
                        await self._wires.keeper.save(self._wires.commands, self.place.stream, self.place.group)
                        await self._chores.leave()
        except TimeoutError:
            _log.warning("%s left %d entries for others to claim", self.name, self._machine.held)
        finally:
            self._shut = True
            self._closed.set()
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._wires.reads.close()
            await self._wires.commands.close()
            self._wires.forget(self)

    async def _drained(self) -> None:
        while not self._closed.is_set() and self._error is None:
            with contextlib.suppress(OrkiError):
                await self._chores.unblock()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_UNBLOCK_S):
                    await self._closed.wait()

    def _tell(self, event: moves.Event) -> None:
        if self._shut:
            # Too late: what a handler has to say now, the consumer that claims its entry will find out itself.
            return
        try:
            self._do(self._machine.receive(event, self._loop.time()))
        except OrkiError as error:
            self._fail(error)

    def _do(self, commands: list[moves.Command]) -> None:
        for command in commands:
            if isinstance(command, moves.Dispatch):
                self._hand_out(command)
            elif isinstance(command, moves.Read):
                self._reads.put_nowait(command)
            else:
                self._work.put_nowait(command)
        if self._machine.state is State.CLOSED:
            self._closed.set()
        elif not self._arming:
            self._arming = True
            self._loop.call_soon(self._arm)

    def _hand_out(self, dispatch: moves.Dispatch) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(dispatch)
                return
            # Its owner gave up waiting: the want was his, so the entries go to the next one.
        self.give_back(dispatch.key, dispatch.entries)

    def _arm(self) -> None:
        self._arming = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._machine.next_timer()
        if due is not None and not self._closed.is_set():
            self._timer = self._loop.call_at(due, self._time_passed)

    def _time_passed(self) -> None:
        self._timer = None
        try:
            self._do(self._machine.handle_timer(self._loop.time()))
        except OrkiError as error:
            self._fail(error)

    def _flush(self) -> None:
        self._flushing = False
        done, self._done = self._done, {}
        for key, entry_ids in done.items():
            self._tell(moves.Succeeded(key, entry_ids))

    def _release(self, error: OrkiError | None) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    def _fail(self, error: OrkiError) -> None:
        """The consumer cannot go on: whoever takes entries is told."""
        if self._error is None:
            self._error = error
            _log.error("%s ends: %s", self.name, error.message)
        self._release(error)
        self._closed.set()

    async def _guard(self, loop: Awaitable[None]) -> None:
        try:
            await loop
        except OrkiError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("a defect in %s", self.name)
            self._fail(LocalProtocolError(f"a defect in {self.name}: {error!r}"))

    async def _read_loop(self) -> None:
        while True:
            command = await self._reads.get()
            with contextlib.suppress(OrkiError):
                await self._chores.learn_client_id()
            self._tell(await self._chores.run(command))

    async def _work_loop(self) -> None:
        while True:
            command = await self._work.get()
            if isinstance(command, moves.CreateGroups):
                event = await self._create_groups(command)
            else:
                event = await self._chores.run(command)
            self._count(event)
            self._tell(event)

    async def _create_groups(self, command: moves.CreateGroups) -> moves.Event:
        wires = self._wires
        try:
            # Judged before anything is made: who brings a contract that does not fit leaves no trace.
            await self._register()
            await wires.keeper.ensure(wires.commands, self.place.stream, (self.place.group,))
        except OrkiError as error:
            if not error.retryable:
                raise
            return moves.Unanswered(command)
        return moves.GroupsReady(command)

    async def _register(self) -> None:
        """Tells the fleet of the stream; a server that is out of memory takes no note, and can be read all the same.

        Raises:
            ContractMismatch: The stream's contract does not fit the registered one.
            EventsUnavailable: The server does not answer.
        """
        try:
            await self._wires.prepare(self._wires.commands)
            self._registered = True
        except (ContractMismatch, EventsUnavailable):
            self._registered = False
            raise
        except OrkiError as error:
            self._registered = False
            _log.warning("%s could not register its stream, and will try again: %s", self.name, error.message)

    def _count(self, event: moves.Event) -> None:
        if isinstance(event, moves.DeadLettered):
            self.counts.dead_lettered += len(event.command.letters)
            for letter in event.command.letters:
                said = (self.name, letter.entry[0].decode(), letter.deliveries, letter.message)
                _log.error("%s dead-lettered entry %s after %d deliveries: %s", *said)
        elif isinstance(event, moves.Acked):
            self.counts.acknowledged += event.count
            self.counts.late += len(event.command.entry_ids) - event.count
            lost = event.count + event.command.extra
            if event.command.outcome is moves.Outcome.DECLARED_LOST and lost:
                self.counts.lost += lost
                self._wires.report(self._trimmed(lost))

    def _trimmed(self, count: int) -> Gap:
        stream, group = self.place.stream.name, self.place.group.name
        said = f'{count} entries of stream "{stream}" were trimmed before group "{group}" had settled them'
        kind = GapKind.TRIMMED_WHILE_PENDING
        return Gap(kind=kind, stream=stream, group=group, count=count, possible=False, message=said)

    async def _keep_loop(self) -> None:
        """Remembers the group's place, and removes consumers that are gone and hold nothing."""
        swept = self._loop.time()
        while True:
            await asyncio.sleep(_SAVE_S * random.uniform(0.8, 1.2))
            try:
                if not self._registered:
                    await self._register()
                await self._wires.keeper.save(self._wires.commands, self.place.stream, self.place.group)
                if self._loop.time() - swept > _IDLE_MS / 1_000:
                    swept = self._loop.time()
                    await self._chores.remove_idle(_IDLE_MS)
            except EventsUnavailable:
                continue
            except ContractMismatch:
                raise
            except OrkiError as error:
                _log.info("%s could not remember its place: %s", self.name, error)


class SeenEvents:
    """A bounded set in two generations: the older one is dropped whole when the younger is full.

    It remembers at least the last `window` ids. An id is added when its event is handed out and taken out when that
    fails, so an event counts as seen only while another copy of it is, or was, handled.
    """

    __slots__ = ("_old", "_window", "_young")

    def __init__(self, window: int) -> None:
        """Args: window: ids to remember; 0 remembers none."""
        self._window = window
        self._young: dict[bytes, None] = {}
        self._old: dict[bytes, None] = {}

    def add(self, event_ids: Sequence[bytes]) -> list[int]:
        """Remembers ids; returns the places of those that were known before, or stand twice in the sequence."""
        if not self._window:
            return []
        repeated = []
        fresh = dict.fromkeys(event_ids)
        if len(fresh) == len(event_ids) and self._young.keys().isdisjoint(fresh) and self._old.keys().isdisjoint(fresh):
            self._young.update(fresh)
        else:
            for place, event_id in enumerate(event_ids):
                if event_id in self._young or event_id in self._old:
                    repeated.append(place)
                else:
                    self._young[event_id] = None
        if len(self._young) >= self._window:
            self._old, self._young = self._young, {}
        return repeated

    def discard(self, event_ids: Iterable[bytes]) -> None:
        """Forgets ids."""
        for event_id in event_ids:
            self._young.pop(event_id, None)
            self._old.pop(event_id, None)
