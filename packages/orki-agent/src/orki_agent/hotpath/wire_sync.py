"""One blocking connection of a client."""

from __future__ import annotations

import contextlib
import socket
from time import monotonic
from typing import Any, Final

from orki_agent.hotpath.agreement import ASKING, check_answer, question
from orki_agent.hotpath.frames import (
    CALL_WORD,
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
from orki_agent.hotpath.greeting import read_welcome
from orki_agent.hotpath.options import ToolClientOptions
from orki_agent.hotpath.plans import Plan
from orki_agent.hotpath.seam import NO_SIGNAL, Seam, set_timeout
from orki_contract.errors import OrkiError, PeerLost, RemoteProtocolError, ToolDeadline, UnknownOpcode

__all__ = ["BlockingWire"]

_pack: Final = HEADER.pack
_MAX_OWED: Final = 4
"""Replies that may still come for calls that ran out of time; with more the connection is given up."""


class BlockingWire:
    """Sends a call and waits for its reply: one system call each way for small frames.

    The kernel keeps the deadline (SO_RCVTIMEO), since a Python timeout would cost a poll for each receive.

    Attributes:
        agreed: Services whose contracts fit.
        last: Correlation of the last call.
        max_frame_bytes: Longest frame that the bridge takes.
        sent_bytes: Length of the last call's frame.
        reply_bytes: Block and tail of the last reply.
    """

    __slots__ = (
        "_armed_us",
        "_closed",
        "_connect_us",
        "_decoder",
        "_owed",
        "_receive",
        "_send",
        "_sock",
        "agreed",
        "last",
        "max_frame_bytes",
        "reply_bytes",
        "sent_bytes",
    )

    def __init__(self, path: str, hello: bytes, options: ToolClientOptions, seam: Seam) -> None:
        """Connects and shakes hands.

        Raises:
            PeerLost: Nobody serves the path, or the bridge went away.
            PeerRefused: The bridge refuses us, or its user is not to be trusted with the token.
            OrkiError: Whatever else the bridge answers.
        """
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._send = self._sock.send
        self._receive = self._sock.recv_into
        self._decoder = FrameDecoder(options.max_frame_bytes)
        self.agreed: set[str] = set()
        self._connect_us = int(options.connect_timeout * 1_000_000)
        self._armed_us = 0
        self._owed = 0
        self._closed = False
        self.last = 0
        self.sent_bytes = self.reply_bytes = 0
        try:
            self.max_frame_bytes = self._greet(path, hello, options, seam)
        except BaseException:
            self.close()
            raise

    @property
    def usable(self) -> bool:
        """Whether another call may be sent."""
        return not (self._closed or self._decoder.broken or self._owed > _MAX_OWED)

    def call(self, plan: Plan, request: Any, timeout_us: int, trace: bytes) -> Any:
        """Makes a call and gives the response.

        The kernel keeps the time where request and reply pass in one piece each; when more is to come than the first
        piece, the time starts anew, once.

        Raises:
            ToolDeadline: Its time is over.
            PeerLost: The connection broke.
            OrkiError: What the ErrorFrame says with which it was answered, or why the request cannot be sent.
        """
        self.last = number = self.last + 1
        self.sent_bytes = HEADER_BYTES
        if type(request) is not plan.request:
            raise plan.wrong(request)
        body = plan.encode(request)
        self.sent_bytes = length = HEADER_BYTES + len(body)
        if length > self.max_frame_bytes:
            raise plan.too_long(length, self.max_frame_bytes)
        # As `encode_call`, whose call alone would be felt here.
        frame = _pack(CALL_WORD, plan.opcode, plan.block_length, length, plan.version, number, timeout_us, trace) + body
        if timeout_us != self._armed_us:
            self._arm(timeout_us)
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
            reply = self._search(reply, monotonic() + timeout_us * 1e-6)
        _, opcode, block_length, version, _, _, _, replied = reply
        if opcode != plan.opcode:
            self.close()
            raise RemoteProtocolError(f"the bridge answered {plan.method} with opcode {opcode:#06x}")
        self.reply_bytes = len(replied)
        try:
            return plan.decode(replied, block_length, version)
        except Exception as error:
            raise plan.unreadable(error) from None

    def agree(self, service: str) -> None:
        """Compares contracts with the bridge, as a part of connecting.

        Raises:
            ContractMismatch, UnknownMethod, InvalidContract: As `check_answer`.
            PeerLost: The bridge went away, or does not answer; no call was sent.
        """
        asked = question(service)
        if asked is not None:
            try:
                check_answer(service, self.call(ASKING, asked, self._connect_us, NO_TRACE))
            except (PeerLost, ToolDeadline) as error:
                raise PeerLost(error.message, fully_written=False) from None
            except UnknownOpcode:
                pass  # the bridge is older than the question, and there is nothing to compare
            finally:
                self.sent_bytes = HEADER_BYTES
        self.agreed.add(service)

    def close(self) -> None:
        """Ends the connection; the bridge then cancels a call that still runs."""
        self._closed = True
        self._sock.close()

    def _greet(self, path: str, hello: bytes, options: ToolClientOptions, seam: Seam) -> int:
        deadline = monotonic() + options.connect_timeout
        self._arm(self._connect_us)
        try:
            self._sock.connect(path)
        except BlockingIOError:
            raise PeerLost(f"the tool bridge at {path} takes no connections now", fully_written=False) from None
        except OSError as error:
            raise PeerLost(f"no tool bridge at {path}: {error.strerror}", fully_written=False) from None
        seam.check_peer(self._sock, options.bridge_uids, "bridge")
        # A bridge that refuses at once has closed already; its reason can be read all the same.
        with contextlib.suppress(OSError):
            self._send(hello, NO_SIGNAL)
        count = 0
        try:
            while (fields := self._decoder.next_frame(count)) is None:
                count = self._fill(deadline)
        except ToolDeadline:
            raise PeerLost(f"the tool bridge at {path} did not answer the hello", fully_written=False) from None
        except PeerLost as error:
            raise PeerLost(error.message, fully_written=False) from None
        return read_welcome(Frame(*fields)).max_frame_bytes

    def _arm(self, timeout_us: int) -> None:
        """Has the kernel end every wait after this time."""
        self._armed_us = timeout_us
        set_timeout(self._sock, socket.SO_RCVTIMEO, timeout_us / 1_000_000)
        set_timeout(self._sock, socket.SO_SNDTIMEO, timeout_us / 1_000_000)

    def _send_rest(self, rest: memoryview, deadline: float) -> None:
        """Sends what the kernel did not take at once."""
        try:
            while rest:
                left = deadline - monotonic()
                if left <= 0:
                    raise BlockingIOError
                self._arm(max(1, int(left * 1_000_000)))
                rest = rest[self._send(rest, NO_SIGNAL) :]
        except OSError as error:
            raise self._not_sent(error) from None

    def _search(self, reply: Fields | None, deadline: float) -> Fields:
        """The rare ways of a reply: in pieces, as an error, or behind replies that came too late for their calls."""
        while True:
            if reply is not None:
                if reply[4] == self.last and reply[0] & FLAG_REPLY and not reply[0] & FLAG_ERROR:
                    return reply
                self._judge(Frame(*reply))
            reply = self._decoder.next_frame()
            while reply is None:
                reply = self._decoder.next_frame(self._fill(deadline))

    def _judge(self, frame: Frame) -> None:
        """Looks at a frame that is not the reply; returns for one that is to be passed over."""
        if frame.flags & FLAG_ERROR and frame.correlation == self.last:
            raise decode_error(frame)
        if frame.flags & FLAG_ERROR and not frame.correlation:
            self.close()
            raise decode_error(frame)
        if not 0 < frame.correlation < self.last or not frame.flags & FLAG_REPLY or not self._owed:
            self.close()
            raise RemoteProtocolError(f"the bridge answered call {frame.correlation}, for which nobody waits")
        self._owed -= 1

    def _fill(self, deadline: float) -> int:
        """Receives once; gives the number of bytes."""
        left = deadline - monotonic()
        if left <= 0:
            raise self._not_received(BlockingIOError())
        self._arm(max(1, int(left * 1_000_000)))
        try:
            count = self._receive(self._decoder.writable())
        except OSError as error:
            raise self._not_received(error) from None
        if not count:
            raise self._lost("it closed the connection", fully_written=True)
        return count

    def _not_sent(self, error: OSError) -> OrkiError:
        if isinstance(error, BlockingIOError):
            # Part of the frame may have left: nothing can follow it on this connection.
            self.close()
            return ToolDeadline("the bridge did not take the request in time")
        return self._lost(error.strerror or "broken pipe", fully_written=False)

    def _not_received(self, error: OSError) -> OrkiError:
        if isinstance(error, BlockingIOError):
            self._owed += 1
            return ToolDeadline("no reply came in time")
        return self._lost(error.strerror or "connection reset", fully_written=True)

    def _lost(self, what: str, *, fully_written: bool) -> OrkiError:
        """The error for a broken connection: the bridge's own word where it left one."""
        try:
            with contextlib.suppress(OSError):
                while count := self._receive(self._decoder.writable(), 0, socket.MSG_DONTWAIT):
                    fields = self._decoder.next_frame(count)
                    while fields is not None:
                        if fields[0] & FLAG_ERROR and not fields[4]:
                            return decode_error(Frame(*fields))
                        fields = self._decoder.next_frame()
        except OrkiError as error:
            return error
        finally:
            self.close()
        return PeerLost(f"the tool bridge is gone: {what}", fully_written=fully_written)
