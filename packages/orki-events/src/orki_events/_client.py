"""The door to the event plane: `connect` gives an `Events`, which publishes, consumes, follows and tells."""

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
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

from orki_contract.errors import InvalidSetting, LocalProtocolError, UnknownStream
from orki_contract.handles import EventStream
from orki_contract.model import Stream
from orki_contract.trace import Span, current_span
from orki_events._commands import GroupMember
from orki_events._dead_letters import DeadLetterEntry, list_dead_letters, replay_dead_letters
from orki_events._deliveries import Decode, Delivery, DeliveryBatch, Subscription, take_batch, take_one
from orki_events._group_reader import GroupReader, ReaderServices
from orki_events._ledger import StreamLedger, read_ledger
from orki_events._options import ConsumeOptions, EventOptions, Gap
from orki_events._publisher import Outgoing, PublishCounts, Publisher
from orki_events._push import Consumer, PushRun, run_until
from orki_events._readers import TailEntry, follow_stream
from orki_events.connection import Address, Connection, parse_address
from orki_events.groups import ConsumerGroups
from orki_events.registry import RegisteredStream, StreamRegistry
from orki_events.tuning import Tuned, Tuning, read_tunings, tune

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
    """The event plane behind a Redis URL; use it in `async with`. Nothing is sent before the first use.

    Args:
        url: `redis://HOST:PORT/DB`, `rediss://…` or `unix://PATH`.
        producer: Name of this process and its run, unique to the run; made from host and process id unless given.
        options: Settings.
        username: User, so that the URL need not hold it.
        password: Password, likewise.

    Raises:
        InvalidSetting: The URL or the producer's name cannot be used.
    """
    address = parse_address(url, username=username, password=password)
    name = producer if producer is not None else f"{socket.gethostname()}-{os.getpid()}@{os.urandom(4).hex()}"
    if not re.fullmatch(r"[!-~]{1,200}", name):
        raise InvalidSetting(f"the producer's name is {name!r}; it must be 1 to 200 printable ASCII letters, no spaces")
    return Events(address, name, options or EventOptions())


