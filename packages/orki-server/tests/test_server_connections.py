"""Hostile and broken connections: silent, half-open, too many, too large. Others are served meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2 import ConnectResponse
from orki.control.v1.session_pb2_grpc import SessionServiceStub
from orki.control.v1.task_pb2_grpc import TaskServiceStub
from orki_contract.errors import HelloTimeout, OrkiError, Overloaded, TooLarge, error_for
from orki_control import Client, ClientOptions
from orki_control.transport import open_channel, typed_error
from orki_server import _sessions
from orki_server._connections import ConnectionLimits, Connections
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions

DO = "servertests.v1.WorkService/Do"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
ACKNOWLEDGED = b"\0\0\0\x04\x01\0\0\0\0"
WORDS = {"silent": b"", "half a preface": PREFACE[:9], "preface": PREFACE, "no call": PREFACE + SETTINGS + ACKNOWLEDGED}

Make = Callable[..., Any]
Launch = Callable[[OrchestratorOptions], Awaitable[Orchestrator]]


@contextmanager
def connections(
    address: str, count: int, words: bytes = b"", source: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """Open connections that say these words and nothing more."""
    host, _, port = address.rpartition(":")
    opened = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection((host, int(port)), 10, (source, 0)))
            opened[-1].sendall(words)
            opened[-1].setblocking(False)
        yield opened
    finally:
        for each in opened:
            each.close()


def ended(connection: socket.socket) -> bool:
    """Return whether the other side has ended a connection."""
    try:
        while received := connection.recv(65_536):
            del received
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


async def until(condition: Callable[[], bool], timeout: float = 15.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)


class Served:
    """An `orki serve` process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    def peak_bytes(self) -> int:
        """Return the largest resident size so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def limited(files: int) -> tuple[str, ...]:
    """Return the beginning of a command that may open this many files. A fork beside gRPC's threads would be unsafe."""
    return ("bash", "-c", f'ulimit -n {files}; exec "$@"', "-")


