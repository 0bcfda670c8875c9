"""What the hot path is measured against: echoes of the same bytes without any protocol."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns

__all__ = ["asyncio_echo_server", "c_rounds", "echo_server", "in_child", "loop_echo_rounds", "raw_echo_rounds"]

Rounds = Callable[[int], list[int]]
"""Does so many round trips and gives the nanoseconds that each took."""


@contextmanager
def in_child(serve: Callable[[], None]) -> Iterator[int]:
    """Runs `serve` in a forked process until the block ends."""
    child = os.fork()
    if child == 0:
        try:
            serve()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def echo_server(sock: socket.socket, size: int) -> None:
    """Blocking echo: what a hand-written server in Python costs at least."""
    buffer = bytearray(max(size, 65_536))
    view = memoryview(buffer)
    while True:
        have = 0
        while have < size:
            count = sock.recv_into(view[have:])
            if not count:
                return
            have += count
        sock.sendall(view[:size])


def raw_echo_rounds(sock: socket.socket, size: int) -> Rounds:
    """Blocking client of `echo_server`."""
    message, buffer = bytes(size), bytearray(max(size, 65_536))
    view = memoryview(buffer)

    def rounds(count: int) -> list[int]:
        taken = []
        for _ in range(count):
            start = perf_counter_ns()
            sock.sendall(message)
            have = sock.recv_into(buffer)
            while have < size:
                have += sock.recv_into(view[have:])
            taken.append(perf_counter_ns() - start)
        return taken

    return rounds


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[attr-defined]


def asyncio_echo_server(sock: socket.socket) -> None:
    """Echo by a bare asyncio.Protocol."""

    async def serve() -> None:
        await asyncio.get_running_loop().create_connection(_Echo, sock=sock)
        await asyncio.Event().wait()

    asyncio.run(serve())


class _Asker(asyncio.Protocol):
    def __init__(self, size: int) -> None:
        self.size = size
        self.have = 0
        self.future: asyncio.Future[None] | None = None

    def data_received(self, data: bytes) -> None:
        self.have += len(data)
        if self.have >= self.size and self.future is not None:
            self.have = 0
            self.future.set_result(None)


async def loop_echo_rounds(sock: socket.socket, size: int) -> Callable[[int], object]:
    """Client by a bare asyncio.Protocol and one future for each round trip; gives a coroutine function."""
    loop = asyncio.get_running_loop()
    transport, asker = await loop.create_connection(lambda: _Asker(size), sock=sock)
    message = bytes(size)

    async def rounds(count: int) -> list[int]:
        taken = []
        for _ in range(count):
            start = perf_counter_ns()
            asker.future = loop.create_future()
            transport.write(message)
            await asker.future
            taken.append(perf_counter_ns() - start)
        return taken

    return rounds


@contextmanager
def c_rounds(size: int) -> Iterator[Rounds | None]:
    """The same in C, compiled now; None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        yield None
        return
    source = Path(__file__).with_name("hotpath_pingpong.c")
    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder:
        program = str(Path(folder) / "pingpong")
        subprocess.run([compiler, "-O2", "-o", program, str(source)], check=True)
        with subprocess.Popen([program, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            told, heard = process.stdin, process.stdout

            def rounds(count: int) -> list[int]:
                told.write(b"%d\n" % count)
                told.flush()
                return list(struct.unpack(f"{count}Q", heard.read(8 * count)))

            yield rounds
            told.close()
