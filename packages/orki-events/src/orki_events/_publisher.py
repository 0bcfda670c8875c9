"""The publisher: events that arrive while one pipeline is in flight leave with the next.

The publisher decides about retries, never redis-py. An error reply means that the server does not have the entry: it is
sent again, or its caller gets the error. After a broken connection the outcome is unknown; so the publisher searches
the stream's newest entries for the event's id, and sends again only the events that it does not find.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message

from orki_contract import EventStream, errors
from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.model import milliseconds
from orki_contract.trace import Span
from orki_events._options import EventOptions, Gap, GapKind
from orki_events._readers import find_published
from orki_events.connection import Connection, pack
from orki_events.entries import DATA_FIELD, ENVELOPE_FIELD, encode_envelope, new_event_id, parse_id, stream_key
from orki_events.groups import ConsumerGroups
from orki_events.registry import StreamRegistry
from orki_events.tuning import TuningCache

_RETRY: Final = JitterOptions(initial=0.05, maximum=0.5, spread=0.5)
_COMMAND_OVERHEAD: Final = 100
_log = logging.getLogger("orki.events")


@dataclass(slots=True)
class PublishCounts:
    """Counters of a publisher since its start.

    Attributes:
        published: Events that the server has.
        refused: Events whose caller got an error.
        abandoned: Events of `collect` that could not be sent in time.
        repeated: Events that were sent again after a broken connection.
        found: Events that were found in the stream after a broken connection, and therefore not sent again.
        pipelines: Pipelines sent.
    """

    published: int = 0
    refused: int = 0
    abandoned: int = 0
    repeated: int = 0
    found: int = 0
    pipelines: int = 0


class Outgoing(NamedTuple):
    """An event to publish.

    Attributes:
        message: The event.
        span: Span in which it happened.
        event_id: Its identity (16 bytes); the default is a new one.
        time_us: Time of the event in microseconds since the Unix epoch; the default is now.
    """

    message: Message
    span: Span | None = None
    event_id: bytes | None = None
    time_us: int | None = None


@dataclass(slots=True)
class _Ticket:
    """The outcome of one or more events, for which a caller waits."""

    future: asyncio.Future[None]
    open: int = 0
    error: errors.OrkiError | None = None

    def settle(self, error: errors.OrkiError | None) -> None:
        self.open -= 1
        self.error = self.error or error
        if self.open == 0 and not self.future.done():
            if self.error is None:
                self.future.set_result(None)
            else:
                self.future.set_exception(self.error)


@dataclass(slots=True)
class _Item:
    handle: EventStream[Any, Any]
    key: str
    event_id: bytes
    envelope: bytes
    raw: bytes
    deadline: float
    number: int
    ticket: _Ticket | None

    @property
    def size(self) -> int:
        return len(self.key) + len(self.envelope) + len(self.raw) + _COMMAND_OVERHEAD

    def packed(self, limit: int) -> bytes:
        """Encode the command. This happens late, because a deployment may change the limit meanwhile."""
        fields = (ENVELOPE_FIELD, self.envelope, DATA_FIELD, self.raw)
        return pack((b"XADD", self.key, b"MAXLEN", b"~", limit, b"*", *fields))


@dataclass(slots=True)
class _Key:
    """A Redis key: the newest known entry, and the time of the next trimming by age."""

    last_id: str
    trim_at: float = 0.0


class Publisher:
    """Buffers events and sends them in pipelines, in order."""

    def __init__(
        self,
        connection: Connection,
        producer: str,
        options: EventOptions,
        groups: ConsumerGroups,
        registry: StreamRegistry,
        report: Callable[[Gap], None],
    ) -> None:
        """Start the publisher on the running event loop."""
        self.counts = PublishCounts()
        self._connection = connection
        self._producer = producer
        self._options = options
        self._groups = groups
        self._registry = registry
        self._tunings = TuningCache()
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._guard = threading.Lock()
        self._queue: deque[_Item] = deque()
        self._entries = 0
        self._bytes = 0
        self._submitted = 0
        self._settled = 0
        self._sequences: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._keys: dict[str, _Key] = {}
        self._ready: set[str] = set()
        self._sending: list[_Item] = []
        self._closing = False
        self._task = asyncio.create_task(self._run(), name="orki-events-publisher")

    def submit(self, handle: EventStream[Any, Any], event: Outgoing, ticket: _Ticket | None = None) -> bytes:
        """Buffer one event and return its id. Without a ticket, safe on any thread.

        Raises:
            EventsBufferFull: The buffer is full; the event was not buffered.
            InvalidArgument: The message is not of the stream's class.
            TooLarge: The event is larger than `max_event_bytes`.
            LocalProtocolError: The publisher is closed.
        """
        contract, message = handle.contract, event.message
        if not isinstance(message, handle.message):
            raise errors.InvalidArgument(
                f'stream "{contract.name}" takes {handle.message.DESCRIPTOR.full_name}, not {type(message).__name__}'
            )
        raw = message.SerializeToString()
        if len(raw) > self._options.max_event_bytes:
            raise errors.TooLarge(
                f'an event for stream "{contract.name}" has {len(raw)} bytes, more than {self._options.max_event_bytes}'
            )
        key = stream_key(contract, message)
        event_id = event.event_id if event.event_id is not None else new_event_id()
        time_us = event.time_us if event.time_us is not None else time.time_ns() // 1_000
        with self._guard:
            if self._closing:
                raise errors.LocalProtocolError("the publisher is closed; publish while its `async with` block runs")
            if self._entries >= self._options.buffer_entries or self._bytes >= self._options.buffer_bytes:
                raise errors.EventsBufferFull(
                    f"{self._entries} events ({self._bytes} bytes) wait for {self._connection.address.shown}; "
                    "wait with flush() or raise buffer_entries"
                )
            number = self._sequences.get(contract.name, 0) + 1
            envelope = encode_envelope(
                event_id=event_id, producer=self._producer, sequence=number, time_us=time_us, span=event.span
            )
            self._sequences[contract.name] = number
            self._submitted += 1
            deadline = time.monotonic() + self._options.publish_timeout
            item = _Item(handle, key, event_id, envelope, raw, deadline, self._submitted, ticket)
            self._queue.append(item)
            self._entries += 1
            self._bytes += item.size
            if ticket is not None:
                ticket.open += 1
            first = len(self._queue) == 1
        if first:
            self._call(self._wake.set)
        return event_id

    async def publish_all(self, handle: EventStream[Any, Any], events: Iterable[Outgoing]) -> list[bytes]:
        """Buffer events, waiting for room if necessary, and return their ids once the server has them all.

        Raises:
            OrkiError: The error of the first event that failed; the others may have been published.
        """
        ticket = _Ticket(self._loop.create_future())
        # One more than the events, so that the ticket is not settled before the last event is buffered.
        ticket.open = 1
        identities = []
        try:
            for event in events:
                while True:
                    try:
                        identities.append(self.submit(handle, event, ticket))
                        break
                    except errors.EventsBufferFull:
                        await self._wait_progress()
        except errors.OrkiError as error:
            ticket.settle(error)
        else:
            ticket.settle(None)
        await ticket.future
        return identities

    async def flush(self) -> None:
        last = self._submitted
        while self._settled < last and not self._task.done():
            await self._wait_progress()

    async def close(self, timeout: float) -> None:
        """Send buffered events within the timeout, and abandon the rest."""
        with self._guard:
            self._closing = True
        try:
            async with asyncio.timeout(timeout):
                await self.flush()
        except TimeoutError:
            _log.warning("%s did not accept all events within %g s", self._connection.address.shown, timeout)
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])
            left = [*self._sending, *self._queue]
            self._queue.clear()
            server = self._connection.address.shown
            self._end(left, errors.EventsUnavailable(f"{server} did not accept the event before the publisher closed"))

    def _call(self, function: Callable[[], None]) -> None:
        if threading.get_ident() == self._thread:
            function()
        else:
            self._loop.call_soon_threadsafe(function)

    async def _wait_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            if self._options.linger and len(self._queue) < self._options.batch_entries and not self._closing:
                await asyncio.sleep(self._options.linger)
            self._sending = self._next_batch()
            try:
                await self._deliver()
            except Exception as error:
                _log.exception("internal error in the publisher")
                self._end(self._sending, errors.LocalProtocolError(f"internal error in the publisher: {error!r}"))

    def _next_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        size = 0
        with self._guard:
            while self._queue and len(batch) < self._options.batch_entries:
                size += self._queue[0].size
                if batch and size > self._options.batch_bytes:
                    break
                batch.append(self._queue.popleft())
            if not self._queue:
                self._wake.clear()
        return batch

    async def _deliver(self) -> None:
        backoff = Jitter(_RETRY)
        doubtful = False
        while self._sending:
            try:
                await self._prepare(self._sending)
                if not self._sending:
                    return
                if doubtful:
                    self._end(await self._find_published(self._sending), None)
                    self.counts.repeated += len(self._sending)
                    doubtful = False
                    continue
                replies = await self._send(self._sending)
            except errors.OrkiError as error:
                if not error.retryable:
                    self._end(self._sending, error)
                    return
                failure = error
                doubtful = doubtful or isinstance(error, errors.EventsUnavailable)
                self._ready.clear()
            else:
                retryable = self._settle(self._sending, replies)
                if retryable is None:
                    return
                failure = retryable
                if isinstance(failure, errors.EventsReadOnly):
                    # After a failover, the name may resolve to another server.
                    await self._connection.drop()
            self._expire(failure, doubtful)
            await asyncio.sleep(backoff.failed())

    async def _send(self, batch: list[_Item]) -> list[Any]:
        self.counts.pipelines += 1
        contracts = {id(item.handle.contract): item.handle.contract for item in batch}
        limits = {key: self._tunings.retention(contract).max_entries for key, contract in contracts.items()}
        packed = b"".join([item.packed(limits[id(item.handle.contract)]) for item in batch])
        replies = await self._connection.exchange(packed, len(batch))
        newest = {item.key: (item, reply) for item, reply in zip(batch, replies, strict=True) if type(reply) is bytes}
        now = time.monotonic()
        for key, (item, entry_id) in newest.items():
            known = self._keys[key]
            known.last_id = entry_id.decode()
            age = self._tunings.retention(item.handle.contract).max_age
            if age and now >= known.trim_at:
                known.trim_at = now + min(max(age / 100, 1.0), 60.0)
                await self._trim(key, entry_id, age)
        return replies

    async def _trim(self, key: str, newest: bytes, age: float) -> None:
        """Trim by age. The newest id carries the server's time, which may differ from this process's."""
        oldest = max(parse_id(newest).milliseconds - milliseconds(age), 0)
        try:
            await self._connection.execute((b"XTRIM", key, b"MINID", b"~", oldest))
        except errors.OrkiError as error:
            _log.warning("%s could not be trimmed by age: %s", key, error.message)

    async def _prepare(self, batch: Sequence[_Item]) -> None:
        await self._tunings.refresh(self._connection, time.monotonic())
        refused: set[str] = set()
        for item in batch:
            contract = item.handle.contract
            if contract.name in refused:
                continue
            if contract.name not in self._ready:
                try:
                    # First, so that a contract that does not fit leaves no trace on the server.
                    await self._registry.register(self._connection, item.handle, publishes=True)
                except (errors.ContractMismatch, errors.InvalidContract) as error:
                    refused.add(contract.name)
                    self._end([each for each in batch if each.handle.contract.name == contract.name], error)
                    continue
                newest = await self._groups.ensure(self._connection, contract, contract.groups)
                for key, last_id in newest.items():
                    self._keys.setdefault(key, _Key(last_id))
                self._ready.add(contract.name)

    async def _find_published(self, batch: Sequence[_Item]) -> list[_Item]:
        doubtful: dict[str, set[bytes]] = {}
        for item in batch:
            doubtful.setdefault(item.key, set()).add(item.event_id)
        found: set[bytes] = set()
        for key, identities in doubtful.items():
            found |= await find_published(self._connection, key, self._keys[key].last_id, identities)
        published = [item for item in batch if item.event_id in found]
        self.counts.found += len(published)
        return published

    def _settle(self, batch: list[_Item], replies: list[Any]) -> errors.OrkiError | None:
        """Settle events that were accepted or refused. Return a retryable error if other events must be sent again."""
        refused = {index: reply for index, reply in enumerate(replies) if isinstance(reply, errors.OrkiError)}
        if not refused:
            self._end(batch, None)
            return None
        retryable = None
        self._end([item for index, item in enumerate(batch) if index not in refused], None)
        for index, reply in refused.items():
            if reply.retryable:
                retryable = reply
            else:
                self._end([batch[index]], reply)
        return retryable

    def _expire(self, error: errors.OrkiError, doubtful: bool) -> None:
        now = time.monotonic()
        late = [item for item in self._sending if item.deadline <= now]
        if late:
            doubt = "; it is unknown whether the server has it" if doubtful else ""
            waited = f"not published within {self._options.publish_timeout:g} s"
            self._end(late, type(error)(f"{waited}{doubt}: {error.message}"))

    def _end(self, batch: Sequence[_Item], error: errors.OrkiError | None) -> None:
        ended = {item.number for item in batch}
        self._sending = [item for item in self._sending if item.number not in ended]
        lost: dict[str, int] = {}
        size = 0
        for item in batch:
            size += item.size
            if item.ticket is not None:
                item.ticket.settle(error)
            elif error is not None:
                lost[item.handle.contract.name] = lost.get(item.handle.contract.name, 0) + 1
        with self._guard:
            self._entries -= len(batch)
            self._bytes -= size
        self._settled += len(batch)
        abandoned = sum(lost.values())
        self.counts.abandoned += abandoned
        if error is None:
            self.counts.published += len(batch)
        else:
            self.counts.refused += len(batch) - abandoned
            for name, count in lost.items():
                text = f'{count} collected events of stream "{name}" were not published: {error.message}'
                kind = GapKind.PUBLISH_ABANDONED
                self._report(Gap(kind=kind, stream=name, group="", count=count, possible=False, message=text))
        self._progress.set()