@asynccontextmanager
async def serve(redis_url: str, *arguments: str, files: int = 4_096) -> AsyncIterator[Served]:
    """Run `orki serve` as a process that may open this many files."""
    command = (sys.executable, "-m", "orki_server", "serve", "--redis", redis_url, "--listen", "127.0.0.1:0", "--json")
    process = await asyncio.create_subprocess_exec(
        *limited(files), *command, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            ready = json.loads(await process.stdout.readline())
        yield Served(process, ready["address"])
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


# --- connections without a call ---


@pytest.mark.parametrize("words", WORDS)
async def test_a_connection_on_which_no_call_arrives_is_ended(
    launch: Launch, options: Make, redis_url: str, stand_in: Make, words: str
) -> None:
    orchestrator = await launch(options(redis_url, handshake_timeout=0.5))
    agent = stand_in(orchestrator.address)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        await client.list_agents()
        with connections(orchestrator.address, 50, WORDS[words]) as opened:
            await until(lambda: all(map(ended, opened)))
        assert len(await client.list_agents()) == 1
    assert (len(agent.opened), agent.failures) == (1, [])


async def test_a_call_counts_whenever_it_arrives_and_only_for_its_own_connection() -> None:
    accepted: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    limits = ConnectionLimits(total=10, per_address=10, handshakes=10, timeout=0.0)
    kept = Connections(limits, port)
    await kept.look(time.monotonic())
    # The connection and its call arrive between a look at the sockets and the limits.
    # No other program uses ports of this address, so the same one can be bound again.
    opened = socket.create_connection(("127.0.0.1", port), source_address=("127.0.7.1", 0))
    own = opened.getsockname()
    await until(lambda: bool(accepted))
    kept.established(f"ipv4:{own[0]}:{own[1]}")
    for _ in range(3):
        await kept.apply(time.monotonic())
        await kept.look(time.monotonic())
    assert kept.ended == 0
    # Another connection with the same address and port makes no call.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    opened.close()
    accepted.pop().close()
    await asyncio.sleep(0.05)
    again = socket.socket()
    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    again.bind(own)
    again.connect(("127.0.0.1", port))
    await until(lambda: bool(accepted))
    await kept.look(time.monotonic())
    await kept.apply(time.monotonic())
    assert kept.ended == 1
    again.close()
    accepted.pop().close()
    server.close()
    await server.wait_closed()


async def test_silent_connections_do_not_lock_others_out(redis_url: str, stand_in: Make) -> None:
    """400 silent connections, opened again and again, against a process with 256 descriptors."""
    async with serve(redis_url, files=256) as served:
        before = stand_in(served.address, agent_id="before")
        await before.ready()
        port = int(served.address.rpartition(":")[2])
        opened: list[socket.socket] = []

        async def flood() -> None:
            while True:
                opened[:] = [each for each in opened if not ended(each) or each.close()]
                while len(opened) < 400:
                    opened.append(socket.create_connection(("127.0.0.1", port)))
                    opened[-1].setblocking(False)
                await asyncio.sleep(0.05)

        flooding = asyncio.create_task(flood())
        try:
            await asyncio.sleep(1.0)
            after = stand_in(served.address, agent_id="after")
            await after.ready()
            async with Client(served.address, ClientOptions(patience=45.0)) as client:
                for _ in range(5):
                    (task,) = await client.submit_raw([pb.Submission(method=DO, request=b"\n\x01q")])
                    async with asyncio.timeout(20):
                        states = [news.task.state async for news in client.watch(task.task_id)]
                    assert states[-1] == TaskState.TASK_STATE_SUCCEEDED
            assert len(before.opened) == 1
        finally:
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
            for each in opened:
                each.close()
        assert served.process.returncode is None


async def test_the_oldest_connections_without_a_call_give_way(
    launch: Launch, options: Make, redis_url: str, stand_in: Make
) -> None:
    orchestrator = await launch(options(redis_url, max_handshakes=20, handshake_timeout=60.0))
    agent = stand_in(orchestrator.address)
    await agent.ready()
    with connections(orchestrator.address, 30) as first:
        await asyncio.sleep(0.3)
        with connections(orchestrator.address, 20) as second:
            await until(lambda: all(map(ended, first)))
            assert not any(map(ended, second))
    assert (len(agent.opened), agent.failures) == (1, [])


async def test_one_address_has_a_share_of_the_connections(
    launch: Launch, options: Make, redis_url: str, stand_in: Make
) -> None:
    orchestrator = await launch(options(redis_url, max_connections_per_address=5, handshake_timeout=60.0))
    agent = stand_in(orchestrator.address)
    await agent.ready()
    with connections(orchestrator.address, 9, source="127.0.0.2") as other:
        with connections(orchestrator.address, 9) as own:
            await until(lambda: sum(map(ended, other)) == 4 and sum(map(ended, own)) == 5)
    assert (len(agent.opened), agent.failures) == (1, [])


async def test_connections_beyond_the_total_are_closed(launch: Launch, options: Make, redis_url: str) -> None:
    orchestrator = await launch(
        options(redis_url, max_connections=20, max_handshakes=20, max_connections_per_address=20)
    )
    with connections(orchestrator.address, 35) as opened:
        await until(lambda: sum(map(ended, opened)) >= 15)
        assert sum(map(ended, opened)) <= 20


async def test_a_process_with_hardly_any_descriptors_does_not_start(redis_url: str) -> None:
    command = (sys.executable, "-m", "orki_server", "serve", "--redis", redis_url, "--listen", "127.0.0.1:0")
    process = await asyncio.create_subprocess_exec(*limited(80), *command, stderr=asyncio.subprocess.PIPE)
    _, error = await process.communicate()
    assert process.returncode == 2
    assert b"the process may open 80 files" in error
    assert b"LimitNOFILE=" in error


# --- streams ---


async def test_a_stream_without_a_hello_ends_and_others_of_its_connection_are_bounded(
    launch: Launch, options: Make, redis_url: str
) -> None:
    orchestrator = await launch(options(redis_url, hello_timeout=1.0))
    async with open_channel(orchestrator.address) as channel:
        calls = [SessionServiceStub(channel).Connect() for _ in range(_sessions.HELLOS_PER_CONNECTION + 8)]
        errors = [await error_of(call) for call in calls]
    kinds = [type(each) for each in errors]
    assert kinds.count(Overloaded) == 8
    assert kinds.count(HelloTimeout) == _sessions.HELLOS_PER_CONNECTION


async def test_the_oldest_stream_without_a_hello_gives_way(
    launch: Launch, options: Make, redis_url: str, stand_in: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sessions, "_HELLOS", 4)
    orchestrator = await launch(options(redis_url, hello_timeout=60.0))
    async with open_channel(orchestrator.address) as channel:
        calls = [SessionServiceStub(channel).Connect() for _ in range(4)]
        await asyncio.sleep(0.3)
        agent = stand_in(orchestrator.address)
        await agent.ready()
        waits = [asyncio.create_task(error_of(call)) for call in calls]
        ended, open_ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        assert [type(each.result()) for each in ended] == [HelloTimeout]
        await asyncio.sleep(0.2)
        assert not any(each.done() for each in open_)
        for call in calls:
            call.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def error_of(call: Any) -> OrkiError:
    """Return why the orchestrator ended a session: a message of the session, or the status of the call."""
    try:
        async with asyncio.timeout(20):
            while isinstance(response := await call.read(), ConnectResponse):
                for message in response.messages:
                    if message.HasField("refused"):
                        return error_for(message.refused.failure.reason, message.refused.failure.message)
    except grpc.aio.AioRpcError as error:
        return typed_error(error, "it")
    raise AssertionError(f"the stream ended with {await call.code()}")


async def test_the_streams_of_a_connection_are_bounded(orchestrator: Orchestrator) -> None:
    host, _, port = orchestrator.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + SETTINGS)
    header = await reader.readexactly(9)
    body = await reader.readexactly(int.from_bytes(header[:3]))
    writer.close()
    settings = dict(struct.iter_unpack("!HI", body))
    assert settings[3] == 1_000  # SETTINGS_MAX_CONCURRENT_STREAMS, RFC 9113


