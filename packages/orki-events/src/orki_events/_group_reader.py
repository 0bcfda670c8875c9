"""Runs one consumer of a group: feeds the delivery machine, executes its commands and passes entries to handlers."""

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
from orki_contract.masking import mask
from orki_contract.model import Group
from orki_events import _delivery_table as table
from orki_events._commands import CommandExecutor, GroupMember
from orki_events._delivery import DeliveryMachine
from orki_events._delivery_queue import KeyOf
from orki_events._delivery_windows import DeliverySettings
from orki_events._lease_keeper import LeaseKeeper
from orki_events._letters import letters_gap
from orki_events._options import ConsumeOptions, EventOptions, Gap
from orki_events._seen import SeenEvents
from orki_events.connection import Connection
from orki_events.entries import stream_keys
from orki_events.groups import ConsumerGroups

_SAVE_INTERVAL: Final = 2.0
_LEAVE_TIMEOUT: Final = 1.0
_UNBLOCK_INTERVAL: Final = 0.05
_IDLE_CONSUMER: Final = 600.0
_GROUP: Final = 32
_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderServices:
    """Services of `Events` that a reader uses.

    Attributes:
        reads: The reader's connection for blocking reads.
        commands: The reader's connection for everything else.
        closed: Called when the reader has closed.
        key_of: Returns the key of an entry in an ordered stream; None for a stream without an order.
        single: Whether handlers take single entries.
    """

    reads: Connection
    commands: Connection
    groups: ConsumerGroups
    register: Callable[[Connection], Awaitable[None]]
    report: Callable[[Gap], None]
    closed: Callable[[GroupReader], None]
    options: EventOptions
    key_of: KeyOf | None = None
    single: bool = True

    def read_timeout(self, group: Group) -> float:
        """Maximum time of a blocking read; in an ordered stream, short beside the lease of a partition."""
        timeout = self.options.block_timeout
        return timeout if self.key_of is None else min(timeout, group.ack_deadline / 4)


