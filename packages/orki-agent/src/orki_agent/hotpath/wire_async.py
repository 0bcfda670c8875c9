"""One connection of an async client: many calls at once, one future each and no task.

It works on the socket itself (`loop.add_reader`) instead of a transport, because a transport does not tell whether a
frame had left completely when the connection broke, and a caller has a right to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from orki.hotpath.v1.tool_orki import WelcomeFrame
from orki_agent.hotpath.agreement import ASKING, check_answer, question
from orki_agent.hotpath.frames import (
    FLAG_ERROR,
    FLAG_REPLY,
    NO_TRACE,
    Fields,
    Frame,
    FrameDecoder,
    decode_error,
    encode_cancel,
)
from orki_agent.hotpath.greeting import read_welcome
from orki_agent.hotpath.options import ToolClientOptions
from orki_agent.hotpath.plans import Plan
from orki_agent.hotpath.seam import NO_SIGNAL, Seam, connect_nonblocking
from orki_contract.errors import OrkiError, PeerLost, RemoteProtocolError, ToolDeadline, UnknownOpcode

__all__ = ["LoopWire", "open_wire"]

_CONNECT_AGAIN_SECONDS: Final = 0.005


class Pending(NamedTuple):
    """A call that waits for its reply.

    Attributes:
        future: Gets the response and the length of the reply's body.
        plan: How to read the reply.
        deadline: On the loop's clock.
    """

    future: asyncio.Future[tuple[Any, int]]
    plan: Plan
    deadline: float


class LoopWire:
    """The connection after the handshake.

    Attributes:
        agreed: Services whose contracts fit.
        alive: Whether calls may be sent.
        max_frame_bytes: Longest frame that the bridge takes.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: FrameDecoder,
        welcome: WelcomeFrame,
        options: ToolClientOptions,
        changed: Callable[[], None],
    ) -> None:
        """Takes the socket over.

        Args:
            sock: Non-blocking, greeted.
            decoder: What has read the welcome.
            welcome: The bridge's limits.
            options: The client's own limits.
            changed: Called when there may be room for another call, or the connection has ended.
        """
        self.agreed: set[str] = set()
        self.alive = True
        self._connect_us = int(options.connect_timeout * 1_000_000)
        self.max_frame_bytes = welcome.max_frame_bytes
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._send = sock.send
        self._receive = sock.recv_into
        self._decoder = decoder
        self._max_calls = min(options.max_calls, welcome.max_calls)
        self._changed = changed
        # None stands for a call that nobody waits for any more and that the bridge still has to answer.
        self._pending: dict[int, Pending | None] = {}
        self._last = 0
        self._unsent: deque[tuple[int, memoryview]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._loop.add_reader(sock, self._readable)

    @property
    def full(self) -> bool:
        """Whether a further call has to wait."""
        return len(self._pending) >= self._max_calls or bool(self._unsent)

    @property
    def next_number(self) -> int:
        """Correlation of the next call."""
        return self._last + 1

    def call(self, plan: Plan, frame: bytes, micros: int) -> asyncio.Future[tuple[Any, int]]:
        """Sends the frame of call `next_number`; gives the future of its reply.

        Raises:
            PeerLost: The connection is gone, and the bridge has not seen the call.
        """
        self._last = number = self._last + 1
        loop = self._loop
        future: asyncio.Future[tuple[Any, int]] = loop.create_future()
        deadline = loop.time() + micros / 1_000_000
        self._write(number, frame)
        if not self.alive:
            raise PeerLost("the tool bridge is gone", fully_written=False)
        self._pending[number] = Pending(future, plan, deadline)
        if self._timer is None or deadline < self._timer_at:
            self._set_timer(deadline)
        return future

    async def agree(self, service: str) -> None:
        """Compares contracts with the bridge, as a part of connecting. There must be room for a call.

        Raises:
            ContractMismatch, UnknownMethod, InvalidContract: As `check_answer`.
            PeerLost: The bridge went away, or does not answer; no call was sent.
        """
        asked = question(service)
        if asked is not None:
            number = self.next_number
            try:
                answer, _ = await self.call(
                    ASKING, ASKING.frame(asked, number, self._connect_us, NO_TRACE), self._connect_us
                )
                check_answer(service, answer)
            except (PeerLost, ToolDeadline) as error:
                raise PeerLost(error.message, fully_written=False) from None
            except UnknownOpcode:
                pass  # the bridge is older than the question, and there is nothing to compare
            except asyncio.CancelledError:
                self.cancel(number)
                raise
        self.agreed.add(service)

    def cancel(self, number: int) -> None:
        """Asks the bridge to end a call; its place is free once the bridge has answered."""
        if self._pending.get(number) is not None:
            self._pending[number] = None
            self._write(0, encode_cancel(number))

    def close(self) -> None:
        """Ends the connection; calls that wait get `PeerLost`."""
        self.lose(lambda: None, "the client was closed")

    def let_go(self) -> None:
        """Closes the descriptor and does not touch the loop, which a forked child shares with its parent."""
        self.alive = False
        self._sock.close()

    def lose(self, error: Callable[[], OrkiError | None], what: str) -> None:
        """Ends the connection; calls that wait get what `error` gives, or `PeerLost`."""
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        unsent = {number for number, _ in self._unsent}
        self._unsent.clear()
        for number, entry in self._pending.items():
            if entry is not None and not entry.future.done():
                lost = PeerLost(f"the tool bridge is gone: {what}", fully_written=number not in unsent)
                entry.future.set_exception(error() or lost)
        self._pending.clear()
        self._changed()

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        decoder = self._decoder
        try:
            count = self._receive(decoder.writable())
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(lambda: None, error.strerror or "connection reset")
            return
        if not count:
            self.lose(lambda: None, "it closed the connection")
            return
        try:
            fields = decoder.next_frame(count)
            while fields is not None and self.alive:
                self._take(fields)
                fields = decoder.next_frame() if decoder.filled else None
        except OrkiError as error:
            kind, what = type(error), error.message
            self.lose(lambda: kind(what), what)

    def _take(self, fields: Fields) -> None:
        flags, opcode, block_length, version, number, _, _, body = fields
        if not flags & FLAG_REPLY or number not in self._pending:
            if flags & FLAG_ERROR and not number:
                self.lose(lambda: decode_error(Frame(*fields)), "it ended the connection")
                return
            raise RemoteProtocolError(f"the bridge answered call {number}, for which nobody waits")
        entry = self._pending.pop(number)
        if entry is not None and not entry.future.done():
            plan = entry.plan
            if flags & FLAG_ERROR:
                entry.future.set_exception(decode_error(Frame(*fields)))
            elif opcode != plan.opcode:
                raise RemoteProtocolError(f"the bridge answered {plan.method} with opcode {opcode:#06x}")
            else:
                try:
                    entry.future.set_result((plan.decode(body, block_length, version), len(body)))
                except Exception as error:
                    entry.future.set_exception(plan.unreadable(error))
        self._changed()

    # -- sending ------------------------------------------------------------------------------------------------------

    def _write(self, number: int, frame: bytes) -> None:
        """Sends a frame, or queues what the kernel does not take; 0 stands for a frame that is no call."""
        if not self._unsent:
            try:
                sent = self._send(frame, NO_SIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.lose(lambda: None, error.strerror or "broken pipe")
                return
            if sent == len(frame):
                return
            self._loop.add_writer(self._sock, self._writable)
            self._unsent.append((number, memoryview(frame)[sent:]))
        else:
            self._unsent.append((number, memoryview(frame)))

    def _writable(self) -> None:
        number, rest = self._unsent[0]
        try:
            sent = self._send(rest, NO_SIGNAL)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(lambda: None, error.strerror or "broken pipe")
            return
        if sent < len(rest):
            self._unsent[0] = (number, rest[sent:])
            return
        self._unsent.popleft()
        if not self._unsent:
            self._loop.remove_writer(self._sock)
            self._changed()

    # -- deadlines ----------------------------------------------------------------------------------------------------

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Ends the calls whose time is over. One timer serves all, so that a call costs none of its own."""
        self._timer = None
        now = self._loop.time()
        waiting = []
        for number, entry in self._pending.items():
            if entry is None:
                continue
            if entry.deadline <= now:
                self._pending[number] = None
                if not entry.future.done():
                    entry.future.set_exception(ToolDeadline(f"no reply of {entry.plan.method} came in time"))
            else:
                waiting.append(entry.deadline)
        if waiting:
            self._set_timer(min(waiting))


async def open_wire(
    path: str, hello: bytes, options: ToolClientOptions, seam: Seam, changed: Callable[[], None]
) -> LoopWire:
    """Connects and shakes hands.

    Raises:
        PeerLost: Nobody serves the path, or the bridge went away.
        PeerRefused: The bridge refuses us, or its user is not to be trusted with the token.
        OrkiError: Whatever else the bridge answers.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        decoder = FrameDecoder(options.max_frame_bytes)
        try:
            async with asyncio.timeout(options.connect_timeout):
                while not connect_nonblocking(sock, path):  # noqa: ASYNC110 - nothing tells when there is room
                    await asyncio.sleep(_CONNECT_AGAIN_SECONDS)
                seam.check_peer(sock, options.bridge_uids, "bridge")
                with contextlib.suppress(OSError):
                    sock.send(hello, NO_SIGNAL)
                welcome = read_welcome(await _first_frame(sock, decoder))
        except TimeoutError:
            raise PeerLost(f"the tool bridge at {path} did not answer in time", fully_written=False) from None
        except OSError as error:
            raise PeerLost(f"no tool bridge at {path}: {error.strerror}", fully_written=False) from None
        return LoopWire(sock, decoder, welcome, options, changed)
    except BaseException:
        sock.close()
        raise


async def _first_frame(sock: socket.socket, decoder: FrameDecoder) -> Frame:
    loop = asyncio.get_running_loop()
    count = 0
    while (fields := decoder.next_frame(count)) is None:
        count = await loop.sock_recv_into(sock, decoder.writable())
        if not count:
            raise PeerLost("the tool bridge closed the connection before its welcome", fully_written=False)
    return Frame(*fields)
