"""The programs of the hot-path benchmarks: `python -m benchmarks.hotpath_sides ROLE PATH BYTES`.

BYTES counts the frame's block and tail. Baselines move the same bytes as a whole frame, header included. Servers print
`{"ready": true}`; clients take the commands of `benchmarks.peers.client_loop`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import orki_contract as oc
from benchmarks.peers.client_loop import serve, serve_blocking
from orki_agent.hotpath import AsyncToolClient, SyncToolClient, ToolBridge
from orki_contract.trace import new_span, use_span

HEADER_BYTES = 56
BLOCK_BYTES = 16
TOKEN = bytes(range(32))


@oc.frame("bench.v1.Read", version=1, block_length=BLOCK_BYTES)
class Read(oc.FrameBase):
    """A request of a usual shape: two numbers and some bytes."""

    offset: int = oc.at(0, oc.Scalar.U64, number=1)
    length: int = oc.at(8, oc.Scalar.U32, number=2)
    body: bytes = oc.tail(default=b"")


READ = oc.Tool.declare("bench.v1.BenchToolService/Read", opcode=0x0101, request=Read, response=Read)


class BenchTools(oc.SyncToolService):
    """Returns as many bytes as it received."""

    TOOLS = (READ,)

    def read(self, request: Read, call: oc.ToolCall) -> Read:
        return Read(request.offset, request.length, request.body)


def _ready() -> None:
    print(json.dumps({"ready": True}), flush=True)


def bridge(path: str, _size: int) -> None:
    """Serve the tool."""
    with ToolBridge(BenchTools(), path=path, token=TOKEN):
        _ready()
        time.sleep(36_000)


def call(path: str, size: int) -> None:
    """Call the tool with the sync client."""
    request = Read(7, 9, bytes(size - BLOCK_BYTES))
    with SyncToolClient(path, TOKEN, name="bench") as client:
        serve_blocking(lambda: client.call(READ, request))


def call_traced(path: str, size: int) -> None:
    """Call the tool with the sync client, inside a span, with a record of each call."""
    request = Read(7, 9, bytes(size - BLOCK_BYTES))
    records: deque[object] = deque(maxlen=1_024)
    with SyncToolClient(path, TOKEN, name="bench", on_call=records.append) as client, use_span(new_span()):
        serve_blocking(lambda: client.call(READ, request))


async def _call_async(path: str, size: int) -> None:
    request = Read(7, 9, bytes(size - BLOCK_BYTES))
    records: deque[object] = deque(maxlen=1_024)
    async with AsyncToolClient(path, TOKEN, name="bench", on_call=records.append) as client:
        with use_span(new_span()):
            await serve(lambda: client.call(READ, request))


def call_async(path: str, size: int) -> None:
    """Call the tool with the async client, inside a span, with a record of each call."""
    asyncio.run(_call_async(path, size))


def echo(path: str, size: int) -> None:
    """Echo with blocking calls: the least that a server written in Python costs."""
    size += HEADER_BYTES
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    _ready()
    buffer = bytearray(max(size, 65_536))
    view = memoryview(buffer)
    while True:
        connection, _ = listener.accept()
        with connection:
            while True:
                have = 0
                while have < size and (count := connection.recv_into(view[have:])):
                    have += count
                if have < size:
                    break
                connection.sendall(view[:size])


def raw(path: str, size: int) -> None:
    """Call `echo` with blocking calls."""
    size += HEADER_BYTES
    message, buffer = bytes(size), bytearray(max(size, 65_536))
    view = memoryview(buffer)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)

        def cycle() -> None:
            connection.sendall(message)
            have = connection.recv_into(buffer)
            while have < size:
                have += connection.recv_into(view[have:])

        serve_blocking(cycle)


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


async def _asyncio_echo(path: str) -> None:
    server = await asyncio.get_running_loop().create_unix_server(_Echo, path)
    _ready()
    await server.serve_forever()


def asyncio_echo(path: str, _size: int) -> None:
    """Echo with a bare asyncio.Protocol."""
    asyncio.run(_asyncio_echo(path))


class _Caller(asyncio.Protocol):
    def __init__(self, size: int) -> None:
        self._size = size
        self._have = 0
        self.reply: asyncio.Future[None] | None = None

    def data_received(self, data: bytes) -> None:
        self._have += len(data)
        if self._have >= self._size and self.reply is not None:
            self._have = 0
            self.reply.set_result(None)


async def _asyncio_raw(path: str, size: int) -> None:
    loop = asyncio.get_running_loop()
    transport, caller = await loop.create_unix_connection(lambda: _Caller(size), path)
    message = bytes(size)

    async def cycle() -> None:
        caller.reply = loop.create_future()
        transport.write(message)
        await caller.reply

    await serve(cycle)


def asyncio_raw(path: str, size: int) -> None:
    """Call `asyncio_echo` with a bare asyncio.Protocol and one future for each call."""
    asyncio.run(_asyncio_raw(path, size + HEADER_BYTES))


def pipe_echo(path: str, _size: int) -> None:
    """Echo with multiprocessing.connection."""
    from multiprocessing.connection import Listener

    with Listener(path, "AF_UNIX") as listener:
        _ready()
        while True:
            with listener.accept() as connection:
                try:
                    while True:
                        connection.send_bytes(connection.recv_bytes())
                except EOFError:
                    continue


def pipe(path: str, size: int) -> None:
    """Call `pipe_echo` with multiprocessing.connection."""
    from multiprocessing.connection import Client

    message = bytes(size)
    with Client(path, "AF_UNIX") as connection:

        def cycle() -> None:
            connection.send_bytes(message)
            connection.recv_bytes()

        serve_blocking(cycle)


def grpc_echo(path: str, _size: int) -> None:
    """Echo with sync gRPC over a Unix socket."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(2))
    methods: dict[str, Any] = {"Echo": grpc.unary_unary_rpc_method_handler(lambda request, _context: request)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", methods),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    _ready()
    server.wait_for_termination()


def grpc_call(path: str, size: int) -> None:
    """Call `grpc_echo`."""
    import grpc

    message = bytes(size)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        echo: Any = channel.unary_unary("/bench.Echo/Echo")
        serve_blocking(lambda: echo(message))


ROLES: dict[str, Callable[[str, int], None]] = {
    role.__name__: role
    for role in (
        *(bridge, call, call_traced, call_async),
        *(echo, raw, asyncio_echo, asyncio_raw),
        *(pipe_echo, pipe, grpc_echo, grpc_call),
    )
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