class GroupReader:
    """A consumer of one group, from `start` to `close`."""

    def __init__(
        self, member: GroupMember, services: ReaderServices, options: ConsumeOptions, concurrency: int
    ) -> None:
        """Create a consumer whose handlers can process `concurrency` entries at once, without starting it."""
        self.member = member
        self.seen = SeenEvents(services.options.dedupe_window)
        self._services = services
        self._executor = CommandExecutor(member, services.reads, services.commands, services.read_timeout(member.group))
        self.key_of = services.key_of
        self._machine = _machine(member, options, concurrency, services)
        self._leases: LeaseKeeper | None = None
        if services.key_of is not None:
            self._leases = LeaseKeeper(member, services.commands, self._own)
        self._loop = asyncio.get_running_loop()
        self._waiters: deque[asyncio.Future[table.Dispatch | None]] = deque()
        self._taken: deque[tuple[table.Dispatch, table.Entry]] = deque()
        self._asked = False
        self._idle: deque[asyncio.Future[None]] = deque()
        self._read_queue: asyncio.Queue[table.Read] = asyncio.Queue()
        self._command_queue: asyncio.Queue[table.CreateGroups | table.ServerCommand] = asyncio.Queue()
        self._done: dict[str, list[bytes]] = {}
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._arming = False
        self._ending = False
        self._shut = False
        self._registered = False
        self._admitted = asyncio.Event()
        self._closed = asyncio.Event()
        self._error: OrkiError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return f'consumer "{self.member.consumer}" of group "{self.member.group.name}" on "{self.member.stream.name}"'

    def start(self) -> None:
        loops = [self._read_loop(), self._command_loop(), self._maintenance_loop()]
        if self._leases is not None:
            loops.append(self._leases.keep(self._admitted, self._closed))
        for loop in loops:
            self._tasks.append(asyncio.create_task(self._guard(loop), name=f"orki-events {self.name}"))
        self._receive(table.Opened())

    async def take(self, count: int) -> table.Dispatch | None:
        """Wait for entries of one partition: at least one and at most `count`; None once the consumer ends.

        Raises:
            OrkiError: The server refuses the consumer, and a retry cannot succeed.
        """
        if self._error is not None:
            raise self._error
        if self._ending:
            return None
        waiter: asyncio.Future[table.Dispatch | None] = self._loop.create_future()
        self._waiters.append(waiter)
        self._receive(table.Requested(count))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and (dispatch := waiter.result()) is not None:
                self.give_back(dispatch.key, dispatch.entries)
            raise

    def next_entry(self) -> tuple[table.Dispatch, table.Entry] | None:
        """Return an entry whose handling must begin now; None if `wait` must be called first."""
        while self._taken:
            dispatch, entry = taken = self._taken.popleft()
            machine = self._machine
            if not machine.guarded or machine.may_begin(dispatch.key, entry[0], self._loop.time()):
                return taken
            self.give_back(dispatch.key, [entry])
        return None

    async def wait(self) -> bool:
        """Wait until `next_entry` may return an entry; return False once the consumer ends.

        Entries are taken from the machine in small groups, of which all callers take theirs: waiting for each one
        alone would cost more than many handlers do.

        Raises:
            OrkiError: The server refuses the consumer, and a retry cannot succeed.
        """
        if not self._asked and self._error is None and not self._ending:
            self._asked = True
            self._receive(table.Requested(_GROUP))
        if self._error is not None:
            raise self._error
        if self._ending:
            return False
        if not self._taken:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._idle.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if not waiter.cancelled():
                    self._wake(1)
                raise
        return True

    def _wake(self, count: int) -> None:
        while count and self._idle:
            waiter = self._idle.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def succeeded(self, key: str, entry_id: bytes) -> None:
        """Settle one entry; acknowledgements of one turn of the event loop are sent together."""
        done = self._done.get(key)
        if done is None:
            done = self._done[key] = []
        done.append(entry_id)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def succeeded_all(self, key: str, entry_ids: Sequence[bytes]) -> None:
        if entry_ids:
            self._receive(table.Succeeded(key, entry_ids))

    def failed(
        self,
        key: str,
        entries: Sequence[table.Entry],
        error: BaseException,
        final: bool = False,
        events: Sequence[object] = (),
    ) -> None:
        """Report entries whose handling failed.

        Args:
            key: The partition.
            entries: The entries.
            error: Why it failed.
            final: Whether the entries go to the dead letters at once.
            events: What was handled: the message of the error is stored without their sensitive values.
        """
        reason = error.reason if isinstance(error, OrkiError) else Reason.REASON_HANDLER_FAILED
        message = error.message if isinstance(error, OrkiError) else f"{type(error).__name__}: {error}"
        self._receive(table.Failed(key, entries, reason, mask(message, events), final))

    def give_back(self, key: str, entries: list[table.Entry]) -> None:
        self._receive(table.Returned(key, entries))

    def end(self) -> None:
        """Take no more entries: pending calls of `take` return None, and untaken entries are handed back."""
        if not self._ending:
            self._ending = True
            if self._leases is not None:
                self._leases.end()
            self._release(None)
            self._return_taken(None)
            self._receive(table.DrainRequested())

    async def close(self) -> None:
        """End the consumer: wait until taken entries are settled, at most `drain_timeout`, and leave the group.

        Concurrent and later calls wait for the same end. Cancelling a call ends the wait for settlements.
        """
        closing = self._start_closing()
        try:
            await asyncio.wait({closing})
        except asyncio.CancelledError:
            closing.cancel()
            await asyncio.wait({closing})
            raise
        if not closing.cancelled():
            closing.result()

    def abandon(self) -> None:
        """End the consumer without waiting. May be called on any thread."""
        if not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(self._start_closing)

    def _start_closing(self) -> asyncio.Task[None]:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name=f"orki-events close {self.name}")
        return self._closing

    async def _close(self) -> None:
        self.end()
        services = self._services
        try:
            if self._error is None:
                async with asyncio.timeout(services.options.drain_timeout):
                    await self._drained()
                    with contextlib.suppress(OrkiError):
                        await services.groups.save(services.commands, self.member.stream, self.member.group)
                        await self._executor.leave()
                        if self._leases is not None:
                            await self._leases.leave()
            elif self._leases is not None and self._admitted.is_set():
                # Others must not wait for the end of the leases.
                with contextlib.suppress(OrkiError):
                    async with asyncio.timeout(_LEAVE_TIMEOUT):
                        await self._leases.leave()
        except TimeoutError:
            _log.warning("%s left %d entries for other consumers to claim", self.name, self._machine.held)
        finally:
            self._shut = True
            self._closed.set()
            if self._timer is not None:
                self._timer.cancel()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await services.reads.close()
            await services.commands.close()
            services.closed(self)

    async def _drained(self) -> None:
        while not self._closed.is_set() and self._error is None:
            with contextlib.suppress(OrkiError):
                await self._executor.unblock()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_UNBLOCK_INTERVAL):
                    await self._closed.wait()

    def _receive(self, event: table.Event) -> None:
        if self._shut:
            # Too late: the consumer that claims the entry will handle it.
            return
        try:
            self._dispatch(self._machine.receive(event, self._loop.time()))
        except OrkiError as error:
            self._fail(error)

    def _dispatch(self, commands: Iterable[table.Command]) -> None:
        for command in commands:
            if isinstance(command, table.Dispatch):
                self._hand_out(command)
            elif isinstance(command, table.Read):
                self._read_queue.put_nowait(command)
            else:
                self._command_queue.put_nowait(command)
        if self._machine.state is table.State.CLOSED:
            self._closed.set()
        elif not self._arming:
            self._arming = True
            self._loop.call_soon(self._arm)

    def _return_taken(self, key: str | None) -> None:
        """Return entries whose handling has not begun: those of one partition, or all."""
        taken, self._taken = self._taken, deque()
        for dispatch, entry in taken:
            if key in (None, dispatch.key):
                self.give_back(dispatch.key, [entry])
            else:
                self._taken.append((dispatch, entry))

    def _own(self, event: table.Event) -> None:
        """Process an event of the ownership of a partition."""
        late = isinstance(event, table.PartitionGained | table.PartitionWithdrawn) and self._ending
        if not late and self._machine.state is not table.State.CLOSED:
            self._receive(event)
            if isinstance(event, table.PartitionLost | table.PartitionWithdrawn):
                self._return_taken(event.key)

    def _hand_out(self, dispatch: table.Dispatch) -> None:
        if self._asked:
            self._asked = False
            self._taken.extend((dispatch, entry) for entry in dispatch.entries)
            self._wake(len(dispatch.entries))
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(dispatch)
                return
            # The caller was cancelled; its entries go to the next caller.
        self.give_back(dispatch.key, dispatch.entries)

    def _arm(self) -> None:
        self._arming = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._machine.next_timer()
        if due is not None and not self._closed.is_set():
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        try:
            self._dispatch(self._machine.handle_timer(self._loop.time()))
        except OrkiError as error:
            self._fail(error)

    def _flush(self) -> None:
        self._flushing = False
        done, self._done = self._done, {}
        for key, entry_ids in done.items():
            self._receive(table.Succeeded(key, entry_ids))

    def _release(self, error: OrkiError | None) -> None:
        self._wake(len(self._idle))
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    def _fail(self, error: OrkiError) -> None:
        """End the consumer with an error that `take` raises."""
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
            _log.exception("internal error in %s", self.name)
            self._fail(LocalProtocolError(f"internal error in {self.name}: {error!r}"))

    async def _read_loop(self) -> None:
        while True:
            command = await self._read_queue.get()
            with contextlib.suppress(OrkiError):
                await self._services.reads.fetch_client_id()
            event = await self._executor.run(command)
            await self._services.groups.note(self._services.reads, self.member.stream, self.member.group, event)
            self._receive(event)

    async def _command_loop(self) -> None:
        while True:
            command = await self._command_queue.get()
            if isinstance(command, table.CreateGroups):
                event = await self._create_groups(command)
            else:
                event = await self._executor.run(command)
            await self._services.groups.note(self._services.commands, self.member.stream, self.member.group, event)
            self._log_letters(event)
            if isinstance(event, table.GivenUp) and self._leases is not None:
                self._leases.released(event.command.key)
            self._receive(event)

    async def _create_groups(self, command: table.CreateGroups) -> table.Event:
        services = self._services
        try:
            # First, so that a contract that does not fit leaves no trace on the server.
            await self._register()
            stream, group = self.member.stream, self.member.group
            await services.groups.ensure(services.commands, stream, (group,), consumes=True)
            self._admitted.set()
        except OrkiError as error:
            if not error.retryable:
                raise
            return table.no_reply(command)
        return table.GroupsReady(command)

    async def _register(self) -> None:
        """Register the stream. Errors not listed here are logged: a server that is out of memory can still be read.

        Raises:
            ContractMismatch: The stream's contract does not fit the registered one.
            EventsUnavailable: The server does not answer.
        """
        try:
            await self._services.register(self._services.commands)
            self._registered = True
        except (ContractMismatch, EventsUnavailable):
            self._registered = False
            raise
        except OrkiError as error:
            self._registered = False
            _log.warning("%s could not register its stream and will try again: %s", self.name, error.message)

    def _log_letters(self, event: table.Event) -> None:
        if isinstance(event, table.DeadLettered):
            for letter in event.command.letters:
                values = (self.name, letter.entry[0].decode(), letter.deliveries, letter.message)
                _log.error("%s dead-lettered entry %s after %d deliveries: %s", *values)
            if event.dropped:
                self._services.report(letters_gap(self.member.stream, self.member.group, event.dropped))

    async def _maintenance_loop(self) -> None:
        services = self._services
        swept = self._loop.time()
        while True:
            await asyncio.sleep(_SAVE_INTERVAL * random.uniform(0.8, 1.2))
            try:
                if not self._registered:
                    await self._register()
                await services.groups.save(services.commands, self.member.stream, self.member.group)
                if self._loop.time() - swept > _IDLE_CONSUMER:
                    swept = self._loop.time()
                    await self._executor.remove_idle(_IDLE_CONSUMER)
            except EventsUnavailable:
                continue
            except ContractMismatch:
                raise
            except OrkiError as error:
                _log.info("%s could not save its position: %s", self.name, error)


def _machine(
    member: GroupMember, options: ConsumeOptions, concurrency: int, services: ReaderServices
) -> DeliveryMachine:
    keys = stream_keys(member.stream)
    ack_deadline = member.group.ack_deadline
    sweep_interval = options.sweep_interval or min(ack_deadline / 3, 5.0)
    settings = DeliverySettings(
        prefetch=max(options.prefetch or 4 * concurrency, len(keys), concurrency),
        max_deliveries=member.group.max_deliveries,
        ack_deadline=ack_deadline,
        # Jittered, so that the consumers of a group do not sweep at the same time.
        sweep_interval=sweep_interval * random.uniform(0.8, 1.2),
        hold_limit=options.hold_limit,
        backoff=options.backoff,
        prefetch_bytes=options.prefetch_bytes,
        retry_entries=options.retry_entries,
        retry_bytes=options.retry_bytes,
        key_of=services.key_of,
        single=services.single,
        read_time=services.read_timeout(member.group),
    )
    return DeliveryMachine(keys, settings)
