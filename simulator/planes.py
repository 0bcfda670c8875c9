"""What orchestrators connect to: the store's server and the event plane."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from orki_contract.errors import OrkiError
from orki_events.connection import Address, Command, Reply
from simulator.redis import Error

if TYPE_CHECKING:
    from simulator.fleet import Fleet

REDIS: Final = "redis"
"""Name of the server for faults."""


class StoreLink:
    """A connection of one process to the simulated server; stands in for `orki_events.connection.Connection`."""

    def __init__(self, fleet: Fleet, address: Address) -> None:
        assert fleet.world.current is not None
        self.address = address
        self.process = fleet.world.current
        self._fleet = fleet
        self._lock = asyncio.Lock()
        self._waiting: asyncio.Future[list[Reply]] | None = None
        self.opened = 0
        self._is_open = False
        self.channel = b""
        self.receive: Callable[[bytes], None] = lambda message: None
        fleet.connections.append(self)

    async def pipeline(self, *commands: Command, timeout: float | None = None, same: int | None = None) -> list[Reply]:
        """Send commands and return their replies, as the product's connection does."""
        fleet, world = self._fleet, self._fleet.world
        async with self._lock:
            if same is not None and (not self._is_open or same != self.opened):
                raise self.address.unavailable("the connection was lost")
            if not self._is_open:
                self._is_open, self.opened = True, self.opened + 1
            future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
            self._waiting = future
            names = (self.process.name, REDIS)
            if not fleet.network.is_blocked(*names):
                world.call_at(world.now + fleet.network.delay(*names) / 4, self._arrive, commands, future)
            try:
                async with asyncio.timeout(timeout or 5.0):
                    return await future
            except TimeoutError:
                self._is_open = False
                raise self.address.unavailable("no reply within 5 s") from None
            finally:
                self._waiting = None

    def _arrive(self, commands: Sequence[Command], future: asyncio.Future[list[Reply]]) -> None:
        fleet, world = self._fleet, self._fleet.world
        if not fleet.redis_up:
            self.process.call(self._fail, future, "connection refused")
            return
        replies: list[Reply] = []
        for command in commands:
            reply = fleet.redis.execute(command)
            replies.append(self.address.error(str(reply)) if isinstance(reply, Error) else reply)
        if world.chance.random() < fleet.lose_replies:
            self.process.call(self._fail, future, "connection reset")
            return
        names = (self.process.name, REDIS)
        world.call_at(world.now + fleet.network.delay(*names) / 4, self.process.call, _answer, future, replies)

    def _fail(self, future: asyncio.Future[list[Reply]], cause: str) -> None:
        self._is_open = False
        if not future.done():
            future.set_exception(self.address.unavailable(cause))

    def broken(self) -> None:
        """Fail the exchange that is under way."""
        self._is_open = False
        if self._waiting is not None:
            self.process.call(self._fail, self._waiting, "connection reset")

    async def subscribe(
        self, channel: str, on_open: Callable[[], None], on_message: Callable[[bytes], None], *, silence: float
    ) -> None:
        """Pass the messages of a channel on, until the connection breaks."""
        await self.pipeline(("PING",), timeout=silence)
        self.channel, self.receive = channel.encode(), on_message
        on_open()
        broken: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        try:
            while True:
                self._waiting = broken
                await asyncio.wait([broken], timeout=silence / 4)
                if broken.done():
                    broken.result()
                await self.pipeline(("PING",), timeout=silence)
        finally:
            self.channel = b""

    async def execute(self, command: Command, *, timeout: float | None = None) -> Reply:
        """Send one command."""
        (reply,) = await self.pipeline(command)
        if isinstance(reply, OrkiError):
            raise reply
        return reply

    async def abort(self) -> None:
        """Close the connection at once."""
        self._is_open = False
        if self._waiting is not None:
            self._fail(self._waiting, "the connection was ended")

    async def close(self) -> None:
        """Close the connection."""
        self._is_open = False

    async def drop(self) -> None:
        """Do nothing: there is no socket."""


def _answer(future: asyncio.Future[list[Reply]], replies: list[Reply]) -> None:
    if not future.done():
        future.set_result(replies)


class EventPlane:
    """The event plane, which loses nothing; records lifecycle events."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def __aenter__(self) -> EventPlane:
        return self

    async def close(self) -> None:
        """Do nothing."""

    async def prepare(self, stream: Any) -> None:
        """Do nothing."""

    async def maintain(self, stream: Any) -> Any:
        """Return the stream's retention."""
        return stream.contract.retention

    def keep_trimmed(self) -> None:
        """Do nothing: nothing is trimmed."""

    def collect(self, stream: Any, event: Any, span: Any = None) -> None:
        """Do nothing: events of agents are not checked."""

    async def publish_outgoing(self, stream: Any, outgoing: Any) -> list[bytes]:
        """Record events of tasks."""
        await asyncio.sleep(0.001)
        for each in outgoing:
            if stream.contract.name == "tasks":
                self._fleet.doubles += each.event_id in self._fleet.events
                self._fleet.events[each.event_id] = (each.message.task_id, each.message.WhichOneof("event"))
        return []

    async def tail(self, stream: Any, **_: Any) -> AsyncIterator[Any]:
        """Yield what was published."""
        for event_id in list(self._fleet.events):
            yield _Entry(event_id)


class _Entry:
    def __init__(self, event_id: bytes) -> None:
        self.event_id = event_id
