"""What one task costs on its way through an orchestrator: script calls and messages."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from google.protobuf.wrappers_pb2 import BytesValue

from orki_contract import Task
from orki_control import Client
from orki_control.session import ArrivedOffer
from orki_server._orchestrator import Orchestrator

Make = Callable[..., Any]
DO: Task[Any, Any, Any, Any] = Task.declare("servertests.v1.WorkService/Do", request=BytesValue, response=BytesValue)
TASKS = 30
OPERATION = re.compile('"(submit|offer|accept|succeed|read)" "[0-9]+" "')


@pytest.fixture
def calls(redis_url: str) -> Iterator[Callable[[], list[str]]]:
    """Returns the operations of each script call of tasks so far."""
    where = urlsplit(redis_url)
    found: list[str] = []
    with socket.create_connection((where.hostname, where.port)) as monitor:
        monitor.sendall(b"MONITOR\r\n")
        monitor.settimeout(0.1)
        left = b""

        def read() -> list[str]:
            nonlocal left
            with contextlib.suppress(TimeoutError):
                while data := monitor.recv(1 << 20):
                    left += data
            *lines, left = left.split(b"\r\n")
            for line in lines:
                if b'] "EVALSHA" "' in line or b'] "EVAL" "' in line:
                    found.append(" ".join(OPERATION.findall(line.decode(errors="replace"))))
            found[:] = [each for each in found if each]
            return found

        yield read


async def test_a_task_alone_needs_two_script_calls(
    orchestrator: Orchestrator, stand_in: Make, calls: Callable[[], list[str]]
) -> None:
    agent = stand_in(orchestrator.address)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        await client.call(DO, BytesValue(value=b"first"), timeout=10)
        before = len(calls())
        for _ in range(TASKS):
            await client.call(DO, BytesValue(value=b"x"), timeout=10)
    found = calls()[before:]
    # The process may be too slow once to answer in the same moment.
    assert found.count("submit offer") >= TASKS * 0.9, found
    assert found.count("succeed") >= TASKS * 0.9, found
    assert len(found) <= TASKS * 2.2, found


async def test_a_task_whose_handler_needs_time_is_started_at_once(
    orchestrator: Orchestrator, stand_in: Make, calls: Callable[[], list[str]]
) -> None:
    release = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await release.wait()
        return b""

    agent = stand_in(orchestrator.address, handler=handler)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        handle = await client.submit(DO, BytesValue(value=b"x"))
        async with asyncio.timeout(1.0):
            while "accept" not in calls():
                await asyncio.sleep(0.01)
        release.set()
        await handle.result(10)


async def test_tasks_of_a_batch_are_offered_with_it(
    orchestrator: Orchestrator, stand_in: Make, calls: Callable[[], list[str]]
) -> None:
    agent = stand_in(orchestrator.address, slots=8)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        await client.call(DO, BytesValue(value=b"first"), timeout=10)
        before = len(calls())
        handles = await client.submit_many(DO, [BytesValue(value=b"x")] * 8)
        for handle in handles:
            await handle.result(10)
    found = calls()[before:]
    assert any(each.startswith("submit submit") and each.endswith("offer") for each in found), found


async def test_a_task_that_no_agent_may_take_is_not_asked_for(
    orchestrator: Orchestrator, stand_in: Make, calls: Callable[[], list[str]]
) -> None:
    release = asyncio.Event()

    async def handler(offer: ArrivedOffer) -> bytes:
        await release.wait()
        return b""

    agent = stand_in(orchestrator.address, handler=handler, slots=1)
    await agent.ready()
    async with Client(orchestrator.address) as client:
        first = await client.submit(DO, BytesValue(value=b"x"))
        await agent.until(lambda: bool(agent.offers))
        before = len(calls())
        second = await client.submit(DO, BytesValue(value=b"x"))
        assert "submit offer" not in calls()[before:]
        release.set()
        await first.result(10)
        await second.result(10)
