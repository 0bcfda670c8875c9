"""One blocking connection of `SyncToolClient`."""

from __future__ import annotations

import contextlib
import socket
from time import monotonic
from typing import Any, Final

from orki.hotpath.v1.tool_orki import ErrorFrame
from orki_agent.hotpath import _machine as machines
from orki_agent.hotpath._handshake import CONTRACT_TOOL, check_contract, contract_request, read_welcome
from orki_agent.hotpath._options import ToolClientOptions
from orki_agent.hotpath._platform import NO_SIGNAL, Platform, set_timeout
from orki_agent.hotpath._tool_codec import RemoteTool
from orki_agent.hotpath.frames import (
    CALL_PREFIX,
    FLAG_ERROR,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    NO_TRACE,
    Fields,
    Frame,
    FrameDecoder,
    decode_error,
)
from orki_contract import errors

_pack: Final = HEADER.pack
_MAX_ABANDONED: Final = 4
"""Abandoned calls whose replies may still arrive; with more, the connection is closed."""
_CLOSED: Final = machines.ClientConnectionState.CLOSED

# A call that succeeds takes these two steps of the table, looked up once. Only an abandoned call enters the machine.
_SENT: Final = machines.CLIENT_CALL.next(machines.CLIENT_CALL.initial, machines.FrameWritten, errors.LocalProtocolError)
machines.CLIENT_CALL.next(_SENT, machines.ReplyReceived, errors.LocalProtocolError)


