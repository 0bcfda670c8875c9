"""What is the p99 of tasks beside hostile connections, compared with the p99 without them?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
import zlib
from contextlib import AsyncExitStack

from benchmarks.report import Report, worst_percent
from benchmarks.sides import python, redis_server, side

_SIDES = "benchmarks.control_sides"
HELD = 1_000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
ROWS = {
    "half-open": f"{HELD:,} half-open connections",
    "oversized": "messages of 16 MiB, five a second",
    "gzip": "gzip of 256 MiB of zeros, two a second",
}


class Abuse:
    """What one hostile client does until it is told to rest."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._held: list[socket.socket] = []
        self._task: asyncio.Task[None] | None = None

    async def begin(self, how: str) -> None:
        """Begin; return once the abuse is under way."""
        if how == "half-open":
            self._fill(HELD)
        work = {"half-open": self._hold, "oversized": self._oversized, "gzip": self._gzip}[how]
        self._task = asyncio.create_task(work())
        await asyncio.sleep(1.0)

    async def rest(self) -> None:
        """End all of it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for each in self._held:
            each.close()
        self._held.clear()
        await asyncio.sleep(0.5)

    async def _hold(self) -> None:
        """Keep half-open connections, and open those again that the server ends."""
        while True:
            await asyncio.sleep(0.5)
            self._held = [each for each in self._held if not self._ended(each)]
            self._fill(min(HELD, len(self._held) + 100))

    def _fill(self, count: int) -> None:
        host, _, port = self._target.rpartition(":")
        while len(self._held) < count:
            opened = socket.create_connection((host, int(port)))
            opened.setblocking(False)
            opened.sendall(PREFACE)
            self._held.append(opened)

    def _ended(self, connection: socket.socket) -> bool:
        try:
            while connection.recv(65_536):
                pass
        except BlockingIOError:
            return False
        except OSError:
            pass
        connection.close()
        return True

    async def _oversized(self) -> None:
        await self._call(bytes(16 << 10), 16 << 20, 0.2, ())

    async def _gzip(self) -> None:
        packed = zlib.compress(bytes(256 << 20), wbits=31)
        await self._call(packed, len(packed), 0.5, (("grpc-encoding", "gzip"),))

    async def _call(self, body: bytes, length: int, pause: float, more: tuple[tuple[str, str], ...]) -> None:
        """Call Submit again and again with this body, on bare HTTP/2: a gRPC client would cost more than the server."""
        message = struct.pack("!BI", bool(more), length) + body
        data = [message[at : at + 16_384] for at in range(0, len(message), 16_384)]
        request = PREFACE + _frame(1, 4, _headers(more)) + b"".join(_frame(0, 0, each) for each in data)
        host, _, port = self._target.rpartition(":")
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(request)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await reader.read(-1)
                writer.close()


def _frame(kind: int, flags: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame of stream 1."""
    return len(payload).to_bytes(3) + bytes([kind, flags]) + (1).to_bytes(4) + payload


def _headers(more: tuple[tuple[str, str], ...]) -> bytes:
    """Return the header block of a call, each field as a literal without indexing (RFC 7541, 6.2.2)."""
    path = (":path", "/orki.control.v1.TaskService/Submit")
    fixed = ((":method", "POST"), (":scheme", "http"), path, (":authority", "localhost"), ("te", "trailers"))
    fields = (*fixed, ("content-type", "application/grpc"), *more)
    return b"".join(b"\0" + b"".join(bytes([len(each)]) + each.encode() for each in field) for field in fields)


async def measure(report: Report) -> None:
    """Measure all rows: five pairs, first without and then with the abuse."""
    pairs, tasks = (2, 100) if report.quick else (5, 400)
    with redis_server() as (port, _):
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            serve = python("orki_server", "serve", "--listen", "127.0.0.1:0", "--json")
            server = await enter(
                side("orchestrator", *serve, ready=False, ORKI_REDIS_URL=f"redis://127.0.0.1:{port}/0")
            )
            target = str((await server.answer())["address"])
            await enter(side("agent", *python(_SIDES, "agent", target)))
            client = await enter(side("client", *python(_SIDES, "client", target)))
            hostile = await enter(side("hostile", *python("benchmarks.control_abuse", target)))
            await client.ask(f"one {tasks}")
            for how, name in ROWS.items():
                quiet, abused = [], []
                for _ in range(pairs):
                    quiet.append(worst_percent(await client.ask(f"one {tasks}"), "us"))
                    await hostile.ask(how)
                    abused.append(worst_percent(await client.ask(f"one {tasks}"), "us"))
                    await hostile.ask("rest")
                report.add(
                    f"submit to result beside {name}, p99 of each round",
                    "us",
                    abused,
                    baseline="without them, p99",
                    against=quiet,
                    reach=("<=", 1.2),
                )


async def _serve(target: str) -> None:
    abuse = Abuse(target)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    while line := (await reader.readline()).decode().strip():
        await (abuse.rest() if line == "rest" else abuse.begin(line))
        print(json.dumps({"values": []}), flush=True)


if __name__ == "__main__":
    # It stands for another machine, so it must not take the CPU of those that are measured.
    os.nice(19)
    asyncio.run(_serve(sys.argv[1]))
