"""`connect` returns an `Events`: one process's access to the event plane."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import socket
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import replace
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

from orki_contract import EventStream
from orki_contract.errors import InvalidSetting, LocalProtocolError, UnknownStream
from orki_contract.model import Durability, Retention, Stream
from orki_contract.trace import Span, current_span
from orki_events._commands import GroupMember
from orki_events._consumers import (
    Consumer,
    Delivery,
    DeliveryBatch,
    Subscription,
    take_batch,
    take_one,
)
from orki_events._group_reader import GroupReader, ReaderServices
from orki_events._lanes import Outgoing, PublishCounts
from orki_events._ledger import StreamLedger, read_ledger
from orki_events._letters import DeadLetterEntry, list_dead_letters, replay_dead_letters
from orki_events._options import ConsumeOptions, EventOptions, Gap, for_durable
from orki_events._partition_keys import key_reader
from orki_events._publisher import Publisher
from orki_events._push import PushRun, run_until
from orki_events._readers import TailEntry, follow_stream
from orki_events._trimming import Trimmer
from orki_events.connection import Address, Connection, parse_address
from orki_events.groups import ConsumerGroups
from orki_events.registry import StreamRegistry, StreamVersion
from orki_events.tuning import Tuned, Tuning, read_retention, read_tunings, trim, tune

E = TypeVar("E", bound=Message)
G = TypeVar("G", bound=str)
T = TypeVar("T")
_log = logging.getLogger("orki.events")


def connect(
    url: str,
    *,
    producer: str | None = None,
    options: EventOptions | None = None,
    username: str | None = None,
    password: str | None = None,
) -> Events:
    """Return the event plane at a Redis URL, for use in `async with`. Nothing is sent before the first use.

    Args:
        url: `redis://HOST:PORT/DB`, `rediss://…` or `unix:///PATH`.
        producer: Name of this process, unique to each run; the default is made of host name and process id.
        options: Settings.
        username: The user, if the URL does not contain it.
        password: The password, if the URL does not contain it.

    Raises:
        InvalidSetting: The URL or the producer's name is invalid.
    """
    address = parse_address(url, username=username, password=password)
    name = producer if producer is not None else f"{socket.gethostname()}-{os.getpid()}@{os.urandom(4).hex()}"
    if not re.fullmatch(r"[!-~]{1,200}", name):
        raise InvalidSetting(f"the producer's name is {name!r}; it must be 1 to 200 printable ASCII letters, no spaces")
    return Events(address, name, options or EventOptions())


class Events:
    """One process's access to the event plane. Use `connect` to create it.

    Methods that use the server raise an OrkiError if it does not answer or refuses; the error's class gives the reason.

    Attributes:
        producer: Name under which this process publishes.
    """

    def __init__(self, address: Address, producer: str, options: EventOptions) -> None:
        self.producer = producer
        self.options = options
        self._address = address
        self._groups = ConsumerGroups(self._report)
        self._registry = StreamRegistry()
        self._commands: Connection | None = None
        self._publish_connection: Connection | None = None
        self._publisher: Publisher | None = None
        self._durable: Publisher | None = None
        self._readers: set[GroupReader] = set()
        self._tails: set[Connection] = set()
        self._numbers = itertools.count(1)
        self._trimmer: Trimmer | None = None

    async def __aenter__(self) -> Self:
        """Start the publisher; connections open when they are needed."""
        if self._publisher is not None:
            raise LocalProtocolError("this Events is already in use; call connect() again for another")
        self._commands = self._connection("commands")
        self._publish_connection = self._connection("publish")
        sources = (read_retention, self._registry.streams, self._report)
        self._trimmer = Trimmer(self._connection("trim"), self.producer, *sources)
        shared = (self._groups, self._registry, self._report, self._trimmer.use)
        self._publisher = Publisher(self._publish_connection, self.producer, self.options, *shared)
        self._durable = Publisher(self._connection("durable"), self.producer, for_durable(self.options), *shared)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def counts(self) -> PublishCounts:
        """Numbers of events published, refused and abandoned."""
        counts = self._opened().counts
        return counts + self._durable.counts if self._durable is not None else counts

    async def publish(
        self,
        stream: EventStream[E, Any],
        message: E,
        *,
        span: Span | None = None,
        event_id: bytes | None = None,
        time_us: int | None = None,
    ) -> bytes:
        """Publish an event and return its id once the server has it. Waits while the buffer is full.

        Args:
            stream: The stream.
            message: The event.
            span: Span in which the event happened; the default is the current one.
            event_id: Its identity (16 bytes); readers drop an id that they have seen. The default is a new one.
            time_us: Time of the event in microseconds since the Unix epoch; the default is now.

        Raises:
            EventsUnavailable: The server did not answer in time; it may or may not have the event.
            EventsOutOfMemory, EventsReadOnly, EventsNotPersisting, EventsLoading: The server did not accept it in time.
            EventsRefused: The server refuses the event.
            ContractMismatch: The stream's contract is incompatible with the registered one.
            InvalidArgument, TooLarge: The event cannot be published.
        """
        publisher = self._publisher_of(stream)
        outgoing = Outgoing(message, span or current_span(), event_id, time_us)
        (identity,) = await publisher.publish_all(stream, (outgoing,))
        return identity

    async def publish_many(
        self, stream: EventStream[E, Any], messages: Iterable[E], *, span: Span | None = None
    ) -> list[bytes]:
        """Publish events in few calls and return their ids, in order, once the server has them all.

        Raises:
            OrkiError: The first error of any event; see `publish`. The other events may have been published.
        """
        parent = span or current_span()
        return await self._publisher_of(stream).publish_all(stream, [Outgoing(message, parent) for message in messages])

    async def publish_outgoing(self, stream: EventStream[E, Any], outgoing: Iterable[Outgoing]) -> list[bytes]:
        """Publish events that have their own span, id and time, such as those of an outbox; see `publish_many`."""
        return await self._publisher_of(stream).publish_all(stream, outgoing)

    def collect(
        self, stream: EventStream[E, Any], message: E, *, span: Span | None = None, time_us: int | None = None
    ) -> bytes:
        """Buffer an event for publishing and return its id at once. May be called on any thread.

        An event that cannot be sent in time is counted and reported as a gap. The arguments are those of `publish`.

        Raises:
            EventsBufferFull: The buffer is full; the event was not buffered.
            InvalidArgument, TooLarge: The event cannot be published.
        """
        return self._publisher_of(stream).submit(stream, Outgoing(message, span or current_span(), time_us=time_us))

    async def flush(self) -> None:
        """Wait until all earlier events were sent, refused or abandoned."""
        await self._opened().flush()
        if self._durable is not None:
            await self._durable.flush()

    async def ping(self) -> None:
        """Check that the server answers."""
        await self._command_connection().execute((b"PING",))

    async def prepare(self, stream: EventStream[Any, Any]) -> None:
        """Register a stream and create its groups, as the first publish would.

        Raises:
            ContractMismatch: The stream's contract is incompatible with the registered one.
        """
        connection = self._command_connection()
        await self._registry.register(connection, stream, publishes=True)
        await self._groups.ensure(connection, stream.contract, stream.contract.groups)

    async def create_groups(self, stream: Stream) -> None:
        """Create the groups that a registered stream declares, and that do not exist."""
        await self._groups.ensure(self._command_connection(), stream, stream.groups)

    async def maintain(self, stream: EventStream[Any, Any]) -> Retention:
        """Do for a stream what publishing does beside writing entries: register it, create its groups, and trim it.

        A program that writes entries by other means calls this every few seconds, and has each `XADD` keep at most
        `max_entries` of the result.

        Raises:
            ContractMismatch: The stream's contract is incompatible with the registered one.
        """
        await self.prepare(stream)
        return await trim(self._command_connection(), stream.contract)

    def keep_trimmed(self) -> None:
        """Offer to trim all registered streams, and not only those that this process publishes or consumes."""
        self._opened()
        assert self._trimmer is not None
        self._trimmer.use_all()

    async def registered_streams(self) -> list[StreamVersion]:
        """Return the streams that the fleet publishes and consumes, by name."""
        return await self._registry.streams(self._command_connection())

    async def tune(self, stream: EventStream[Any, Any] | str, tuning: Tuning | None) -> Tuned:
        """Set the retention of a registered stream for the whole fleet, within its contract's bounds, and trim it.

        Args:
            stream: The stream, or its name.
            tuning: The setting, which replaces an earlier one; None restores the contract's retention.

        Raises:
            UnknownStream: No such stream is registered.
            InvalidSetting: A value is outside the bounds that the contract declares.
        """
        name = stream if isinstance(stream, str) else stream.contract.name
        known = {each.contract.name: each for each in await self.registered_streams()}
        if name not in known:
            raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
        return await tune(self._command_connection(), known[name], tuning)

    async def tunings(self) -> dict[str, Tuning]:
        """Return the retention settings of deployments by stream; other streams follow their contract."""
        return await read_tunings(self._command_connection())

    def deliveries(
        self,
        stream: EventStream[E, G],
        *,
        group: G,
        consumer: str | None = None,
        options: ConsumeOptions | None = None,
    ) -> Subscription[Delivery[E]]:
        """Return an iterator over deliveries, each to be settled with `async with delivery as event:`.

        ```python
        async with events.deliveries(USAGE, group="metrics") as deliveries:
            async for delivery in deliveries:
                async with delivery as event:
                    ...
        ```

        The consumer stops in an orderly way when the `async with` block ends, which waits for that. With a plain
        `async for` it stops when the iterator is released, and nothing waits for it.

        Args:
            stream: The stream.
            group: One of the groups that the stream declares.
            consumer: Name of this consumer, unique in its group; the default derives from the producer's name.
            options: Settings; `prefetch` limits the number of open deliveries.

        Raises:
            UnknownGroup: The stream declares no such group.
        """
        decode = stream.message.FromString
        start = self._reader_factory(stream, group, consumer, options, 16, single=True)
        return Subscription(start, lambda reader: take_one(reader, decode))

    def delivery_batches(
        self,
        stream: EventStream[E, G],
        *,
        group: G,
        size: int = 100,
        consumer: str | None = None,
        options: ConsumeOptions | None = None,
    ) -> Subscription[DeliveryBatch[E]]:
        """Return an iterator over batches of at most `size` events of one partition; see `deliveries`.

        Settle each batch with `async with batch as events:`.
        """
        decode = stream.message.FromString
        start = self._reader_factory(stream, group, consumer, options, size, single=False)
        return Subscription(start, lambda reader: take_batch(reader, decode, size))

    def raw_deliveries(
        self,
        stream: Stream,
        *,
        group: str,
        size: int = 100,
        consumer: str | None = None,
        options: ConsumeOptions | None = None,
    ) -> Subscription[DeliveryBatch[bytes]]:
        """Return an iterator over batches of undecoded events, without generated code; see `delivery_batches`."""
        start = self._reader_factory(stream, group, consumer, options, size, single=False)
        return Subscription(start, lambda reader: take_batch(reader, bytes, size))

    async def tail(
        self, stream: EventStream[E, Any], *, after: str = "latest", follow: bool = True
    ) -> AsyncGenerator[TailEntry[E], None]:
        """Return an asynchronous iterator over a stream without a group; it ends when the `Events` closes.

        Args:
            stream: The stream.
            after: The start: `earliest`, `latest`, or the `cursor` of an earlier entry.
            follow: Whether to wait for more entries at the end of the stream.

        Raises:
            InvalidArgument: `after` is not a cursor of this stream.
            OrkiError: The server refuses, or does not answer; with `follow`, the call waits for an answer.
        """
        self._opened()
        connection = self._connection(f"tail.{next(self._numbers)}")
        self._tails.add(connection)
        entries = follow_stream(
            connection, stream.contract, stream.message.FromString, after, follow, self.options.block_timeout
        )
        try:
            async for entry in entries:
                yield entry
        except LocalProtocolError:
            if connection in self._tails:
                raise
            # `close` has ended the connection.
        finally:
            self._tails.discard(connection)
            await connection.end()

    async def dead_letters(
        self, stream: EventStream[E, G], *, group: G, count: int = 100, after: str = "0-0"
    ) -> list[DeadLetterEntry[E]]:
        """Return at most `count` dead letters of a group, oldest first, after the letter id `after`.

        Raises:
            UnknownGroup: The stream declares no such group.
        """
        contract, connection = stream.contract, self._command_connection()
        decode = stream.message.FromString
        return await list_dead_letters(connection, contract, contract.group(group), decode, count, after)

    async def raw_dead_letters(
        self, stream: Stream, *, group: str, count: int = 100, after: str = "0-0"
    ) -> list[DeadLetterEntry[bytes]]:
        """Return the dead letters as `dead_letters` does, without the stream's generated code."""
        connection = self._command_connection()
        return await list_dead_letters(connection, stream, stream.group(group), bytes, count, after)

    async def replay(
        self, stream: EventStream[Any, Any] | Stream, *, group: str, letters: Iterable[DeadLetterEntry[Any]]
    ) -> list[str]:
        """Deliver dead-lettered events again to their group, and to no other.

        Returns:
            Ids of the letters that this call has replayed. Each letter is replayed once, also if several calls name it.

        Raises:
            UnknownGroup: The stream declares no such group.
        """
        contract = stream if isinstance(stream, Stream) else stream.contract
        return await replay_dead_letters(self._command_connection(), contract, contract.group(group), letters)

    async def ledger(self, stream: EventStream[Any, Any] | Stream) -> StreamLedger:
        """Count the events of a stream and their outcome in each group. Reads the whole stream."""
        contract = stream if isinstance(stream, Stream) else stream.contract
        connection = self._command_connection()
        declared = {group.name: group for group in contract.groups}
        for registered in await self._registry.streams(connection):
            if registered.contract.name == contract.name:
                declared = {group.name: group for group in registered.contract.groups} | declared
        return await read_ledger(connection, replace(contract, groups=tuple(sorted(declared.values()))))

    async def run(self, *consumers: Consumer[Any], stop: asyncio.Event | None = None) -> None:
        """Run push consumers until cancelled or until `stop` is set; then end them in an orderly way.

        Raises:
            OrkiError: The server refuses a consumer, and a retry cannot succeed.
        """
        async with contextlib.AsyncExitStack() as stack:
            runs = []
            for each in consumers:
                concurrency = max(each.batch, 1) * each.concurrency
                start = self._reader_factory(
                    each.stream, each.group, None, each.options, concurrency, single=not each.batch
                )
                reader = start()
                stack.push_async_callback(reader.close)
                runs.append(PushRun(each, reader))
            await run_until(runs, stop, self.options.drain_timeout)

    async def close(self) -> None:
        """End consumers and tails, and send buffered events. Idempotent.

        It takes at most `drain_timeout`, also without a server, and one second more if consumers need all of it.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self.options.drain_timeout
        publisher, self._publisher = self._publisher, None
        if publisher is None:
            return
        try:
            tails, self._tails = self._tails, set()
            await asyncio.gather(
                *(reader.close() for reader in self._readers), *(connection.end() for connection in tails)
            )
            durable = self._durable or publisher
            timeout = max(end - loop.time(), min(1.0, self.options.drain_timeout))
            await asyncio.gather(*(each.close(timeout) for each in {publisher, durable}))
            if self._trimmer is not None:
                await self._trimmer.close()
        finally:
            if self._commands is not None:
                await self._commands.close()
            await asyncio.sleep(0)  # The event loop releases the closed sockets.

    def _reader_factory(
        self,
        stream: EventStream[Any, Any] | Stream,
        group: str,
        consumer: str | None,
        options: ConsumeOptions | None,
        concurrency: int,
        *,
        single: bool,
    ) -> Callable[[], GroupReader]:
        """Return a function that starts a consumer, which the caller closes; `close` ends those still open."""
        contract = stream if isinstance(stream, Stream) else stream.contract
        declared = contract.group(group)

        async def register(connection: Connection) -> None:
            if isinstance(stream, EventStream):
                await self._registry.register(connection, stream, publishes=False)
            if self._trimmer is not None:
                self._trimmer.use(contract)

        def start() -> GroupReader:
            self._opened()
            number = next(self._numbers)
            name = consumer if consumer is not None else f"{self.producer}.{number}"
            services = ReaderServices(
                reads=self._connection(f"read.{number}"),
                commands=self._connection(f"consume.{number}"),
                groups=self._groups,
                register=register,
                report=self._report,
                closed=self._readers.discard,
                options=self.options,
                key_of=key_reader(stream),
                single=single,
            )
            reader = GroupReader(
                GroupMember(contract, declared, name), services, options or ConsumeOptions(), concurrency
            )
            self._readers.add(reader)
            reader.start()
            return reader

        return start

    def _publisher_of(self, stream: EventStream[Any, Any]) -> Publisher:
        publisher, is_durable = self._opened(), stream.contract.durability is not Durability.MEMORY
        return self._durable if is_durable and self._durable is not None else publisher

    def _opened(self) -> Publisher:
        if self._publisher is None:
            raise LocalProtocolError("the event plane is not open: use `async with connect(...) as events`")
        return self._publisher

    def _command_connection(self) -> Connection:
        self._opened()
        assert self._commands is not None
        return self._commands

    def _connection(self, purpose: str) -> Connection:
        return Connection(
            self._address,
            name=f"orki:{self.producer}:{purpose}",
            connect_timeout=self.options.connect_timeout,
            answer_timeout=self.options.answer_timeout,
        )

    def _report(self, gap: Gap) -> None:
        _log.warning("%s", gap.message)
        if self.options.on_gap is not None:
            self.options.on_gap(gap)
