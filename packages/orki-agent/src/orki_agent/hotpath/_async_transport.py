"""One connection of `AsyncToolClient`: many calls at once, with one future and no task each.

It uses the socket with `loop.add_reader` instead of an asyncio transport, because callers have to know after a loss
whether their request was written completely, and an asyncio transport does not report that.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from orki.hotpath.v1.tool_orki import ErrorFrame, WelcomeFrame
from orki_agent.hotpath import _machine as machines
from orki_agent.hotpath._handshake import CONTRACT_TOOL, check_contract, contract_request, read_welcome
from orki_agent.hotpath._options import ToolClientOptions
from orki_agent.hotpath._platform import NO_SIGNAL, Platform, connect_nonblocking
from orki_agent.hotpath._tool_codec import RemoteTool
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
from orki_contract import errors

_CONNECT_AGAIN: Final = 0.005
_OPEN: Final = machines.ClientConnectionState.OPEN
_UNSENT: Final = machines.CLIENT_CALL.initial
_SENT: Final = machines.CLIENT_CALL.next(_UNSENT, machines.FrameWritten, errors.LocalProtocolError)


class PendingCall(machines.ClientCall):
    """A call that has no reply yet; its deadline is on the loop's clock."""

    __slots__ = ("deadline", "future", "tool")

    def __init__(
        self,
        state: machines.ClientCallState,
        future: asyncio.Future[tuple[Any, int]],
        tool: RemoteTool,
        deadline: float,
    ) -> None:
        self.state = state
        self.future = future
        self.tool = tool
        self.deadline = deadline


