"""Sample tools, a raw client, a bridge in another process, and waiting."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf.wrappers_pb2 import StringValue

import orki_contract as oc
from orki_agent.hotpath import ToolBridge
from orki_agent.hotpath._handshake import hello_frame
from orki_agent.hotpath.frames import NO_TRACE, Frame, FrameDecoder, encode_call
from orki_contract.errors import InvalidArgument, PeerLost, ToolFailed
from orki_contract.trace import current_span

WAIT_SECONDS = 20.0
TOKEN = bytes(range(32))


@oc.frame("test.hotpath.v1.Ask", version=1, block_length=16)
class Ask(oc.FrameBase):
    """A number, a code and some bytes."""

    number: int = oc.at(0, oc.Scalar.U64, number=1)
    code: int = oc.at(8, oc.Scalar.I32, number=2)
    body: bytes = oc.tail(default=b"")


_SERVICE = "test.hotpath.v1.SampleToolService"
ECHO = oc.Tool.declare(f"{_SERVICE}/Echo", opcode=0x0101, request=Ask, response=Ask, timeout=10.0)
SLEEP = oc.Tool.declare(f"{_SERVICE}/Sleep", opcode=0x0102, request=Ask, response=Ask, timeout=10.0)
FAIL = oc.Tool.declare(f"{_SERVICE}/Fail", opcode=0x0103, request=StringValue, response=StringValue)
TEXT = oc.Tool.declare(f"{_SERVICE}/Text", opcode=0x0104, request=StringValue, response=StringValue)
GROW = oc.Tool.declare(f"{_SERVICE}/Grow", opcode=0x0105, request=Ask, response=Ask, timeout=20.0)
WHO = oc.Tool.declare(f"{_SERVICE}/Who", opcode=0x0106, request=StringValue, response=StringValue)
ASYNC_SLEEP = oc.Tool.declare("test.hotpath.v1.AsyncToolService/Nap", opcode=0x0201, request=Ask, response=Ask)
ASYNC_WHO = oc.Tool.declare(
    "test.hotpath.v1.AsyncToolService/Who", opcode=0x0202, request=StringValue, response=StringValue
)
UNSERVED = oc.Tool.declare(f"{_SERVICE}/Unserved", opcode=0x0999, request=Ask, response=Ask)


class SampleTools(oc.SyncToolService):
    """Blocking handlers.

    Attributes:
        cancelled: Set when a sleeping handler saw `call.cancelled`.
        release: Sleeping handlers end when this is set.
    """

    TOOLS = (ECHO, SLEEP, FAIL, TEXT, GROW, WHO)

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.release = threading.Event()
        self.sleeping = 0

    def echo(self, request: Ask, call: oc.ToolCall) -> Ask:
        """Return the request."""
        return Ask(request.number, request.code, request.body)

    def sleep(self, request: Ask, call: oc.ToolCall) -> Ask:
        """Sleep for `number` milliseconds, or until cancelled or released."""
        self.sleeping += 1
        end = time.monotonic() + request.number / 1_000
        while time.monotonic() < end and not self.release.is_set():
            if call.cancelled:
                self.cancelled.set()
                break
            time.sleep(0.001)
        self.sleeping -= 1
        return request

    def fail(self, request: StringValue, call: oc.ToolCall) -> StringValue:
        """Fail in the requested way."""
        ways: dict[str, BaseException] = {
            "code": ToolFailed("no such file", code=-7),
            "argument": InvalidArgument("path is empty"),
            "bug": ZeroDivisionError("by nothing"),
            "exit": SystemExit(3),
            "nested": PeerLost("another bridge is gone"),
            "long": ToolFailed("ä" * 100_000, code=1),
            "surrogate": ToolFailed("\ud800"),
        }
        if request.value in ways:
            raise ways[request.value]
        return Ask(1, 2)  # type: ignore[return-value]

    def text(self, request: StringValue, call: oc.ToolCall) -> StringValue:
        """Return the text."""
        return StringValue(value=request.value)

    def grow(self, request: Ask, call: oc.ToolCall) -> Ask:
        """Return `number` bytes."""
        return Ask(request.number, 0, b"g" * request.number)

    def who(self, request: StringValue, call: oc.ToolCall) -> StringValue:
        """Return the caller's name and span, and the span in which the handler runs."""
        return _who(call)


class AsyncSampleTools(oc.AsyncToolService):
    """Async handlers.

    Attributes:
        cancelled: Set when a handler was cancelled.
        begun: Set when a handler sleeps.
    """

    TOOLS = (ASYNC_SLEEP, ASYNC_WHO)

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.begun = threading.Event()

    async def nap(self, request: Ask, call: oc.ToolCall) -> Ask:
        """Sleep for `number` milliseconds."""
        try:
            self.begun.set()
            await asyncio.sleep(request.number / 1_000)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    async def who(self, request: StringValue, call: oc.ToolCall) -> StringValue:
        """As `SampleTools.who`."""
        return _who(call)


def _who(call: oc.ToolCall) -> StringValue:
    inside = current_span()
    return StringValue(
        value=f"{call.client}|{call.span.traceparent if call.span else ''}|{inside.traceparent if inside else ''}"
    )


class RawPeer:
    """A client that sends arbitrary bytes."""

    def __init__(self, bridge: ToolBridge, *, hello: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(WAIT_SECONDS)
        self.sock.connect(bridge.path)
        self._decoder = FrameDecoder(1 << 26)
        if hello:
            self.send(hello_frame(bridge.token, "raw"))
            assert self.frame() is not None

    def send(self, sent: bytes) -> None:
        self.sock.sendall(sent)

    def frame(self) -> Frame | None:
        """Return the next frame with a copied body; None at the end of the stream."""
        count = 0
        while (fields := self._decoder.next_frame(count)) is None:
            try:
                count = self.sock.recv_into(self._decoder.writable())
            except ConnectionResetError:
                count = 0
            if not count:
                return None
        frame = Frame(*fields)
        return frame._replace(body=memoryview(bytes(frame.body)))

    def frames(self) -> list[Frame]:
        """Return all frames until the bridge closes the connection."""
        found = []
        while (frame := self.frame()) is not None:
            found.append(frame)
        return found

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def echo_frame(correlation: int, body: bytes = b"hello", *, timeout_us: int = 0) -> bytes:
    """Return a call of `ECHO`."""
    return encode_call(0x0101, 16, 1, correlation, timeout_us, NO_TRACE, Ask(1, 2, body).encode())


def sleep_frame(correlation: int, millis: int, *, timeout_us: int = 0) -> bytes:
    """Return a call of `SLEEP`."""
    return encode_call(0x0102, 16, 1, correlation, timeout_us, NO_TRACE, Ask(millis, 0).encode())


_SERVE = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from hotpath_tools import TOKEN, AsyncSampleTools, SampleTools
from orki_agent.hotpath import ToolBridge
with ToolBridge(SampleTools(), AsyncSampleTools(), path=sys.argv[2], token=TOKEN):
    signal.pause()
"""


def serving_process(path: str) -> subprocess.Popen[bytes]:
    """Start a process that serves all sample tools at the path until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", _SERVE, str(Path(__file__).parent), path])
    until(lambda: _listens(path) or process.poll() is not None, what="the other process serves")
    return process


def _listens(path: str) -> bool:
    """Return whether a client can connect to the path."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def open_descriptors() -> int:
    """Return the number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))


def until(condition: Callable[[], bool], *, what: str = "condition") -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_SECONDS:.0f} s: {what}"
        time.sleep(0.002)
