"""A TCP proxy on loopback that cuts, refuses, stalls, slows down and abandons connections, and loses replies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, zero seconds: close sends RST."""


class FaultProxy:
    """Forwards connections from a port of its own to a target port.

    Attributes:
        target: Port that connections are forwarded to.
        port: Port that clients connect to.
        refuse: Close new connections at once.
        delay: Seconds that each chunk waits before it is forwarded, in both directions.
        lose_replies: Forward requests, discard the first reply of each connection and reset the connection.
        lost: Number of replies discarded so far.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.refuse = False
        self.delay = 0.0
        self.lose_replies = False
        self.lost = 0
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._abandoned: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def cut(self) -> None:
        """Reset every open connection."""
        for writer in list(self._writers):
            raw = writer.get_extra_info("socket")
            if raw is not None:
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def abandon(self) -> None:
        """Forward nothing more on the open connections, and never close them; new connections work."""
        self._abandoned |= self._writers

    def stall(self) -> None:
        """Forward nothing; connections stay open and are accepted."""
        self._open.clear()

    def heal(self) -> None:
        """Forward everything again, at full speed."""
        self.refuse = self.lose_replies = False
        self.delay = 0.0
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self._writers.add(writer)
        try:
            if not self.refuse:
                await self._forward(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            self._abandoned.discard(writer)
            self._connections.discard(task)
            writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers.add(target_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, target_writer, replies=False)),
            asyncio.create_task(self._pump(target_reader, writer, replies=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._writers.discard(target_writer)
            self._abandoned.discard(target_writer)
            target_writer.close()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                await self._open.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                if writer in self._abandoned:
                    await asyncio.Event().wait()
                if replies and self.lose_replies:
                    self.lost += 1
                    return
                writer.write(chunk)
                await writer.drain()
