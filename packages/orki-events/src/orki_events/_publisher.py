"""The publisher: events that arrive while one pipeline is in flight leave with the next.

The publisher decides about retries, never redis-py. An error reply means that the server does not have the entry: it is
sent again, or its caller gets the error. After a broken connection the outcome is unknown; so the publisher searches
the stream's newest entries for the event's id, and sends again only the events that it does not find.

Preparation, refusals and delays belong to a stream or to one of its keys (`_lanes`), and never concern the others in
the same pipeline. Only a connection that fails stops all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, Final

from orki_contract import EventStream, errors
from orki_contract.backoff import Jitter
from orki_contract.model import Durability, Overflow, Stream
from orki_events._durability import check_durability, confirm_durability
from orki_events._lanes import (
    ADD_BELOW_CEILING,
    RETRY,
    EnvelopeEncoder,
    Item,
    Lane,
    Outgoing,
    PublishCounts,
    StreamLanes,
    Ticket,
    misfit,
    oversize,
)
from orki_events._options import EventOptions, Gap, GapKind
from orki_events._readers import find_published
from orki_events.connection import Connection, ScriptMissing
from orki_events.entries import EVENT_ID_BYTES, ZERO_ID, stream_key
from orki_events.groups import ConsumerGroups
from orki_events.registry import StreamRegistry
from orki_events.tuning import TuningCache

_TICKET: Final = attrgetter("ticket")
_log = logging.getLogger("orki.events")


class Publisher:
    """Buffers events and sends them in pipelines, in the order of each key."""

    def __init__(
        self,
        connection: Connection,
        producer: str,
        options: EventOptions,
        groups: ConsumerGroups,
        registry: StreamRegistry,
        report: Callable[[Gap], None],
        used: Callable[[Stream], None],
    ) -> None:
        """Start the publisher on the running event loop; `used` is called with each stream that it prepares."""
        self.counts = PublishCounts()
        self._connection = connection
        self._encoder = EnvelopeEncoder(producer)
        self._options = options
        self._groups = groups
        self._registry = registry
        self._tunings = TuningCache()
        self._report = report
        self._used = used
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._guard = threading.Lock()
        self._streams: dict[str, StreamLanes] = {}
        # Lanes with events that are not settled. Those that waited longest come first.
        self._active: dict[Lane, None] = {}
        self._entries = 0
        self._bytes = 0
        self._submitted = 0
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._backoff = Jitter(RETRY)
        self._resume_at = 0.0
        self._closing = False
        self._opened = 0
        self._task = asyncio.create_task(self._run(), name="orki-events-publisher")

    def submit(self, handle: EventStream[Any, Any], event: Outgoing) -> bytes:
        """Buffer one event and return its id. Safe on any thread.

        Raises:
            EventsBufferFull: The buffer is full; the event was not buffered.
            InvalidArgument: The message is not of the stream's class.
            TooLarge: The event is larger than `max_event_bytes`.
            LocalProtocolError: The publisher is closed.
        """
        event_id = event.event_id or os.urandom(EVENT_ID_BYTES)
        if not self._add(handle, [event], [event_id], None):
            raise errors.EventsBufferFull(
                f"{self._entries} events ({self._bytes} bytes) wait for {self._connection.address.shown}; "
                "wait with flush() or raise buffer_entries"
            )
        return event_id

    async def publish_all(self, handle: EventStream[Any, Any], events: Iterable[Outgoing]) -> list[bytes]:
        """Buffer events, waiting for room if necessary, and return their ids once the server has them all.

        Raises:
            OrkiError: The error of the first event that failed; the others may have been published.
        """
        waiting = list(events)
        fresh = os.urandom(EVENT_ID_BYTES * len(waiting))
        identities = [
            event.event_id or fresh[at : at + EVENT_ID_BYTES]
            for event, at in zip(waiting, range(0, len(fresh), EVENT_ID_BYTES), strict=True)
        ]
        # One more than the events, so that the ticket is not settled before the last event is buffered.
        ticket = Ticket(self._loop.create_future(), open=1)
        begun = 0
        try:
            while True:
                begun += self._add(handle, waiting[begun:], identities[begun:], ticket)
                if begun == len(waiting):
                    break
                await self._wait_progress()
        except errors.OrkiError as error:
            ticket.settle(1, error)
        else:
            ticket.settle(1, None)
        await ticket.future
        return identities

    def _add(
        self,
        handle: EventStream[Any, Any],
        events: Sequence[Outgoing],
        identities: Sequence[bytes],
        ticket: Ticket | None,
    ) -> int:
        """Buffer events until the buffer is full, and return their number. Raises the same errors as `submit`."""
        contract, options, kind = handle.contract, self._options, handle.message
        added, woken = 0, False
        deadline = time.monotonic() + options.publish_timeout
        with self._guard:
            if self._closing:
                raise errors.LocalProtocolError("the publisher is closed; publish while its `async with` block runs")
            stream = self._streams.get(contract.name)
            if stream is None:
                stream = self._streams[contract.name] = StreamLanes(handle)
            lane = stream.lanes.get("") if contract.partitions > 1 else next(iter(stream.lanes.values()), None)
            room, number = options.buffer_entries - self._entries, self._submitted
            size, sequence = self._bytes, stream.sequence
            try:
                for (message, span, _, time_us), event_id in zip(events, identities, strict=True):
                    if added >= room or size >= options.buffer_bytes:
                        break
                    if not isinstance(message, kind):
                        raise misfit(handle, message)
                    raw = message.SerializeToString()
                    if len(raw) > options.max_event_bytes:
                        raise oversize(handle, raw, options.max_event_bytes)
                    if lane is None or contract.partitions > 1:
                        lane = self._lane(stream, stream_key(contract, message))
                    at = time.time_ns() // 1_000 if time_us is None else time_us
                    item = Item(
                        number + 1,
                        event_id,
                        self._encoder.fields(event_id, sequence + 1, at, span, raw),
                        deadline,
                        ticket,
                    )
                    number, sequence, added = number + 1, sequence + 1, added + 1
                    size += item.size
                    lane.queue.append(item)
                    if lane not in self._active:
                        self._active[lane] = None
                        woken = True
            finally:
                self._entries += added
                self._bytes, self._submitted, stream.sequence = size, number, sequence
                if ticket is not None:
                    ticket.open += added
        if woken and threading.get_ident() == self._thread:
            self._wake.set()
        elif woken:
            self._loop.call_soon_threadsafe(self._wake.set)
        return added

    async def flush(self) -> None:
        last = self._submitted
        while not self._task.done() and self._oldest() <= last:
            await self._wait_progress()

    async def close(self, timeout: float) -> None:
        """Send buffered events within the timeout, abandon the rest, and close the connection."""
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
            server = self._connection.address.shown
            error = errors.EventsUnavailable(f"{server} did not accept the event before the publisher closed")
            for lane in list(self._active):
                left = [*lane.done(), *lane.queue]
                lane.queue.clear()
                self._end(lane, left, error)
            await self._connection.close()

    def _lane(self, stream: StreamLanes, key: str) -> Lane:
        lane = stream.lanes.get(key)
        if lane is None:
            lane = stream.lanes[key] = Lane(key, stream.handle)
        return lane

    def _oldest(self) -> float:
        """Return the number of the oldest event that is not settled; infinity without one."""
        with self._guard:
            return min((lane.first or math.inf for lane in self._active), default=math.inf)

    async def _wait_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    async def _run(self) -> None:
        while True:
            await self._wait_due()
            lanes = self._next_batch()
            try:
                await self._deliver(lanes)
            except Exception as error:
                _log.exception("internal error in the publisher")
                failure = errors.LocalProtocolError(f"internal error in the publisher: {error!r}")
                for lane in lanes:
                    self._end(lane, lane.done(), failure)

    async def _wait_due(self) -> None:
        """Wait until a lane may send."""
        while True:
            self._wake.clear()
            with self._guard:
                due = min((max(lane.due, self._resume_at) for lane in self._active), default=math.inf)
            wait = due - time.monotonic()
            if wait <= 0:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wait == math.inf else wait):
                    await self._wake.wait()
        if self._options.linger and self._entries < self._options.batch_entries and not self._closing:
            await asyncio.sleep(self._options.linger)

    def _next_batch(self) -> list[Lane]:
        """Begin chunks of the lanes that may send, within the bounds of a pipeline."""
        now = time.monotonic()
        entries, size = self._options.batch_entries, self._options.batch_bytes
        chosen: list[Lane] = []
        with self._guard:
            due = [lane for lane in self._active if lane.due <= now]
            due = [lane for lane in due if lane.level == due[0].level]
            for at, lane in enumerate(due):
                left = len(due) - at
                taken = lane.take(max(entries // left, 1), size // left)
                if chosen and (taken > size or len(lane.sending) > entries):
                    break
                chosen.append(lane)
                entries, size = entries - len(lane.sending), size - taken
                # The others come first next time.
                del self._active[lane]
                self._active[lane] = None
        return chosen

    async def _deliver(self, lanes: list[Lane]) -> None:
        """Try to publish the lanes' chunks."""
        sent = False
        try:
            await self._tunings.refresh(self._connection, time.monotonic())
            self._notice_reopened()
            lanes = await self._prepare(lanes)
            for lane in lanes:
                if lane.doubtful:
                    await self._find_published(lane)
            lanes = [lane for lane in lanes if lane.sending and not lane.doubtful]
            if not lanes:
                return
            sent = True
            replies = await self._send(lanes)
            if not await self._confirm(lanes):
                return
        except errors.OrkiError as error:
            self._connection_failed(lanes, error, sent)
            return
        self._backoff.reset()
        failures = [failure for lane in lanes if (failure := self._settle(lane, replies)) is not None]
        if any(isinstance(failure, errors.EventsReadOnly) for failure in failures):
            # After a failover, the name may resolve to another server.
            await self._connection.drop()
        elif self._notice_reopened():
            # The server may have lost entries while the connection was idle.
            with contextlib.suppress(errors.OrkiError):
                await self._prepare(lanes)

    async def _confirm(self, lanes: list[Lane], *, marked: bool = True) -> bool:
        """Wait until the chunks are as durable as their streams declare; else let them wait, and return False."""
        contract = lanes[0].handle.contract
        if contract.durability is Durability.MEMORY:
            return True
        try:
            await confirm_durability(self._connection, contract, marked=marked)
        except errors.EventsUnavailable:
            raise
        except errors.OrkiError as error:
            for lane in lanes:
                lane.doubtful = True
                self._refuse(lane, error)
            return False
        return True

    def _notice_reopened(self) -> bool:
        """Whether the connection was opened again since the streams were prepared: then they must be prepared again."""
        if self._opened == self._connection.opened:
            return False
        reopened, self._opened = self._opened > 0, self._connection.opened
        for stream in self._streams.values():
            stream.ready = stream.ready and not reopened
        return reopened

    async def _send(self, lanes: list[Lane]) -> Iterator[Any]:
        self.counts.pipelines += 1
        chunks = [lane.packed(self._tunings.retention(lane.handle.contract)) for lane in lanes]
        packed = b"".join([chunk for chunk, _ in chunks])
        return iter(await self._connection.exchange(packed, sum(count for _, count in chunks)))

    async def _prepare(self, lanes: list[Lane]) -> list[Lane]:
        """Register the lanes' streams and create their groups. Return the lanes whose streams are ready."""
        failures: dict[str, errors.OrkiError] = {}
        for lane in lanes:
            contract = lane.handle.contract
            stream = self._streams[contract.name]
            if stream.ready or contract.name in failures:
                continue
            try:
                # First, so that a contract that does not fit leaves no trace on the server.
                await self._registry.register(self._connection, stream.handle, publishes=True)
                newest = await self._groups.ensure(self._connection, contract, contract.groups)
                await check_durability(self._connection, contract)
                if contract.retention.ceiling:
                    await self._connection.load_script(ADD_BELOW_CEILING)
            except errors.EventsUnavailable:
                raise
            except errors.OrkiError as error:
                failures[contract.name] = error
                continue
            with self._guard:
                for key, last_id in newest.items():
                    found = self._lane(stream, key)
                    if not found.last_id:
                        found.last_id = last_id
            stream.ready = True
            self._used(contract)
        for lane in lanes:
            if (failure := failures.get(lane.handle.contract.name)) is not None:
                self._refuse(lane, failure)
        return [lane for lane in lanes if lane.handle.contract.name not in failures]

    async def _find_published(self, lane: Lane) -> None:
        """Settle the events of a chunk that the server has."""
        wanted = {item.event_id for item in lane.sending}
        try:
            found = await find_published(self._connection, lane.key, lane.last_id or ZERO_ID, wanted)
        except errors.EventsUnavailable:
            raise
        except errors.OrkiError as error:
            self._refuse(lane, error)
            return
        if found and not await self._confirm([lane], marked=False):
            return
        chunk = lane.done()
        lane.sending = [item for item in chunk if item.event_id not in found]
        self.counts.found += len(chunk) - len(lane.sending)
        self.counts.repeated += len(lane.sending)
        self._end(lane, [item for item in chunk if item.event_id in found], None)

    def _settle(self, lane: Lane, replies: Iterator[Any]) -> errors.OrkiError | None:
        """Settle the events of a chunk that was accepted or refused. Return the error if it will be sent again."""
        chunk = lane.sending
        first = next(replies)
        if isinstance(first, list):
            # The entries for which there was room.
            answers = [*first, *[lane.full()] * (len(chunk) - len(first))]
        elif isinstance(first, ScriptMissing):
            # The server was restarted; the script is loaded again with the next attempt.
            self._streams[lane.handle.contract.name].ready = False
            return None
        elif len(chunk) == 1 or lane.handle.contract.retention.ceiling:
            answers = [first] * len(chunk)
        else:
            answers, executed = [*islice(replies, len(chunk))], next(replies)
            if isinstance(executed, list):
                answers = [each if type(each) is bytes else self._connection.reply_error(each) for each in executed]
            elif not isinstance(first, errors.OrkiError):
                # The first refusal gives the reason for the end of the transaction.
                refusals = (each for each in answers if isinstance(each, errors.OrkiError))
                return self._refuse(lane, next(refusals, executed))
            # Without permission for MULTI, each event was published by itself.
        refused: dict[errors.OrkiError, list[Item]] = {}
        again: list[Item] = []
        accepted = lane.done()
        if any(type(answer) is not bytes for answer in answers):
            accepted = []
            for item, answer in zip(chunk, answers, strict=True):
                if type(answer) is bytes:
                    accepted.append(item)
                elif answer.retryable:
                    again.append(item)
                else:
                    refused.setdefault(answer, []).append(item)
        newest = next((answer for answer in reversed(answers) if type(answer) is bytes), None)
        if newest is not None:
            self._groups.positions.published(self._connection, lane.key, answers)
            lane.last_id = newest.decode()
            lane.backoff.reset()
        lane.sending = again
        self._end(lane, accepted, None)
        for error, items in refused.items():
            self._end(lane, items, error)
        if not again:
            return None
        return self._refuse(lane, next(each for each in answers if type(each) is not bytes and each.retryable))

    def _refuse(self, lane: Lane, error: errors.OrkiError) -> errors.OrkiError | None:
        """Send a chunk that was refused again later, or end it. Return the error if it will be sent again."""
        fails = isinstance(error, errors.EventsStreamFull) and lane.handle.contract.retention.overflow is Overflow.FAIL
        if not error.retryable or fails:
            self._end(lane, lane.done(), error)
            return None
        if not isinstance(error, errors.EventsOutOfMemory | errors.EventsStreamFull):
            self._streams[lane.handle.contract.name].ready = False
        lane.failed(time.monotonic())
        self._expire(lane, error)
        return error

    def _connection_failed(self, lanes: list[Lane], error: errors.OrkiError, sent: bool) -> None:
        """Let all lanes wait: the outcome of the chunks that were sent is unknown."""
        if not error.retryable:
            for lane in lanes:
                self._end(lane, lane.done(), error)
            return
        for lane in lanes if sent else ():
            lane.doubtful = True
        for stream in self._streams.values():
            stream.ready = False
        self._resume_at = time.monotonic() + self._backoff.failed()
        for lane in list(self._active):
            self._expire(lane, error)

    def _expire(self, lane: Lane, error: errors.OrkiError) -> None:
        doubt = "; it is unknown whether the server has it" if lane.doubtful else ""
        waited = f"not published within {self._options.publish_timeout:g} s"
        with self._guard:
            late = lane.late(time.monotonic())
        self._end(lane, late, type(error)(f"{waited}{doubt}: {error.message}"))

    def _end(self, lane: Lane, items: Sequence[Item], error: errors.OrkiError | None) -> None:
        """Settle events that the lane has given up, and let the lane rest if it has no more."""
        lost = 0
        for ticket, run in groupby(items, _TICKET):
            count = sum(1 for _ in run)
            if ticket is not None:
                ticket.settle(count, error)
            elif error is not None:
                lost += count
        with self._guard:
            self._entries -= len(items)
            self._bytes -= sum(item.size for item in items)
            if lane.first is None:
                self._active.pop(lane, None)
        self.counts.abandoned += lost
        if error is None:
            self.counts.published += len(items)
        else:
            self.counts.refused += len(items) - lost
        if error is not None and lost:
            name = lane.handle.contract.name
            text = f'{lost} collected events of stream "{name}" were not published: {error.message}'
            kind = GapKind.PUBLISH_ABANDONED
            self._report(Gap(kind=kind, stream=name, group="", count=lost, possible=False, message=text))
        self._progress.set()
