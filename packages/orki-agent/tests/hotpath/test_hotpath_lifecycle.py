"""Lifecycle: stop, loss, reconnection, kill and fork."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from hotpath_tools import (
    ASYNC_SLEEP,
    ECHO,
    SLEEP,
    TOKEN,
    WHO,
    Ask,
    AsyncSampleTools,
    RawPeer,
    SampleTools,
    echo_frame,
    open_descriptors,
    serving_process,
    until,
)

import orki_contract as oc
from orki_agent.hotpath import AsyncToolClient, BridgeOptions, SyncToolClient, ToolBridge, ToolClientOptions
from orki_agent.hotpath.frames import FrameDecoder, decode_error, encode_reply, encode_welcome
from orki_contract.errors import (
    Draining,
    LocalProtocolError,
    OrkiError,
    PeerLost,
    PeerRefused,
    RemoteProtocolError,
    ToolCancelled,
    ToolDeadline,
)

from orki.hotpath.v1.tool_orki import WelcomeFrame  # isort: skip


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="orki-test-") as made:
        yield str(Path(made) / "tools")


def in_thread(client: SyncToolClient, tool: oc.Tool, request: object, outcome: list[object]) -> threading.Thread:  # type: ignore[type-arg]
    def call() -> None:
        try:
            outcome.append(client.call(tool, request, timeout=30))
        except OrkiError as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize("tool", [SLEEP, ASYNC_SLEEP])
def test_a_stopping_bridge_finishes_calls_and_refuses_new_ones(tool: oc.Tool) -> None:  # type: ignore[type-arg]
    tools = SampleTools()
    bridge = ToolBridge(tools, AsyncSampleTools()).start()
    outcome: list[object] = []
    with SyncToolClient(bridge.path, bridge.token, name="x") as client, RawPeer(bridge) as peer:
        client.call(ECHO, Ask(1, 2))
        thread = in_thread(client, tool, Ask(500, 9), outcome)
        running = bridge._running
        assert running is not None
        until(lambda: any(connection.machine.calls for connection in running.monitor.connections))
        stopping = threading.Thread(target=bridge.stop)
        stopping.start()
        until(
            lambda: (
                running.state.draining
                and all(each.machine.state.name == "DRAINING" for each in running.monitor.connections)
            )
        )
        peer.send(echo_frame(1))
        refused = peer.frame()
        assert refused is not None
        assert isinstance(decode_error(refused), Draining)
        thread.join()
        stopping.join()
        assert outcome == [Ask(500, 9)]
        with pytest.raises(PeerLost) as lost:
            client.call(ECHO, Ask(1, 2))
        assert not lost.value.fully_written


@pytest.mark.parametrize("tool", [SLEEP, ASYNC_SLEEP])
def test_calls_that_outlast_the_stop_timeout_are_cancelled(tool: oc.Tool) -> None:  # type: ignore[type-arg]
    blocking, waiting = SampleTools(), AsyncSampleTools()
    bridge = ToolBridge(blocking, waiting, options=BridgeOptions(stop_timeout=0.1)).start()
    outcome: list[object] = []
    with SyncToolClient(bridge.path, bridge.token, name="x") as client:
        thread = in_thread(client, tool, Ask(20_000, 0), outcome)
        running = bridge._running
        assert running is not None
        until(lambda: any(connection.machine.calls for connection in running.monitor.connections))
        start = time.monotonic()
        bridge.stop()
        assert time.monotonic() - start < 10
        thread.join()
        assert [type(each) for each in outcome] == [ToolCancelled]
        assert (blocking if tool is SLEEP else waiting).cancelled.wait(10)


def test_a_handler_that_never_returns_does_not_block_the_stop() -> None:
    class Stubborn(SampleTools):
        def sleep(self, request: Ask, call: oc.ToolCall) -> Ask:
            self.release.wait()
            return request

    tools = Stubborn()
    bridge = ToolBridge(tools, options=BridgeOptions(stop_timeout=0.05)).start()
    with SyncToolClient(bridge.path, bridge.token, name="x") as client:
        with pytest.raises(ToolDeadline):
            client.call(SLEEP, Ask(1, 0), timeout=0.05)
        start = time.monotonic()
        bridge.stop()
        assert time.monotonic() - start < 10
    tools.release.set()


async def test_both_clients_reconnect_after_a_restart_of_the_bridge(path: str) -> None:
    with SyncToolClient(path, TOKEN, name="x") as client:
        async with _unconnected(path) as other:
            for _ in range(3):
                with ToolBridge(SampleTools(), path=path, token=TOKEN):
                    assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
                    assert await other.call(ECHO, Ask(1, 2)) == Ask(1, 2)
                with pytest.raises(PeerLost, match="no tool bridge") as lost:
                    client.call(ECHO, Ask(1, 2))
                assert not lost.value.fully_written
                with pytest.raises(PeerLost) as lost:
                    await other.call(ECHO, Ask(1, 2))
                assert not lost.value.fully_written
            with ToolBridge(SampleTools(), path=path, token=bytes(32)):
                with pytest.raises(PeerRefused):
                    client.call(ECHO, Ask(1, 2))
                with pytest.raises(PeerRefused):
                    await other.call(ECHO, Ask(1, 2))


class _unconnected:
    """An async client that connects at its first call."""

    def __init__(self, path: str) -> None:
        self.client = AsyncToolClient(path, TOKEN, name="x")

    async def __aenter__(self) -> AsyncToolClient:
        return self.client

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()


async def test_a_killed_bridge_ends_every_call_with_peer_lost(path: str) -> None:
    process = serving_process(path)
    outcome: list[object] = []
    with SyncToolClient(path, TOKEN, name="x") as client:
        client.call(ECHO, Ask(1, 2))
        thread = in_thread(client, SLEEP, Ask(20_000, 0), outcome)
        async with AsyncToolClient(path, TOKEN, name="x") as other:
            pending = [asyncio.create_task(other.call(ASYNC_SLEEP, Ask(20_000, 0), timeout=30)) for _ in range(5)]
            async with asyncio.timeout(20):
                while client._idle or other._transport is None or len(other._transport.machine.calls) < 5:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            process.kill()
            ended = await asyncio.gather(*pending, return_exceptions=True)
        thread.join()
    process.wait()
    for error in [*ended, *outcome]:
        assert isinstance(error, PeerLost)
        assert error.fully_written


class _DeafBridge:
    """A bridge that welcomes each client and reads nothing after the hello, or sends one answer to anything."""

    def __init__(self, path: str, *, close_after: float = 0.0, answer: bytes = b"") -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.close_after = close_after
        self.answer = answer
        self.held: list[socket.socket] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.held.append(sock)
            decoder = FrameDecoder(1 << 20)
            while decoder.next_frame(sock.recv_into(decoder.writable())) is None:
                pass
            sock.sendall(encode_welcome(WelcomeFrame(max_frame_bytes=1 << 26, max_calls=8, protocol=1)))
            if self.answer:
                sock.recv(1)
                sock.sendall(self.answer)
            if self.close_after:
                time.sleep(self.close_after)
                sock.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()
        for sock in self.held:
            sock.close()


async def test_peer_lost_reports_whether_the_request_was_written(path: str) -> None:
    deaf = _DeafBridge(path, close_after=0.3)
    large = Ask(1, 2, bytes(8 << 20))
    try:
        with SyncToolClient(path, TOKEN, name="x") as client:
            with pytest.raises(PeerLost) as lost:
                await asyncio.to_thread(client.call, ECHO, large)
            assert not lost.value.fully_written
            with pytest.raises(PeerLost) as lost:
                await asyncio.to_thread(client.call, ECHO, Ask(1, 2))
            assert lost.value.fully_written
        async with AsyncToolClient(path, TOKEN, name="x") as other:
            first = asyncio.create_task(other.call(ECHO, Ask(1, 2)))
            await asyncio.sleep(0)
            second = asyncio.create_task(other.call(ECHO, large))
            for task, written in ((first, True), (second, False)):
                with pytest.raises(PeerLost) as lost:
                    await task
                assert lost.value.fully_written is written
    finally:
        deaf.close()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_reply_of_another_tool_ends_the_call_and_the_connection(path: str) -> None:
    fake = _DeafBridge(path, answer=encode_reply(0x0102, 16, 1, 2, Ask(1, 2).encode()))
    try:
        for number in range(2):
            async with AsyncToolClient(path, TOKEN, name="x") as client:
                client._transport.checked.add(ECHO.contract.service)  # type: ignore[union-attr]
                if number:
                    client._transport._last = 1  # type: ignore[union-attr]
                async with asyncio.timeout(10):
                    with pytest.raises(RemoteProtocolError, match="opcode 0x0102" if number else "unknown call 2"):
                        await client.call(ECHO, Ask(1, 2))
                assert not client._transport.alive  # type: ignore[union-attr]
    finally:
        fake.close()


async def test_a_call_to_a_bridge_that_does_not_read_ends_at_its_deadline(path: str) -> None:
    deaf = _DeafBridge(path)
    try:
        for request in (Ask(1, 2), Ask(1, 2, bytes(8 << 20))):
            with SyncToolClient(path, TOKEN, name="x") as client:
                start = time.monotonic()
                with pytest.raises(ToolDeadline):
                    client.call(ECHO, request, timeout=0.1)
                assert 0.09 < time.monotonic() - start < 5
            async with AsyncToolClient(path, TOKEN, name="x") as other:
                with pytest.raises(ToolDeadline):
                    await other.call(ECHO, request, timeout=0.1)
    finally:
        deaf.close()


async def test_connecting_fails_without_a_bridge_or_an_answer(path: str) -> None:
    options = ToolClientOptions(connect_timeout=0.2)
    for _ in range(2):
        with SyncToolClient(path, TOKEN, name="x", options=options) as client, pytest.raises(PeerLost, match="no tool"):
            client.call(ECHO, Ask(1, 2))
        with pytest.raises(PeerLost, match="no tool"):
            await AsyncToolClient(path, TOKEN, name="x", options=options).connect()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with SyncToolClient(path, TOKEN, name="x", options=options) as client:
            with pytest.raises(PeerLost, match="did not answer"):
                client.call(ECHO, Ask(1, 2))
            with pytest.raises(PeerLost, match="did not answer in time"):
                await AsyncToolClient(path, TOKEN, name="x", options=options).connect()
            # The kernel's queue is full: Linux reports EAGAIN, and the socket cannot be polled.
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.setblocking(False)
                waiting.connect_ex(path)
                with pytest.raises(PeerLost):
                    client.call(ECHO, Ask(1, 2))
                with pytest.raises(PeerLost):
                    await AsyncToolClient(path, TOKEN, name="x", options=options).connect()


async def test_a_cancelled_connection_attempt_leaves_the_client_usable(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        client = AsyncToolClient(path, TOKEN, name="x")
        calls = [asyncio.create_task(client.call(ECHO, Ask(1, 2))) for _ in range(2)]
        await asyncio.sleep(0.02)
        calls[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[0]
        assert not calls[1].done()
        await client.close()
        with pytest.raises(PeerLost, match="closed") as lost:
            await calls[1]
        assert not lost.value.fully_written


def _forked(work: object) -> int:
    """Return the exit code of a forked child that runs `work`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_sync_client_opens_new_connections_in_a_forked_child(bridge: ToolBridge) -> None:
    with SyncToolClient(bridge.path, bridge.token, name="x") as client:
        assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
        [transport] = client._transports

        def child() -> int:
            assert client._idle == []
            assert not transport.usable
            assert client.call(ECHO, Ask(3, 4)) == Ask(3, 4)
            return 0

        assert _forked(child) == 0
        assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
        assert list(client._transports) == [transport]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_an_async_client_refuses_calls_in_a_forked_child(bridge: ToolBridge) -> None:
    async with AsyncToolClient(bridge.path, bridge.token, name="x") as client:
        assert await client.call(ECHO, Ask(1, 2)) == Ask(1, 2)

        def child() -> int:
            try:
                client.call(ECHO, Ask(1, 2)).send(None)
            except LocalProtocolError as error:
                return 0 if "before a fork" in str(error) else 1
            return 2

        assert _forked(child) == 0
        assert await client.call(ECHO, Ask(1, 2)) == Ask(1, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_releases_its_parents_bridge(path: str) -> None:
    ours, theirs = os.pipe()
    heard, told = os.pipe()
    with ToolBridge(SampleTools(), path=path, token=TOKEN):
        child = os.fork()
        if child == 0:
            os.close(theirs)
            os.write(told, b"!")
            os.read(ours, 1)
            os._exit(0)
        assert os.read(heard, 1) == b"!", "the fork hooks have run in the child"
    try:
        with ToolBridge(SampleTools(), path=path, token=TOKEN) as bridge:
            with SyncToolClient(bridge.path, TOKEN, name="x") as client:
                assert client.call(WHO, StringValue()) == StringValue(value="x||")
    finally:
        os.close(theirs)
        os.waitpid(child, 0)
        for descriptor in (ours, heard, told):
            os.close(descriptor)


def test_restarts_leak_no_descriptors(path: str) -> None:
    before = open_descriptors()
    for _ in range(20):
        with ToolBridge(SampleTools(), AsyncSampleTools(), path=path, token=TOKEN):
            with SyncToolClient(path, TOKEN, name="x") as client:
                client.call(ECHO, Ask(1, 2))

            async def call() -> None:
                async with AsyncToolClient(path, TOKEN, name="x") as other:
                    await other.call(ECHO, Ask(1, 2))

            asyncio.run(call())
    until(lambda: open_descriptors() <= before)
    assert open_descriptors() <= before
