"""gRPC between simulated processes: channels, calls and contexts with the parts of grpc.aio that the product uses."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final

import grpc

from simulator.world import Process, World

_OK: Final = (grpc.StatusCode.OK, "", ())
_LOST: Final = (grpc.StatusCode.UNAVAILABLE, "the connection was lost", ())
_KEEPALIVE: Final = 20.0
"""Seconds after which an end notices that nothing passes any more."""


class Network:
    """Connections between processes.

    Attributes:
        slow: Processes whose messages take up to a second.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.slow: set[str] = set()
        self._blocked: set[str] = set()
        self._servers: dict[str, tuple[Process, Callable[[str], Any]]] = {}
        self._calls: list[Call] = []

    def listen(self, target: str, process: Process, find: Callable[[str], Any]) -> None:
        """Serve an address. `find` returns the servicer's method for a path, with the identity check."""
        self._servers[target] = process, find

    def server(self, target: str) -> tuple[Process, Callable[[str], Any]] | None:
        """Return the process that serves an address; None if it does not run."""
        found = self._servers.get(target)
        return found if found is not None and found[0].alive else None

    def open(self, call: Call) -> None:
        """Add a call."""
        self._calls.append(call)

    def delay(self, *names: str) -> float:
        """Return the delay of a message between two processes."""
        chance: random.Random = self.world.chance
        return chance.uniform(0.0002, 1.0 if self.slow.intersection(names) else 0.004)

    def is_blocked(self, *names: str) -> bool:
        """Whether a process is cut off without notice."""
        return bool(self._blocked.intersection(names))

    def block(self, name: str) -> None:
        """Cut a process off without notice: its messages wait. Its connections break if that lasts."""
        self._blocked.add(name)
        self.world.call_at(self.world.now + _KEEPALIVE, self._give_up, name, list(self._calls))

    def heal(self, name: str) -> None:
        """End `block`."""
        self._blocked.discard(name)
        for call in self._calls:
            if name in call.names:
                call.flow()

    def _give_up(self, name: str, calls: list[Call]) -> None:
        if name in self._blocked:
            for call in calls:
                if name in call.names:
                    call.cut()

    def cut(self, name: str) -> None:
        """End all connections of a process. Both ends notice."""
        calls, self._calls = self._calls, []
        for call in calls:
            if name in call.names:
                call.cut()
            elif not call.over:
                self._calls.append(call)

    def channel(self, target: str, *_: object, **options: object) -> Channel:
        """Open a channel in the current process; stands in for `open_channel`."""
        assert self.world.current is not None
        return Channel(self, self.world.current, target)


