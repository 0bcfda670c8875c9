"""Calls through both clients: results, order, traces, records and errors."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from hotpath_tools import (
    ASYNC_SLEEP,
    ASYNC_WHO,
    ECHO,
    FAIL,
    GROW,
    SLEEP,
    TEXT,
    UNSERVED,
    WHO,
    Ask,
    AsyncSampleTools,
    SampleTools,
    until,
)

import orki_contract as oc
from orki.errors.v1.errors_pb2 import Reason
from orki_agent.hotpath import AsyncToolClient, BridgeOptions, SyncToolClient, ToolBridge, ToolClientOptions, ToolRecord
from orki_contract.errors import (
    FrameMalformed,
    FrameTooLarge,
    InvalidArgument,
    InvalidResponse,
    LocalProtocolError,
    OrkiError,
    PeerLost,
    ToolDeadline,
    ToolFailed,
    TooManyCalls,
    UnknownOpcode,
)
from orki_contract.trace import new_span, use_span


class Either:
    """The sync or the async client behind one interface."""

    def __init__(self, bridge: ToolBridge, kind: str, records: list[ToolRecord]) -> None:
        self.kind = kind
        self.sync = SyncToolClient(bridge.path, bridge.token, name="tester", on_call=records.append)
        self.loop = AsyncToolClient(bridge.path, bridge.token, name="tester", on_call=records.append)

    async def call(self, tool: oc.Tool, request: object, timeout: float | None = None) -> object:  # type: ignore[type-arg]
        if self.kind == "async":
            return await self.loop.call(tool, request, timeout=timeout)
        with_span = asyncio.to_thread(self.sync.call, tool, request, timeout=timeout)
        return await with_span

    async def close(self) -> None:
        self.sync.close()
        await self.loop.close()


@pytest.fixture
def records() -> list[ToolRecord]:
    return []


@pytest.fixture(params=["sync", "async"])
async def either(
    request: pytest.FixtureRequest, bridge: ToolBridge, records: list[ToolRecord]
) -> AsyncIterator[Either]:
    made = Either(bridge, request.param, records)
    yield made
    await made.close()
    # `asyncio.to_thread` uses this loop's executor.
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_frames_and_messages_are_returned(either: Either) -> None:
    assert await either.call(ECHO, Ask(7, -9, b"\0\xff")) == Ask(7, -9, b"\0\xff")
    assert await either.call(TEXT, StringValue(value="grüße")) == StringValue(value="grüße")
    assert await either.call(ASYNC_SLEEP, Ask(1, 2, b"x")) == Ask(1, 2, b"x")
    assert await either.call(TEXT, StringValue()) == StringValue()


@pytest.mark.parametrize("size", [65_536 - 72 - 1, 65_536 - 72, 65_536 - 72 + 1, 200_000, 5_000_000])
async def test_large_frames_are_returned_complete(either: Either, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert await either.call(ECHO, Ask(1, 2, body)) == Ask(1, 2, body)
    assert await either.call(GROW, Ask(size, 0)) == Ask(size, 0, b"g" * size)


async def test_a_handler_runs_in_the_callers_span(either: Either) -> None:
    span = new_span()
    for tool in (WHO, ASYNC_WHO):
        with use_span(span):
            inside = await either.call(tool, StringValue())
        assert inside == StringValue(value=f"tester|{span.traceparent}|{span.traceparent}")
        assert await either.call(tool, StringValue()) == StringValue(value="tester||")


async def test_errors_are_typed_and_carry_the_tools_code(
    either: Either, caplog: pytest.LogCaptureFixture, records: list[ToolRecord]
) -> None:
    with pytest.raises(ToolFailed, match="no such file") as failed:
        await either.call(FAIL, StringValue(value="code"))
    assert failed.value.code == -7
    with pytest.raises(InvalidArgument, match="path is empty"):
        await either.call(FAIL, StringValue(value="argument"))
    with pytest.raises(ToolFailed) as cut:
        await either.call(FAIL, StringValue(value="long"))
    assert cut.value.message == "ä" * 1_000
    with pytest.raises(ToolFailed):
        await either.call(FAIL, StringValue(value="surrogate"))
    with pytest.raises(UnknownOpcode, match="0x0999 is not served here; served are 0x0101"):
        await either.call(UNSERVED, Ask(1, 2))
    with pytest.raises(InvalidResponse, match="returned Ask instead of StringValue"):
        await either.call(FAIL, StringValue(value="no such way"))
    with pytest.raises(InvalidResponse, match="cannot be encoded"):
        await either.call(WRONG_VALUE, StringValue())
    assert caplog.records == []
    assert [record.tool_code for record in records][:2] == [-7, 0]
    assert records[0].reason == Reason.REASON_TOOL_FAILED
    assert await either.call(ECHO, Ask(1, 2)) == Ask(1, 2)


WRONG_VALUE = oc.Tool.declare(
    "test.hotpath.v1.WrongToolService/Wrong", opcode=0x0301, request=StringValue, response=Ask
)


class WrongTools(oc.SyncToolService):
    TOOLS = (WRONG_VALUE,)

    def wrong(self, request: StringValue, call: oc.ToolCall) -> Ask:
        return Ask(-1, 0)


@pytest.fixture
def bridge() -> object:
    with ToolBridge(SampleTools(), AsyncSampleTools(), WrongTools()) as running:
        yield running


@pytest.mark.parametrize("way", ["bug", "exit", "nested"])
async def test_an_unexpected_error_is_sent_without_a_traceback(
    either: Either, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    with caplog.at_level(logging.ERROR, "orki_agent.hotpath"), pytest.raises(ToolFailed) as failed:
        await either.call(FAIL, StringValue(value=way))
    assert "Traceback" not in str(failed.value)
    assert ".py" not in str(failed.value)
    assert failed.value.code == 0
    assert [bool(record.exc_info) for record in caplog.records] == [True]


async def test_an_invalid_request_is_refused_by_the_client(either: Either) -> None:
    for wrong in (Ask(1, 2), None, "text"):
        with pytest.raises(InvalidArgument, match="takes google.protobuf.wrappers_pb2.StringValue, not"):
            await either.call(TEXT, wrong)
    with pytest.raises(FrameMalformed):
        await either.call(ECHO, Ask(-1, 2))
    for timeout in (0, -1, 5_000, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="timeout"):
            await either.call(ECHO, Ask(1, 2), timeout=timeout)
    with pytest.raises(FrameTooLarge, match="the maximum is"):
        await either.call(ECHO, Ask(1, 2, bytes(17 << 20)))
    with pytest.raises(FrameTooLarge, match="the reply of"):
        await either.call(GROW, Ask(17 << 20, 0))
    assert await either.call(ECHO, Ask(1, 2)) == Ask(1, 2)


@pytest.mark.parametrize("tool", [SLEEP, ASYNC_SLEEP])
async def test_a_deadline_ends_the_call_and_cancels_the_handler(tool: oc.Tool, records: list[ToolRecord]) -> None:  # type: ignore[type-arg]
    blocking, waiting = SampleTools(), AsyncSampleTools()
    with ToolBridge(blocking, waiting) as bridge:
        for kind in ("sync", "async"):
            blocking.cancelled.clear()
            waiting.cancelled.clear()
            either = Either(bridge, kind, records)
            start = time.monotonic()
            with pytest.raises(ToolDeadline):
                await either.call(tool, Ask(20_000, 0), timeout=0.05)
            assert time.monotonic() - start < 10
            told = (blocking if tool is SLEEP else waiting).cancelled
            assert await asyncio.to_thread(told.wait, 10)
            assert await either.call(ECHO, Ask(1, 2)) == Ask(1, 2)
            await either.close()
    assert records[0].reason == Reason.REASON_TOOL_DEADLINE
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_the_contracts_timeout_is_the_default(either: Either) -> None:
    start = time.monotonic()
    with pytest.raises(ToolDeadline):
        await either.call(ASYNC_SLEEP, Ask(20_000, 0))
    assert 0.9 < time.monotonic() - start < 10


async def test_late_replies_are_dropped(either: Either) -> None:
    for _ in range(12):
        with pytest.raises(ToolDeadline):
            await either.call(SLEEP, Ask(30, 0), timeout=0.002)
        assert await either.call(ECHO, Ask(1, 2)) == Ask(1, 2)


@pytest.mark.parametrize("tool", [SLEEP, ASYNC_SLEEP])
async def test_cancelling_the_task_cancels_the_call(tool: oc.Tool) -> None:  # type: ignore[type-arg]
    blocking, waiting = SampleTools(), AsyncSampleTools()
    records: list[ToolRecord] = []
    with ToolBridge(blocking, waiting) as bridge:
        async with AsyncToolClient(bridge.path, bridge.token, name="tester", on_call=records.append) as client:
            task = asyncio.create_task(client.call(tool, Ask(20_000, 0), timeout=30))
            async with asyncio.timeout(20):
                while not blocking.sleeping and not waiting.begun.is_set():
                    await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            told = (blocking if tool is SLEEP else waiting).cancelled
            assert await asyncio.to_thread(told.wait, 10)
            assert await client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
    assert records[0].reason == Reason.REASON_TOOL_CANCELLED
    await asyncio.get_running_loop().shutdown_default_executor()


def test_losing_the_caller_cancels_its_calls() -> None:
    tools = SampleTools()
    with ToolBridge(tools) as bridge:
        client = SyncToolClient(bridge.path, bridge.token, name="tester")
        failed: list[BaseException] = []

        def call() -> None:
            try:
                client.call(SLEEP, Ask(20_000, 0), timeout=30)
            except OrkiError as error:
                failed.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        until(lambda: tools.sleeping == 1)
        for transport in tuple(client._transports):
            transport._sock.shutdown(2)
        thread.join()
        client.close()
        assert tools.cancelled.wait(10)
    assert [type(error) for error in failed] == [PeerLost]


async def test_a_blocking_handler_delays_no_other_call() -> None:
    tools = SampleTools()
    with ToolBridge(tools) as bridge:
        async with AsyncToolClient(bridge.path, bridge.token, name="tester") as client:
            # The handlers sleep until the quick calls are done.
            sleeping = [asyncio.create_task(client.call(SLEEP, Ask(9_000, 0))) for _ in range(8)]
            async with asyncio.timeout(8):
                while tools.sleeping < 8:  # all at the same time
                    await asyncio.sleep(0.01)
            for number in range(50):
                assert await client.call(ECHO, Ask(number, 0)) == Ask(number, 0)
            with SyncToolClient(bridge.path, bridge.token, name="other") as other:
                assert other.call(ECHO, Ask(1, 2)) == Ask(1, 2)
            assert tools.sleeping == 8
            tools.release.set()
            await asyncio.gather(*sleeping)


def test_other_connections_work_while_all_threads_block() -> None:
    """Beyond `max_blocked`, only the connection of the blocking handler waits."""
    tools = SampleTools()
    with ToolBridge(tools, options=BridgeOptions(max_blocked=1)) as bridge:
        clients = [SyncToolClient(bridge.path, bridge.token, name=str(number)) for number in range(3)]
        threads = [threading.Thread(target=each.call, args=(SLEEP, Ask(9_000, 0))) for each in clients]
        for thread in threads:
            thread.start()
        until(lambda: tools.sleeping == 3)
        with SyncToolClient(bridge.path, bridge.token, name="other") as other:
            for number in range(100):
                assert other.call(ECHO, Ask(number, 0)) == Ask(number, 0)
            with pytest.raises(ToolDeadline):
                other.call(SLEEP, Ask(9_000, 0), timeout=0.05)
        tools.release.set()
        for thread in threads:
            thread.join()
        for client in clients:
            assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
            client.close()


def test_a_tool_that_is_quick_again_runs_inline_again(bridge: ToolBridge) -> None:
    with SyncToolClient(bridge.path, bridge.token, name="tester") as client:
        assert bridge._running is not None
        tool = bridge._running.state.tools[SLEEP.contract.opcode]
        client.call(SLEEP, Ask(100, 0))
        assert tool.detached
        until(lambda: client.call(SLEEP, Ask(0, 0)) == Ask(0, 0) and not tool.detached)
        assert client.call(SLEEP, Ask(0, 0)) == Ask(0, 0)


async def test_replies_may_arrive_in_any_order(bridge: ToolBridge) -> None:
    async with AsyncToolClient(bridge.path, bridge.token, name="tester") as client:
        order: list[int] = []

        async def nap(number: int) -> None:
            assert await client.call(ASYNC_SLEEP, Ask(number, number)) == Ask(number, number)
            order.append(number)

        await asyncio.gather(*(nap(number) for number in (200, 100, 1)))
        assert order == [1, 100, 200]
        many = await asyncio.gather(*(client.call(ECHO, Ask(number, 0)) for number in range(1_000)))
        assert [each.number for each in many] == list(range(1_000))


def test_threads_may_share_a_client(bridge: ToolBridge) -> None:
    options = ToolClientOptions(max_connections=3)
    with SyncToolClient(bridge.path, bridge.token, name="tester", options=options) as client:
        wrong: list[object] = []

        def calls(thread: int) -> None:
            for number in range(200):
                if client.call(ECHO, Ask(number, thread)) != Ask(number, thread):
                    wrong.append((thread, number))

        threads = [threading.Thread(target=calls, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(client._transports) <= 3


async def test_records_describe_each_call(either: Either, records: list[ToolRecord]) -> None:
    span = new_span()
    with use_span(span):
        await either.call(ECHO, Ask(1, 2, b"abc"))
    with pytest.raises(FrameMalformed):
        await either.call(ECHO, Ask(-1, 2))
    good, bad = records
    assert (good.method, good.request_bytes, good.reply_bytes) == ("test.hotpath.v1.SampleToolService/Echo", 19, 19)
    assert (good.reason, good.tool_code, good.span) == (0, 0, span)
    assert 0 < good.duration_ns < 20_000_000_000
    assert (bad.request_bytes, bad.reply_bytes, bad.reason) == (0, 0, Reason.REASON_FRAME_MALFORMED)


async def test_async_calls_beyond_the_limit_wait_and_fail_at_their_deadline() -> None:
    options, tools = ToolClientOptions(max_calls=2, max_waiting=1), SampleTools()
    with ToolBridge(tools) as bridge:
        async with AsyncToolClient(bridge.path, bridge.token, name="tester", options=options) as client:
            busy = [asyncio.create_task(client.call(SLEEP, Ask(9_000, 0))) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(TooManyCalls, match="nothing was sent"):
                await client.call(ECHO, Ask(1, 2), timeout=0.02)
            waiting = asyncio.create_task(client.call(ECHO, Ask(1, 2)))
            await asyncio.sleep(0)
            with pytest.raises(TooManyCalls, match="which is the maximum"):
                await client.call(ECHO, Ask(1, 2))
            tools.release.set()
            assert await waiting == Ask(1, 2)
            await asyncio.gather(*busy)


def test_sync_calls_beyond_the_limit_wait_and_fail_at_their_deadline() -> None:
    options, tools = ToolClientOptions(max_connections=1), SampleTools()
    with (
        ToolBridge(tools) as bridge,
        SyncToolClient(bridge.path, bridge.token, name="tester", options=options) as client,
    ):
        thread = threading.Thread(target=client.call, args=(SLEEP, Ask(9_000, 0)))
        thread.start()
        until(lambda: tools.sleeping == 1)
        with pytest.raises(TooManyCalls, match="nothing was sent"):
            client.call(ECHO, Ask(1, 2), timeout=0.02)
        threading.Timer(0.05, tools.release.set).start()
        assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
        thread.join()


def test_the_bridge_refuses_calls_beyond_its_limit() -> None:
    with ToolBridge(SampleTools(), options=BridgeOptions(max_calls=1)) as bridge:
        with SyncToolClient(bridge.path, bridge.token, name="tester") as client:
            assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
            with pytest.raises(ToolDeadline):
                client.call(SLEEP, Ask(400, 0), timeout=0.02)
            until(lambda: _answers(client))


def _answers(client: SyncToolClient) -> bool:
    try:
        return client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
    except TooManyCalls:
        return False


@pytest.mark.parametrize("connected", [True, False])
async def test_a_closed_client_refuses_calls(bridge: ToolBridge, connected: bool) -> None:
    client = AsyncToolClient(bridge.path, bridge.token, name="tester")
    other = SyncToolClient(bridge.path, bridge.token, name="tester")
    if connected:
        await client.connect()
        other.call(ECHO, Ask(1, 2))
    pending = asyncio.create_task(client.call(ASYNC_SLEEP, Ask(5_000, 0)))
    # The call is in progress or waits for the connection.
    await asyncio.sleep(0)
    await client.close()
    other.close()
    with pytest.raises(PeerLost):
        await pending
    assert not pending.cancelled()
    for _ in range(2):
        with pytest.raises(LocalProtocolError, match="closed"):
            await client.call(ECHO, Ask(1, 2))
        with pytest.raises(LocalProtocolError, match="closed"):
            other.call(ECHO, Ask(1, 2))
        await client.close()
        other.close()


def test_an_async_client_serves_one_event_loop(bridge: ToolBridge) -> None:
    async def call(client: AsyncToolClient) -> object:
        return await client.call(ECHO, Ask(1, 2))

    async def with_two_loops(run: Callable[[AsyncToolClient], object]) -> None:
        async with AsyncToolClient(bridge.path, bridge.token, name="tester") as client:
            await asyncio.to_thread(run, client)
        await asyncio.get_running_loop().shutdown_default_executor()

    def elsewhere(client: AsyncToolClient) -> None:
        with pytest.raises(LocalProtocolError, match="one event loop"):
            asyncio.run(call(client))

    asyncio.run(with_two_loops(elsewhere))
    assert bridge.path