class Events:
    """One process's part of the event plane. Made by `connect`.

    Attributes:
        producer: Name under which this process publishes.
        options: Its settings.
    """

    def __init__(self, address: Address, producer: str, options: EventOptions) -> None:
        """Use `connect`."""
        self.producer = producer
        self.options = options
        self._address = address
        self._keeper = ConsumerGroups(self._gap)
        self._registry = StreamRegistry()
        self._commands: Connection | None = None
        self._publisher_link: Connection | None = None
        self._publisher: Publisher | None = None
        self._subscriptions: set[GroupReader] = set()
        self._tails: set[Connection] = set()
        self._consumers = itertools.count(1)

    async def __aenter__(self) -> Self:
        """Starts the publisher; connections open when they are needed."""
        if self._publisher is not None:
            raise LocalProtocolError("this Events is in use already; call connect() again for another")
        self._commands = self._link("commands")
        self._publisher_link = self._link("publish")
        self._publisher = Publisher(
            self._publisher_link, self.producer, self.options, self._keeper, self._registry, self._gap
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sends what was collected, and closes."""
        await self.close()

    @property
    def counts(self) -> PublishCounts:
        """What was published, refused and abandoned so far."""
        return self._open().counts

    async def publish(
        self,
        stream: EventStream[E, Any],
        message: E,
        *,
        span: Span | None = None,
        event_id: bytes | None = None,
        time_us: int | None = None,
    ) -> bytes:
        """Publishes an event; returns once the server has it. Waits while the buffer is full.

        Args:
            stream: Where to.
            message: The event.
            span: Span in which it happened; the current one unless given.
            event_id: Its identity, 16 bytes, where the caller has one: readers drop what they have seen.
            time_us: When it happened, in microseconds since the Unix epoch; now unless given.

        Returns:
            The event's id.

        Raises:
            EventsUnavailable: The server did not answer in time; it may or may not have the event.
            EventsOutOfMemory, EventsReadOnly, EventsNotPersisting, EventsLoading: It would not take it in time.
            EventsRefused: It will not take it.
            ContractMismatch: The stream is registered by a contract with which this one breaks on the wire.
            InvalidArgument, TooLarge: The event cannot be published at all.
        """
        publisher = self._open()
        outgoing = Outgoing(message, span or current_span(), event_id, time_us)
        (identity,) = await publisher.publish_all(stream, (outgoing,))
        return identity

    async def publish_many(
        self, stream: EventStream[E, Any], messages: Iterable[E], *, span: Span | None = None
    ) -> list[bytes]:
        """Publishes events in few calls; returns their ids, in their order, once the server has them all.

        Raises:
            OrkiError: As `publish`; the first error among them. The others may have been published.
        """
        where = span or current_span()
        return await self._open().publish_all(stream, [Outgoing(message, where) for message in messages])

    async def publish_outgoing(self, stream: EventStream[E, Any], outgoing: Iterable[Outgoing]) -> list[bytes]:
        """As `publish_many`, for events that bring span, id and time of their own, such as an outbox's."""
        return await self._open().publish_all(stream, outgoing)

    def collect(
        self, stream: EventStream[E, Any], message: E, *, span: Span | None = None, time_us: int | None = None
    ) -> bytes:
        """Publishes an event some time soon; never waits, and may be called on any thread.

        An event that cannot be sent in time is counted and reported as a gap. Arguments as those of `publish`.

        Returns:
            The event's id.

        Raises:
            EventsBufferFull: The buffer is full; nothing was taken.
            InvalidArgument, TooLarge: The event cannot be published at all.
        """
        return self._open().submit(stream, message, span or current_span(), time_us=time_us)

    async def flush(self) -> None:
        """Waits until everything that was published or collected before was sent, refused or abandoned."""
        await self._open().flush()

    async def ping(self) -> None:
        """Asks the server whether it is there.

        Raises:
            OrkiError: It is not, or refuses us, for the reason that the class says.
        """
        await self._link_for_commands().execute((b"PING",))

    async def prepare(self, stream: EventStream[Any, Any]) -> None:
        """Registers a stream and creates its groups, as the first publish would.

        Raises:
            ContractMismatch: The stream is registered by a contract with which this one breaks on the wire.
            OrkiError: The server does not answer or refuses.
        """
        link = self._link_for_commands()
        await self._registry.register(link, stream, publishes=True)
        await self._keeper.ensure(link, stream.contract, stream.contract.groups)

    async def registered_streams(self) -> list[RegisteredStream]:
        """The streams that the fleet publishes and consumes, by name.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        return await self._registry.streams(self._link_for_commands())

    async def tune(self, stream: EventStream[Any, Any] | str, tuning: Tuning | None) -> Tuned:
        """Sets how much of a registered stream the whole fleet keeps, within its contract's bounds; trims at once.

        Args:
            stream: The stream, or its name.
            tuning: The setting, in place of an earlier one; None for what the contract says.

        Raises:
            UnknownStream: No such stream is registered.
            InvalidSetting: A value lies outside the bounds that the contract declares.
            OrkiError: The server does not answer or refuses.
        """
        name = stream if isinstance(stream, str) else stream.contract.name
        known = {each.contract.name: each for each in await self.registered_streams()}
        if name not in known:
            raise UnknownStream(f'no stream "{name}" is registered (registered: {", ".join(sorted(known)) or "none"})')
        return await tune(self._link_for_commands(), known[name], tuning)

    async def tunings(self) -> dict[str, Tuning]:
        """What deployments have set, by stream; a stream that is not there keeps what its contract says.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        return await read_tunings(self._link_for_commands())

    def deliveries(
        self,
        stream: EventStream[E, G],
        *,
        group: G,
        consumer: str | None = None,
        options: ConsumeOptions | None = None,
    ) -> Subscription[Delivery[E]]:
        """Events as they come, each to be settled with `async with delivery as event:`.

        ```python
        async with events.deliveries(USAGE, group="metrics") as deliveries:
            async for delivery in deliveries:
                async with delivery as event:
                    ...
        ```

        Leaving the block ends the consumer in good order. A plain `async for` over the call does too, without waiting
        for that end; the end of `Events` then does.

        Args:
            stream: Whose events.
            group: One of the groups that the stream declares.
            consumer: Name of this consumer, unique in its group; made from the producer's unless given.
            options: Settings; of them, `prefetch` is how many deliveries may be open at once.

        Raises:
            UnknownGroup: The stream declares no such group.
        """
        decode = stream.message.FromString
        subscribe = self._subscriber(stream, group, consumer, options, 16)
        return Subscription(subscribe, lambda subscription: take_one(subscription, decode))

    def delivery_batches(
        self,
        stream: EventStream[E, G],
        *,
        group: G,
        size: int = 100,
        consumer: str | None = None,
        options: ConsumeOptions | None = None,
    ) -> Subscription[DeliveryBatch[E]]:
        """As `deliveries`, in batches of at most `size`, each of one partition: `async with batch as events:`."""
        decode = stream.message.FromString
        subscribe = self._subscriber(stream, group, consumer, options, size)
        return Subscription(subscribe, lambda subscription: take_batch(subscription, decode, size))

    def raw_deliveries(
        self,
        stream: Stream,
        *,
        group: str,
        size: int = 100,
        consumer: str | None = None,
        options: ConsumeOptions | None = None,
    ) -> Subscription[DeliveryBatch[bytes]]:
        """As `delivery_batches`, for an observer that has no code for the stream: the events stay bytes."""
        subscribe = self._subscriber(stream, group, consumer, options, size)
        return Subscription(subscribe, lambda subscription: take_batch(subscription, bytes, size))

    async def tail(
        self, stream: EventStream[E, Any], *, after: str = "latest", follow: bool = True
    ) -> AsyncGenerator[TailEntry[E], None]:
        """Follows a stream without a group, until it is left or the `Events` closes.

        Args:
            stream: Which.
            after: Where to begin: `earliest`, `latest`, or the `cursor` of an entry seen earlier.
            follow: Whether to wait for more at the end; otherwise the iteration ends there.

        Raises:
            InvalidArgument: `after` is no cursor of this stream.
            OrkiError: The server refuses; where it does not answer, following goes on, and reading to the end fails.
        """
        async with contextlib.aclosing(
            self._tail(stream.contract, stream.message.FromString, after, follow)
        ) as entries:
            async for entry in entries:
                yield entry

    async def raw_tail(
        self, stream: Stream, *, after: str = "latest", follow: bool = True
    ) -> AsyncGenerator[TailEntry[bytes], None]:
        """As `tail`, for an observer that has no code for the stream: the events stay bytes."""
        async with contextlib.aclosing(self._tail(stream, bytes, after, follow)) as entries:
            async for entry in entries:
                yield entry

    async def dead_letters(
        self, stream: EventStream[E, G], *, group: G, count: int = 100, after: str = "0-0"
    ) -> list[DeadLetterEntry[E]]:
        """A group's dead letters, oldest first: at most `count`, behind the letter id `after`.

        Raises:
            UnknownGroup: The stream declares no such group.
            OrkiError: The server does not answer or refuses.
        """
        contract, link = stream.contract, self._link_for_commands()
        decode = stream.message.FromString
        return await list_dead_letters(link, contract, contract.group(group), decode, count, after)

    async def raw_dead_letters(
        self, stream: Stream, *, group: str, count: int = 100, after: str = "0-0"
    ) -> list[DeadLetterEntry[bytes]]:
        """As `dead_letters`, without the stream's code."""
        return await list_dead_letters(self._link_for_commands(), stream, stream.group(group), bytes, count, after)

    async def replay(
        self, stream: EventStream[Any, Any] | Stream, *, group: str, letters: Iterable[DeadLetterEntry[Any]]
    ) -> list[str]:
        """Makes a group, and no other, take dead-lettered events once more.

        Returns:
            Ids of the letters that were replayed; the entry of any other was trimmed meanwhile, and its letter stays.

        Raises:
            UnknownGroup: The stream declares no such group.
            OrkiError: The server does not answer or refuses.
        """
        contract = stream if isinstance(stream, Stream) else stream.contract
        return await replay_dead_letters(self._link_for_commands(), contract, contract.group(group), letters)

    async def ledger(self, stream: EventStream[Any, Any] | Stream) -> StreamLedger:
        """What was published to a stream, and what became of it in each group. Reads the whole stream.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        contract = stream if isinstance(stream, Stream) else stream.contract
        link = self._link_for_commands()
        declared = {group.name: group for group in contract.groups}
        for registered in await self._registry.streams(link):
            if registered.contract.name == contract.name:
                declared = {group.name: group for group in registered.contract.groups} | declared
        return await read_ledger(link, replace(contract, groups=tuple(sorted(declared.values()))))

    async def run(self, *consumers: Consumer[Any], stop: asyncio.Event | None = None) -> None:
        """Runs push consumers until `stop` is set, or until cancelled; then ends them in good order.

        Args:
            consumers: Functions decorated by `@consumer`.
            stop: Set it to end.

        Raises:
            OrkiError: The server refuses a consumer for good.
        """
        async with contextlib.AsyncExitStack() as stack:
            runs = []
            subscriptions = []
            for each in consumers:
                hand = max(each.batch, 1) * each.concurrency
                subscription = self._subscriber(each.stream, each.group, None, each.options, hand)()
                stack.push_async_callback(subscription.close)
                subscriptions.append(subscription)
                runs.append(PushRun(each, subscription, each.stream.message.FromString))
            await run_until(runs, subscriptions, stop, self.options.drain_timeout_s)

    async def _tail(
        self, stream: Stream, decode: Decode[T], after: str, follow: bool
    ) -> AsyncGenerator[TailEntry[T], None]:
        self._open()
        link = self._link(f"tail.{next(self._consumers)}")
        self._tails.add(link)
        try:
            async for entry in follow_stream(link, stream, decode, after, follow, self.options.block_ms):
                yield entry
        except LocalProtocolError:
            if link in self._tails:
                raise
            # `close` has ended the connection, and with it this.
        finally:
            self._tails.discard(link)
            await link.end()

    def _subscriber(
        self,
        stream: EventStream[Any, Any] | Stream,
        group: str,
        consumer: str | None,
        options: ConsumeOptions | None,
        hand: int,
    ) -> Callable[[], GroupReader]:
        """What starts a consumer. Whoever calls it sees to its end; `close` does in any case."""
        contract = stream if isinstance(stream, Stream) else stream.contract
        declared = contract.group(group)

        async def prepare(link: Connection) -> None:
            if isinstance(stream, EventStream):
                await self._registry.register(link, stream, publishes=False)

        def subscribe() -> GroupReader:
            self._open()
            number = next(self._consumers)
            name = consumer if consumer is not None else f"{self.producer}.{number}"
            wires = ReaderServices(
                reads=self._link(f"read.{number}"),
                commands=self._link(f"consume.{number}"),
                keeper=self._keeper,
                prepare=prepare,
                report=self._gap,
                block_ms=self.options.block_ms,
                dedupe_window=self.options.dedupe_window,
                drain_timeout_s=self.options.drain_timeout_s,
                forget=self._subscriptions.discard,
            )
            subscription = GroupReader(GroupMember(contract, declared, name), wires, options or ConsumeOptions(), hand)
            self._subscriptions.add(subscription)
            subscription.start()
            return subscription

        return subscribe

    async def close(self) -> None:
        """Ends consumers and followers, sends what was collected, within the drain timeout; harmless when closed."""
        publisher, self._publisher = self._publisher, None
        if publisher is None:
            return
        try:
            tails, self._tails = self._tails, set()
            await asyncio.gather(
                *(subscription.close() for subscription in self._subscriptions), *(link.end() for link in tails)
            )
            await publisher.close(self.options.drain_timeout_s)
        finally:
            for link in (self._commands, self._publisher_link):
                if link is not None:
                    await link.close()
            # One turn of the loop, in which closed sockets leave it.
            await asyncio.sleep(0)

    def _open(self) -> Publisher:
        if self._publisher is None:
            raise LocalProtocolError("the event plane is not open: use `async with connect(...) as events`")
        return self._publisher

    def _link_for_commands(self) -> Connection:
        self._open()
        assert self._commands is not None
        return self._commands

    def _link(self, role: str) -> Connection:
        return Connection(
            self._address,
            name=f"orki:{self.producer}:{role}",
            connect_timeout=self.options.connect_timeout_s,
            answer_timeout=self.options.answer_timeout_s,
        )

    def _gap(self, gap: Gap) -> None:
        _log.warning("%s", gap.message)
        if self.options.on_gap is not None:
            self.options.on_gap(gap)