# --- sizes ---


async def test_an_oversized_message_is_refused_and_bounded(redis_url: str) -> None:
    async with serve(redis_url) as served, grpc.aio.insecure_channel(served.address) as channel:
        before = served.peak_bytes()
        request = pb.SubmitRequest(submissions=[pb.Submission(method=DO, request=bytes(64 << 20))])
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await TaskServiceStub(channel).Submit(request, timeout=20)
            assert isinstance(typed_error(caught.value, "it"), TooLarge)
        assert served.peak_bytes() - before < 32 << 20


@pytest.mark.parametrize("method", ["Submit", "Connect"])
async def test_a_compressed_message_is_refused_before_it_is_inflated(redis_url: str, method: str) -> None:
    """256 MiB of zeros are 256 KiB of gzip, which no limit on the size of messages stops."""
    name = {"Submit": "/orki.control.v1.TaskService/Submit", "Connect": "/orki.control.v1.SessionService/Connect"}
    options = [("grpc.max_send_message_length", -1)]
    async with serve(redis_url) as served:
        async with grpc.aio.insecure_channel(served.address, options, grpc.Compression.Gzip) as channel:
            before = served.peak_bytes()
            call: Any = channel.unary_unary(name[method])(bytes(256 << 20), timeout=30)
            assert (await call.code(), "gzip" in await call.details()) == (grpc.StatusCode.UNIMPLEMENTED, True)
            assert served.peak_bytes() - before < 32 << 20


async def test_large_metadata_is_refused(orchestrator: Orchestrator) -> None:
    async with open_channel(orchestrator.address) as channel:
        large = [(f"x-{number}", "v" * 8_000) for number in range(8)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await TaskServiceStub(channel).List(pb.ListRequest(), metadata=large, timeout=10)
        assert isinstance(typed_error(caught.value, "it"), TooLarge)