class AsyncTransport:
    """A connection after the handshake; `checked` holds the services whose contracts are compatible."""

    def __init__(
        self,
        sock: socket.socket,
        decoder: FrameDecoder,
        machine: machines.ClientMachine[PendingCall],
        welcome: WelcomeFrame,
        options: ToolClientOptions,
        changed: Callable[[], None],
    ) -> None:
        """Take over a non-blocking socket, with the decoder and the machine that have received the welcome.

        `changed` is called when another call may be possible, or the connection has ended.
        """
        self.checked: set[str] = set()
        self.machine = machine
        self.max_frame_bytes = welcome.max_frame_bytes
        self._connect_us = int(options.connect_timeout * 1_000_000)
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._send = sock.send
        self._receive = sock.recv_into
        self._decoder = decoder
        self._max_calls = min(options.max_calls, welcome.max_calls)
        self._changed = changed
        self._last = 0
        self._unsent: deque[tuple[int, memoryview]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._loop.add_reader(sock, self._readable)

    @property
    def alive(self) -> bool:
        return self.machine.state is _OPEN

    @property
    def full(self) -> bool:
        return len(self.machine.calls) >= self._max_calls or bool(self._unsent)

    @property
    def ready(self) -> bool:
        machine = self.machine
        return machine.state is _OPEN and len(machine.calls) < self._max_calls and not self._unsent

    @property
    def next_number(self) -> int:
        return self._last + 1

    def call(self, tool: RemoteTool, frame: bytes, timeout_us: int) -> asyncio.Future[tuple[Any, int]]:
        """Send the frame of call `next_number`; return the future of its reply.

        Raises:
            PeerLost: The connection was lost, and the bridge has not seen the call.
        """
        self._last = number = self._last + 1
        loop = self._loop
        future: asyncio.Future[tuple[Any, int]] = loop.create_future()
        deadline = loop.time() + timeout_us / 1_000_000
        state = _SENT if self._write(number, frame) else _UNSENT
        machine = self.machine
        if machine.state is not _OPEN:
            raise errors.PeerLost("the tool bridge closed the connection", fully_written=False)
        machine.calls[number] = PendingCall(state, future, tool, deadline)
        if self._timer is None or deadline < self._timer_at:
            self._set_timer(deadline)
        return future

    async def check_contract(self, service: str) -> None:
        """Compare contracts with the bridge, as part of connecting. There must be room for a call.

        Raises:
            ContractMismatch, UnknownMethod, InvalidContract: See `_handshake.check_contract`.
            PeerLost: The connection was lost or the bridge did not answer; no call was sent.
        """
        request = contract_request(service)
        if request is not None:
            number, timeout_us = self.next_number, self._connect_us
            try:
                frame = CONTRACT_TOOL.frame(request, number, timeout_us, NO_TRACE)
                answer, _ = await self.call(CONTRACT_TOOL, frame, timeout_us)
                check_contract(service, answer)
            except (errors.PeerLost, errors.ToolDeadline) as error:
                raise errors.PeerLost(error.message, fully_written=False) from None
            except errors.UnknownOpcode:
                pass  # The bridge is older than the contract check.
            except asyncio.CancelledError:
                self.cancel(number)
                raise
        self.checked.add(service)

    def cancel(self, number: int) -> None:
        """Ask the bridge to cancel a call, which counts as in flight until the bridge answers."""
        if self.machine.abandon(number, machines.CallCancelled):
            self._write(0, encode_cancel(number))

    def close(self) -> None:
        """Close the connection; waiting calls get `PeerLost`."""
        if self.alive:
            self.machine.apply(machines.ClientClosed)
            self._end("the client was closed")

    def close_descriptor(self) -> None:
        """Close the descriptor without using the loop, which a forked child shares with its parent."""
        if self.alive:
            self.machine.apply(machines.ClientClosed)
        self._sock.close()

    def _lose(self, reason: str, error: Callable[[], errors.OrkiError] | None = None) -> None:
        """End a lost connection; waiting calls get the error that `error` returns, or `PeerLost`."""
        if self.alive:
            self.machine.apply(machines.ConnectionLost)
            self._end(reason, error)

    def _end(self, reason: str, error: Callable[[], errors.OrkiError] | None = None) -> None:
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unsent.clear()
        for call, state in self.machine.end_all():
            if not call.future.done():
                lost = errors.PeerLost(f"the tool bridge is lost: {reason}", fully_written=state is not _UNSENT)
                call.future.set_exception(error() if error is not None else lost)
        self._changed()

    def _readable(self) -> None:
        decoder = self._decoder
        try:
            count = self._receive(decoder.writable())
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error.strerror or "connection reset")
            return
        if not count:
            self._lose("it closed the connection")
            return
        machine = self.machine
        try:
            fields = decoder.next_frame(count)
            while fields is not None and machine.state is _OPEN:
                self._take(fields)
                fields = decoder.next_frame() if decoder.filled else None
        except errors.OrkiError as error:
            kind, reason = type(error), error.message
            self._lose(reason, lambda: kind(reason))

    def _take(self, fields: Fields) -> None:
        flags, opcode, block_length, version, number, _, _, body = fields
        machine = self.machine
        if flags & FLAG_ERROR and not number:
            machine.receive(ErrorFrame)
            frame = Frame(*fields)
            self._end("it ended the connection", lambda: decode_error(frame))
            return
        if not flags & FLAG_REPLY:
            raise errors.RemoteProtocolError(f"the bridge sent a frame (opcode {opcode:#06x}) that is no reply")
        call = machine.receive_reply(number)
        if call is not None and not call.future.done():
            tool = call.tool
            if flags & FLAG_ERROR:
                call.future.set_exception(decode_error(Frame(*fields)))
            elif opcode != tool.opcode:
                wrong = f"the bridge answered {tool.method} with opcode {opcode:#06x}"
                call.future.set_exception(errors.RemoteProtocolError(wrong))
                raise errors.RemoteProtocolError(wrong)
            else:
                try:
                    call.future.set_result((tool.decode(body, block_length, version), len(body)))
                except Exception as error:
                    call.future.set_exception(tool.unreadable(error))
        self._changed()

    def _write(self, number: int, frame: bytes) -> bool:
        """Send a frame and queue what the kernel does not accept; `number` is 0 for a frame other than a call.

        Returns:
            Whether the whole frame was sent.
        """
        sent = 0
        if not self._unsent:
            try:
                sent = self._send(frame, NO_SIGNAL)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lose(error.strerror or "broken pipe")
                return False
            if sent == len(frame):
                return True
            self._loop.add_writer(self._sock, self._writable)
        self._unsent.append((number, memoryview(frame)[sent:]))
        return False

    def _writable(self) -> None:
        number, rest = self._unsent[0]
        try:
            sent = self._send(rest, NO_SIGNAL)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error.strerror or "broken pipe")
            return
        if sent < len(rest):
            self._unsent[0] = (number, rest[sent:])
            return
        self._unsent.popleft()
        if number:
            self.machine.written(number)
        if not self._unsent:
            self._loop.remove_writer(self._sock)
            self._changed()

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Abandon the calls whose deadline has passed. One timer serves all calls."""
        self._timer = None
        now = self._loop.time()
        waiting = []
        for number, call in self.machine.calls.items():
            if call.deadline > now:
                if call.state is not machines.ClientCallState.ABANDONED:
                    waiting.append(call.deadline)
            elif self.machine.abandon(number, machines.CallDeadline) and not call.future.done():
                call.future.set_exception(errors.ToolDeadline(f"no reply of {call.tool.method} arrived in time"))
        if waiting:
            self._set_timer(min(waiting))


async def open_transport(
    path: str, hello: bytes, options: ToolClientOptions, platform: Platform, changed: Callable[[], None]
) -> AsyncTransport:
    """Connect and complete the handshake.

    Raises:
        PeerLost: No bridge serves the path, or it closed the connection.
        PeerRefused: The bridge refuses the client, or its user may not receive the token.
        OrkiError: Another error of the bridge.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    machine: machines.ClientMachine[PendingCall] = machines.ClientMachine()
    try:
        sock.setblocking(False)
        decoder = FrameDecoder(options.max_frame_bytes)
        try:
            async with asyncio.timeout(options.connect_timeout):
                while not connect_nonblocking(sock, path):  # noqa: ASYNC110 - the system does not report room
                    await asyncio.sleep(_CONNECT_AGAIN)
                platform.check_peer(sock, options.bridge_uids, "bridge")
                with contextlib.suppress(OSError):
                    sock.send(hello, NO_SIGNAL)
                welcome = read_welcome(machine, await _first_frame(sock, decoder))
        except TimeoutError:
            machine.apply(machines.ConnectDeadline)
            raise errors.PeerLost(f"the tool bridge at {path} did not answer in time", fully_written=False) from None
        except OSError as error:
            machine.apply(machines.ConnectionLost)
            raise errors.PeerLost(f"no tool bridge at {path}: {error.strerror}", fully_written=False) from None
        return AsyncTransport(sock, decoder, machine, welcome, options, changed)
    except BaseException:
        sock.close()
        raise


async def _first_frame(sock: socket.socket, decoder: FrameDecoder) -> Frame:
    loop = asyncio.get_running_loop()
    count = 0
    while (fields := decoder.next_frame(count)) is None:
        count = await loop.sock_recv_into(sock, decoder.writable())
        if not count:
            raise errors.PeerLost("the tool bridge closed the connection before its welcome", fully_written=False)
    return Frame(*fields)
