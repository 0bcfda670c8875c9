"""Handlers in child processes: they end, whatever their code does, and leave nothing behind."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from orki.control.v1 import session_pb2 as pb
from orki_agent import Agent, Subprocess, _child, _subprocess
from orki_agent._events import AgentEvents
from orki_contract.errors import HandlerFailed, InvalidSetting, Reason
from orki_contract.trace import parse_traceparent

MODULE = """
import ctypes, importlib.util, logging, os, subprocess, sys, time
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent, HandlerRejected, Subprocess, _child
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import AsyncToolService, Tool
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Cruncher(work.GrindServiceSyncBase):
    def work(self, request, ctx):
        return getattr(self, request.text)(request, ctx)

    def pid(self, request, ctx):
        return work.WorkResponse(text=str(os.getpid()))

    def talks(self, request, ctx):
        for number in range(1, 301):
            ctx.progress(work.WorkProgress(number=number))
        ctx.usage(model="m", input_tokens=1, output_tokens=2)
        logging.getLogger("cruncher").warning("attempt %d", ctx.attempt)
        for directive in ctx.directives():
            return work.WorkResponse(text=directive.text)

    def looks(self, request, ctx):
        ctx.progress(work.WorkProgress(number=os.getpid()))
        while True:
            ctx.raise_if_cancelled()
            time.sleep(0.01)

    def holds(self, request, ctx):
        # A call through PyDLL keeps the interpreter lock.
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        ctx.progress(work.WorkProgress(number=os.getpid()))
        ctx.progress(work.WorkProgress(number=program.pid))
        time.sleep(0.3)
        ctypes.PyDLL(None).sleep(600)

    def sleeps(self, request, ctx):
        ctx.progress(work.WorkProgress(number=os.getpid()))
        time.sleep(600)

    def stops(self, request, ctx):
        os.kill(os.getpid(), 19)

    def calls(self, request, ctx):
        response = ctx.tools(Client).read(work.WorkRequest(text="a.py"))
        ctx.publish(USAGE, UsageEvent(model="m"))
        return response

    def crashes(self, request, ctx):
        ctypes.string_at(0)

    def exits(self, request, ctx):
        os._exit(3)

    def rejects(self, request, ctx):
        raise HandlerRejected("no such number")

    def confuses(self, request, ctx):
        return "text"

    def scribbles(self, request, ctx):
        for each in os.listdir("/proc/self/fd"):
            try:
                if int(each) > 2:
                    os.write(int(each), b"\\x00\\x00\\x00\\x05hello")
            except OSError:
                pass
        time.sleep(600)

TOOL = Tool.declare(
    "agentwork.v1.SourceToolService/Read", opcode=0x0101, request=work.WorkRequest, response=work.WorkResponse
)

class SourceTools(AsyncToolService):
    TOOLS = (TOOL,)

    async def read(self, request, call):
        return work.WorkResponse(text=f"{{request.text}} for {{call.client}}")

class Client:
    def __init__(self, channel):
        self._channel = channel

    def read(self, request):
        return self._channel.call(TOOL, request)

def without_kernel(*arguments):
    _child._F_SETSIG = None
    _child.main(*arguments)

class Unloadable(Cruncher):
    def __reduce__(self):
        return (_fails, ())

def _fails():
    raise ImportError("no module named numbers")