class SyncTransport:
    """One blocking connection. It sends a call and waits for its reply: one system call each for small frames.

    The kernel enforces the timeout (SO_RCVTIMEO), because a Python timeout would cost a poll for each receive.

    Attributes:
        checked: Services whose contracts are compatible.
        last: Correlation of the last call.
        max_frame_bytes: Longest frame that the bridge accepts.
        sent_bytes: Length of the last call's frame.
        reply_bytes: Length of block and tail of the last reply.
    """

    def __init__(self, path: str, hello: bytes, options: ToolClientOptions, platform: Platform) -> None:
        """Connect and complete the handshake.

        Raises:
            PeerLost: No bridge serves the path, or it closed the connection.
            PeerRefused: The bridge refuses the client, or its user may not receive the token.
            OrkiError: Another error of the bridge.
        """
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._send = self._sock.send
        self._receive = self._sock.recv_into
        self._decoder = FrameDecoder(options.max_frame_bytes)
        self._machine: machines.ClientMachine[machines.ClientCall] = machines.ClientMachine()
        self._connect_us = int(options.connect_timeout * 1_000_000)
        self._socket_timeout_us = 0
        self.checked: set[str] = set()
        self.last = 0
        self.sent_bytes = self.reply_bytes = 0
        try:
            self.max_frame_bytes = self._connect(path, hello, options, platform)
        except BaseException:
            self.close()
            raise

    @property
    def usable(self) -> bool:
        machine = self._machine
        return machine.state is not _CLOSED and not self._decoder.broken and len(machine.calls) <= _MAX_ABANDONED

    def call(self, tool: RemoteTool, request: Any, timeout_us: int, trace: bytes) -> Any:
        """Call a tool and return its response.

        The kernel enforces the timeout if request and reply each pass in one part. If more parts follow, the timeout
        starts again once.

        Raises:
            ToolDeadline: The timeout has expired.
            PeerLost: The connection was lost.
            OrkiError: The error that the bridge answered, or the reason why the request cannot be sent.
        """
        self.last = number = self.last + 1
        self.sent_bytes = HEADER_BYTES
        if type(request) is not tool.request:
            raise tool.wrong_class(request)
        body = tool.encode(request)
        self.sent_bytes = length = HEADER_BYTES + len(body)
        if length > self.max_frame_bytes:
            raise tool.too_long(length, self.max_frame_bytes)
        # Inlined `encode_call`: the function call would add measurably to each tool call.
        prefix = _pack(CALL_PREFIX, tool.opcode, tool.block_length, length, tool.version, number, timeout_us, trace)
        frame = prefix + body
        if timeout_us != self._socket_timeout_us:
            self._set_timeout(timeout_us)
        try:
            sent = self._send(frame, NO_SIGNAL)
        except OSError as error:
            raise self._not_sent(error) from None
        if sent != length:
            self._send_rest(memoryview(frame)[sent:], monotonic() + timeout_us * 1e-6)
        decoder = self._decoder
        try:
            count = self._receive(decoder.writable())
        except OSError as error:
            raise self._not_received(error) from None
        if not count:
            raise self._lost("it closed the connection", fully_written=True)
        reply = decoder.next_frame(count)
        if reply is None or reply[4] != number or reply[0] != FLAG_REPLY:
            reply = self._find_reply(reply, monotonic() + timeout_us * 1e-6)
        _, opcode, block_length, version, _, _, _, reply_body = reply
        if opcode != tool.opcode:
            self.close()
            raise errors.RemoteProtocolError(f"the bridge answered {tool.method} with opcode {opcode:#06x}")
        self.reply_bytes = len(reply_body)
        try:
            return tool.decode(reply_body, block_length, version)
        except Exception as error:
            raise tool.unreadable(error) from None

    def check_contract(self, service: str) -> None:
        """Compare contracts with the bridge, as part of connecting.

        Raises:
            ContractMismatch, UnknownMethod, InvalidContract: See `_handshake.check_contract`.
            PeerLost: The connection was lost or the bridge did not answer; no call was sent.
        """
        request = contract_request(service)
        if request is not None:
            try:
                check_contract(service, self.call(CONTRACT_TOOL, request, self._connect_us, NO_TRACE))
            except (errors.PeerLost, errors.ToolDeadline) as error:
                raise errors.PeerLost(error.message, fully_written=False) from None
            except errors.UnknownOpcode:
                pass  # The bridge is older than the contract check.
            finally:
                self.sent_bytes = HEADER_BYTES
        self.checked.add(service)

    def close(self) -> None:
        """Close the connection; the bridge then cancels a call that is running."""
        if self._machine.state is not _CLOSED:
            self._machine.apply(machines.ClientClosed)
        self._sock.close()

    def _connect(self, path: str, hello: bytes, options: ToolClientOptions, platform: Platform) -> int:
        deadline = monotonic() + options.connect_timeout
        self._set_timeout(self._connect_us)
        try:
            self._sock.connect(path)
        except BlockingIOError:
            raise errors.PeerLost(
                f"the tool bridge at {path} accepts no connections now", fully_written=False
            ) from None
        except OSError as error:
            raise errors.PeerLost(f"no tool bridge at {path}: {error.strerror}", fully_written=False) from None
        platform.check_peer(self._sock, options.bridge_uids, "bridge")
        # A bridge that refuses at once has closed the connection already; its error can be read all the same.
        with contextlib.suppress(OSError):
            self._send(hello, NO_SIGNAL)
        count = 0
        try:
            while (fields := self._decoder.next_frame(count)) is None:
                count = self._fill(deadline)
        except BlockingIOError:
            self._machine.apply(machines.ConnectDeadline)
            raise errors.PeerLost(f"the tool bridge at {path} did not answer the hello", fully_written=False) from None
        except errors.PeerLost as error:
            raise errors.PeerLost(error.message, fully_written=False) from None
        return read_welcome(self._machine, Frame(*fields)).max_frame_bytes

    def _set_timeout(self, timeout_us: int) -> None:
        self._socket_timeout_us = timeout_us
        set_timeout(self._sock, socket.SO_RCVTIMEO, timeout_us / 1_000_000)
        set_timeout(self._sock, socket.SO_SNDTIMEO, timeout_us / 1_000_000)

    def _send_rest(self, rest: memoryview, deadline: float) -> None:
        try:
            while rest:
                left = deadline - monotonic()
                if left <= 0:
                    raise BlockingIOError
                self._set_timeout(max(1, int(left * 1_000_000)))
                rest = rest[self._send(rest, NO_SIGNAL) :]
        except OSError as error:
            raise self._not_sent(error) from None

    def _find_reply(self, reply: Fields | None, deadline: float) -> Fields:
        """Return a reply that arrives in parts, as an error, or after replies to abandoned calls."""
        while True:
            if reply is not None:
                if reply[4] == self.last and reply[0] & FLAG_REPLY and not reply[0] & FLAG_ERROR:
                    return reply
                self._take_other(Frame(*reply))
            reply = self._decoder.next_frame()
            while reply is None:
                try:
                    count = self._fill(deadline)
                except BlockingIOError as error:
                    raise self._not_received(error) from None
                reply = self._decoder.next_frame(count)

    def _take_other(self, frame: Frame) -> None:
        """Raise the error that a frame carries; return if it answers an abandoned call."""
        if frame.flags & FLAG_ERROR and frame.correlation == self.last:
            raise decode_error(frame)
        try:
            if frame.flags & FLAG_ERROR and not frame.correlation:
                self._machine.receive(ErrorFrame)
                raise decode_error(frame)
            if not frame.flags & FLAG_REPLY:
                raise errors.RemoteProtocolError(
                    f"the bridge sent a frame (opcode {frame.opcode:#06x}) that is no reply"
                )
            self._machine.receive_reply(frame.correlation)
        except errors.OrkiError:
            self.close()
            raise

    def _fill(self, deadline: float) -> int:
        """Receive once; return the number of bytes.

        Raises:
            BlockingIOError: Nothing arrived until the deadline.
            PeerLost: The connection was lost.
        """
        left = deadline - monotonic()
        if left <= 0:
            raise BlockingIOError
        self._set_timeout(max(1, int(left * 1_000_000)))
        try:
            count = self._receive(self._decoder.writable())
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._not_received(error) from None
        if not count:
            raise self._lost("it closed the connection", fully_written=True)
        return count

    def _not_sent(self, error: OSError) -> errors.OrkiError:
        if isinstance(error, BlockingIOError):
            # Part of the frame may have been written: nothing can follow it.
            self.close()
            return errors.ToolDeadline("the bridge did not read the request in time")
        return self._lost(error.strerror or "broken pipe", fully_written=False)

    def _not_received(self, error: OSError) -> errors.OrkiError:
        if isinstance(error, BlockingIOError):
            self._machine.calls[self.last] = machines.ClientCall(_SENT)
            self._machine.abandon(self.last, machines.CallDeadline)
            return errors.ToolDeadline("no reply arrived in time")
        return self._lost(error.strerror or "connection reset", fully_written=True)

    def _lost(self, reason: str, *, fully_written: bool) -> errors.OrkiError:
        """Close a lost connection; return the error that the bridge sent before, or `PeerLost`."""
        try:
            with contextlib.suppress(OSError):
                while count := self._receive(self._decoder.writable(), 0, socket.MSG_DONTWAIT):
                    fields = self._decoder.next_frame(count)
                    while fields is not None:
                        if fields[0] & FLAG_ERROR and not fields[4]:
                            return decode_error(Frame(*fields))
                        fields = self._decoder.next_frame()
        except errors.OrkiError as error:
            return error
        finally:
            self.close()
        return errors.PeerLost(f"the tool bridge closed the connection: {reason}", fully_written=fully_written)