class Channel:
    """A channel of one process to one address."""

    def __init__(self, network: Network, process: Process, target: str) -> None:
        self._network, self._process, self._target = network, process, target
        self._calls: list[Call] = []

    def stream_stream(self, path: str, *_: object, **__: object) -> Callable[..., Call]:
        """Return the method of a path."""
        return lambda *_, **__: self._call(path)

    def unary_unary(self, path: str, *_: object, **__: object) -> Callable[..., Awaitable[Any]]:
        """Return the method of a path."""
        return lambda request, *, timeout=10.0, **_: self._call(path).unary(request, timeout)

    def unary_stream(self, path: str, *_: object, **__: object) -> Callable[..., Any]:
        """Return a method that fails: submitters watch by their session."""

        def fail(*_: object, **__: object) -> Any:
            raise NotImplementedError(path)

        return fail

    stream_unary = unary_stream

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Return whether the server answers."""
        up = self._network.server(self._target) is not None
        return grpc.ChannelConnectivity.READY if up else grpc.ChannelConnectivity.TRANSIENT_FAILURE

    def _call(self, path: str) -> Call:
        call = Call(self._network, self._process, self._target, path)
        self._calls.append(call)
        return call

    async def close(self, grace: float | None = None) -> None:
        """End all calls."""
        for call in self._calls:
            call.cancel()


class _Line:
    """Messages in one direction, in order."""

    def __init__(self, call: Call, receiver: Callable[[], Process | None]) -> None:
        self._call, self._receiver = call, receiver
        self._waiting: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._at = 0.0

    def send(self, callback: Callable[..., object], *arguments: Any) -> None:
        self._waiting.append((callback, arguments))
        self.flow()

    def flow(self) -> None:
        network, names = self._call.network, self._call.names
        if network.is_blocked(*names):
            return
        while self._waiting:
            self._at = max(self._at, network.world.now + network.delay(*names))
            network.world.call_at(self._at, self._arrive, *self._waiting.popleft())

    def _arrive(self, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if (process := self._receiver()) is not None:
            process.call(callback, *arguments)


class _End:
    """One end of a call: received messages, and the status at their end."""

    def __init__(self) -> None:
        self.inbox: deque[Any] = deque()
        self.status: tuple[grpc.StatusCode, str, Any] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def receive(self, message: Any) -> None:
        if self.status is None:
            self.inbox.append(message)
            self._wake()

    def finish(self, status: tuple[grpc.StatusCode, str, Any]) -> None:
        if self.status is None:
            self.status = status
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        """Return a message, or None at the end."""
        while not self.inbox and self.status is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.inbox.popleft() if self.inbox else None


class Call:
    """The client's end of one call, and the server's."""

    def __init__(self, network: Network, client: Process, target: str, path: str) -> None:
        self.network = network
        self.names = {client.name, target}
        self._client = client
        self._server: Process | None = None
        self._target = target
        self._here, self._there = _End(), _End()
        self._cancelled = False
        self._handler: asyncio.Task[None] | None = None
        self._up = _Line(self, lambda: self._server)
        self._down = _Line(self, lambda: self._client)
        self.over = False
        network.open(self)
        if (found := network.server(target)) is None:
            network.world.call_at(network.world.now + 0.001, client.call, self._here.finish, _LOST)
            return
        self._server = found[0]
        self.names.add(found[0].name)
        self._up.send(self._begin, found[1](path))

    # --- The client's end. ---

    async def read(self) -> Any:
        """Return the next message, or EOF at the end of a successful call."""
        message = await self._here.next()
        if message is not None:
            return message
        if self._cancelled:
            raise asyncio.CancelledError("the call was cancelled")
        self._check()
        return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        """Send a message."""
        if self._cancelled:
            raise asyncio.CancelledError("the call was cancelled")
        self._check()
        self._up.send(self._there.receive, message)
        await asyncio.sleep(0)

    async def done_writing(self) -> None:
        """End the client's direction."""
        self._up.send(self._there.finish, _OK)

    def cancel(self) -> bool:
        """End the call at both ends."""
        if self._here.status is not None:
            return False
        self._cancelled = True
        self._here.finish((grpc.StatusCode.CANCELLED, "cancelled here", ()))
        self._up.send(self._drop)
        return True

    def _check(self) -> None:
        if self._here.status is not None and self._here.status[0] is not grpc.StatusCode.OK:
            code, details, metadata = self._here.status
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)

    async def unary(self, request: Any, timeout: float) -> Any:
        """Make a call with one message in each direction."""
        self._up.send(self._there.receive, request)
        late = (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded", ())
        timer = asyncio.get_running_loop().call_later(timeout, self._here.finish, late)
        try:
            answer = await self._here.next()
            self._check()
            return answer
        finally:
            timer.cancel()
            self.cancel()

    # --- The server's end. ---

    def _begin(self, handler: Callable[[Context], Generator[Any, Any, Any]]) -> None:
        assert self._server is not None
        self._handler = self._server.loop.create_task(self._serve(handler), name="call")

    async def _serve(self, handler: Callable[[Context], Any]) -> None:
        context = Context(self, self._there)
        status: Any = _OK
        try:
            await handler(context)
        except grpc.aio.AbortError:
            status = context.status
        except asyncio.CancelledError:
            self._there.finish(_LOST)
            return
        except Exception as error:
            self.network.world.failed(f"a servicer raised {type(error).__name__}: {error}", error)
            status = (grpc.StatusCode.UNKNOWN, str(error), ())
        self._there.finish(_OK)
        self._down.send(self._here.finish, status)

    def _drop(self) -> None:
        self._there.finish(_LOST)
        if self._handler is not None:
            self._handler.cancel()

    # --- Faults. ---

    def flow(self) -> None:
        """Deliver what waited for the end of a partition."""
        self._up.flow()
        self._down.flow()

    def cut(self) -> None:
        """Break the connection: both ends notice."""
        self.over = True
        if self._client.alive:
            self._client.call(self._here.finish, _LOST)
        if self._server is not None:
            self._server.call(self._drop)


class Context:
    """A servicer's context."""

    def __init__(self, call: Call, end: _End) -> None:
        self._call, self._end = call, end
        self.status: Any = _OK

    async def read(self) -> Any:
        """Return the next message, or EOF."""
        message = await self._end.next()
        return grpc.aio.EOF if message is None else message

    async def write(self, message: Any) -> None:
        """Send a message."""
        if self._end.status is not None and self._end.status is not _OK:
            raise grpc.aio.UsageError("the call is over")
        self._call._down.send(self._call._here.receive, message)
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """End the call with an error."""
        self.status = (code, details, trailing_metadata)
        raise grpc.aio.AbortError

    def peer(self) -> str:
        """Return the client's name."""
        return f"ipv4:{self._call._client.name}:1"

    def invocation_metadata(self) -> Any:
        """Return no metadata."""
        return ()

    def cancelled(self) -> bool:
        """Whether the call is over."""
        return self._end.status is not None