agent = Agent("cruncher", Subprocess(Cruncher()), slots=2)
"""


@pytest.fixture(scope="session")
def crunching(work_path: Path) -> ModuleType:
    """A module that child processes import as well."""
    program = MODULE.format(conftest=str(Path(__file__).with_name("conftest.py")))
    (work_path / "crunching.py").write_text(program)
    # One process for all children of this one; it ends with it.
    resource_tracker.ensure_running()
    return importlib.import_module("crunching")


@asynccontextmanager
async def running(agent: Agent, orchestrator: Any, **changes: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run(orchestrator.target, **{"agent_id": "a1", "drain_grace": 0.2, **changes}))
    try:
        await orchestrator.connected()
        yield
    finally:
        agent.drain()
        async with asyncio.timeout(20):
            await task


@pytest.fixture
async def cruncher(crunching: ModuleType, orchestrator: Any) -> AsyncIterator[SimpleNamespace]:
    """A running agent, and a function that submits one of its tasks."""
    async with running(Agent("cruncher", Subprocess(crunching.Cruncher()), slots=2), orchestrator):

        async def submit(name: str) -> str:
            task_id: str = await orchestrator.submit(crunching.work.GRIND, crunching.work.WorkRequest(text=name))
            return task_id

        async def result(name: str) -> pb.Result:
            outcome: pb.Result = await orchestrator.result(await submit(name))
            return outcome

        yield SimpleNamespace(submit=submit, result=result, work=crunching.work)


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


async def numbers(orchestrator: Any, work: Any, task_id: str, count: int) -> list[int]:
    job = orchestrator.jobs[task_id]
    await orchestrator.until(lambda: len(job.progress) >= count)
    return [work.WorkProgress.FromString(each.payload).number for each in job.progress]


async def test_a_handler_runs_in_another_process_which_is_used_again(cruncher: SimpleNamespace) -> None:
    pids = {(await cruncher.result("pid")).response for _ in range(3)}
    (response,) = pids
    assert cruncher.work.WorkResponse.FromString(response).text != str(os.getpid())


async def test_progress_directives_usage_and_logs_pass(
    orchestrator: Any, cruncher: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = await cruncher.submit("talks")
    assert await numbers(orchestrator, cruncher.work, task_id, 300) == list(range(1, 301))
    orchestrator.session.direct(
        orchestrator.key(task_id), cruncher.work.WorkDirective(text="enough").SerializeToString()
    )
    await orchestrator.flush()
    result = await orchestrator.result(task_id)
    assert cruncher.work.WorkResponse.FromString(result.response).text == "enough"
    assert [each.getMessage() for each in caplog.records if each.name == "cruncher"] == ["attempt 1"]


async def test_tools_and_events_pass(orchestrator: Any, crunching: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[tuple[str, str]] = []

    def collect(_: Any, stream: Any, event: Any, span: Any) -> None:
        collected.append((stream.contract.name, span.trace_id))

    async def publish(_: Any, stream: Any, event: Any, span: Any) -> None:
        collected.append((f"{stream.contract.name} acknowledged", span.trace_id))

    monkeypatch.setattr(AgentEvents, "collect", collect)
    monkeypatch.setattr(AgentEvents, "publish", publish)
    agent = Agent("cruncher", Subprocess(crunching.Cruncher()), tools=crunching.SourceTools())
    async with running(agent, orchestrator):
        task_id = await orchestrator.submit(crunching.work.GRIND, crunching.work.WorkRequest(text="calls"))
        result = await orchestrator.result(task_id)
        assert crunching.work.WorkResponse.FromString(result.response).text == "a.py for a1", result
    trace = parse_traceparent(orchestrator.jobs[task_id].traceparent)
    assert trace is not None
    assert ("usage acknowledged", trace.trace_id) in collected
    assert ("tools", trace.trace_id) in collected


async def test_an_agent_without_tools_says_so(cruncher: SimpleNamespace) -> None:
    assert "this agent has no tools" in (await cruncher.result("calls")).failure.message


async def test_the_attempt_timeout_kills(
    orchestrator: Any, cruncher: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator, "attempt_timeout_ms", 700)
    task_id = await cruncher.submit("sleeps")
    (pid,) = await numbers(orchestrator, cruncher.work, task_id, 1)
    assert (await orchestrator.result(task_id)).failure.reason == Reason.REASON_ATTEMPT_TIMEOUT
    await until(lambda: not exists(pid))
    await orchestrator.until(lambda: orchestrator.session.free_slots == 2)


async def test_a_handler_that_looks_for_its_cancel_is_not_killed(orchestrator: Any, cruncher: SimpleNamespace) -> None:
    task_id = await cruncher.submit("looks")
    (pid,) = await numbers(orchestrator, cruncher.work, task_id, 1)
    await orchestrator.cancel(task_id, grace_ms=10_000)
    assert (await orchestrator.result(task_id)).cancelled.reason == Reason.REASON_CANCELLED
    assert exists(pid)
    response = (await cruncher.result("pid")).response
    assert cruncher.work.WorkResponse.FromString(response).text == str(pid)


@pytest.mark.parametrize("name", ["holds", "sleeps"])
async def test_a_handler_that_ignores_its_cancel_is_killed_with_its_programs(
    orchestrator: Any, cruncher: SimpleNamespace, name: str
) -> None:
    task_id = await cruncher.submit(name)
    pids = await numbers(orchestrator, cruncher.work, task_id, 2 if name == "holds" else 1)
    await asyncio.sleep(0.5)
    await orchestrator.cancel(task_id, grace_ms=200)
    job = orchestrator.jobs[task_id]
    await orchestrator.until(lambda: job.acknowledged_at > 0)
    assert job.acknowledged_at - job.cancelled_at < orchestrator.options.heartbeat_interval
    assert (await orchestrator.result(task_id)).cancelled.reason == Reason.REASON_CANCELLED
    assert orchestrator.session.free_slots == 2, "the slot is free"
    await until(lambda: not any(map(exists, pids)))
    assert (await cruncher.result("pid")).response


@pytest.mark.parametrize("name", ["crashes", "exits", "stops", "scribbles", "rejects", "confuses"])
async def test_an_end_of_the_process_ends_only_its_attempt(
    orchestrator: Any, cruncher: SimpleNamespace, name: str
) -> None:
    other = await cruncher.submit("looks")
    await numbers(orchestrator, cruncher.work, other, 1)
    task_id = await cruncher.submit(name)
    if name == "stops":
        await asyncio.sleep(0.3)
        await orchestrator.cancel(task_id, grace_ms=200)
        assert (await orchestrator.result(task_id)).cancelled.reason == Reason.REASON_CANCELLED
    else:
        failure = (await orchestrator.result(task_id)).failure
        reason, text = {
            "crashes": (Reason.REASON_HANDLER_FAILED, "killed by SIGSEGV"),
            "exits": (Reason.REASON_HANDLER_FAILED, "exit code 3"),
            "scribbles": (Reason.REASON_HANDLER_FAILED, "the handler's process ended"),
            "rejects": (Reason.REASON_HANDLER_REJECTED, "no such number"),
            "confuses": (Reason.REASON_INVALID_RESPONSE, "returned str"),
        }[name]
        assert (failure.reason, text in failure.message) == (reason, True), failure
    assert (await cruncher.result("pid")).response
    assert orchestrator.jobs[other].result is None
    await orchestrator.cancel(other)
    assert (await orchestrator.result(other)).cancelled.reason == Reason.REASON_CANCELLED


async def test_the_end_of_the_agent_ends_its_processes(orchestrator: Any, crunching: ModuleType) -> None:
    agent = Agent("cruncher", Subprocess(crunching.Cruncher()), slots=2)
    async with running(agent, orchestrator):
        task_id = await orchestrator.submit(crunching.work.GRIND, crunching.work.WorkRequest(text="holds"))
        pids = await numbers(orchestrator, crunching.work, task_id, 2)
        began = time.monotonic()
    assert (await orchestrator.result(task_id)).failure.reason == Reason.REASON_ABANDONED
    await until(lambda: not any(map(exists, pids)))
    assert time.monotonic() - began < 15


async def test_a_killed_agent_leaves_no_process(
    orchestrator: Any, crunching: ModuleType, work_path: Path, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orki_agent", "run", "crunching:agent"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(work_path), "ORKI_ORCHESTRATOR": orchestrator.target},
    )
    try:
        await orchestrator.connected()
        task_id = await orchestrator.submit(crunching.work.GRIND, crunching.work.WorkRequest(text="holds"))
        pids = await numbers(orchestrator, crunching.work, task_id, 2)
        await asyncio.sleep(0.5)
        assert all(map(exists, pids))
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    await until(lambda: not any(map(exists, pids)))


def test_without_the_kernel_a_child_ends_with_its_connection(
    crunching: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_child, "main", crunching.without_kernel)
    child = _subprocess.ChildProcess(Subprocess(crunching.Cruncher()), "a1")
    assert child.usable
    pid = child._process.pid
    assert pid is not None
    child.connection.close()
    child._process.join(10)
    assert child._process.exitcode == -signal.SIGKILL
    assert not exists(pid)
    child.end()


def test_a_child_of_a_stopped_agent_is_not_kept(crunching: ModuleType) -> None:
    pool = _subprocess.ChildPool("a1")
    subprocess = Subprocess(crunching.Cruncher())
    child = pool.take(subprocess)
    pool.close()
    child._process.join(10)
    assert child._process.exitcode == -signal.SIGKILL
    pool.give_back(child)
    with pytest.raises(HandlerFailed, match="the agent stops"):
        pool.take(subprocess)


def test_what_cannot_run_in_a_process_is_refused(work: SimpleNamespace) -> None:
    class Local(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any: ...

    class Coroutine(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any: ...

    with pytest.raises(InvalidSetting, match=r"test_agent_subprocess.py:\d+: .*Local cannot be pickled"):
        Subprocess(Local())
    for given in (Coroutine(), Local, None):
        with pytest.raises(InvalidSetting, match="derived from a sync base"):
            Subprocess(given)  # type: ignore[arg-type]


async def test_a_service_that_a_child_cannot_load_is_refused_at_the_start(
    orchestrator: Any, crunching: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    agent = Agent("cruncher", Subprocess(crunching.Unloadable()))
    with pytest.raises(InvalidSetting, match="cannot load Subprocess.*no module named numbers"):
        await agent.run(orchestrator.target, agent_id="a1")
    assert not orchestrator.hellos
