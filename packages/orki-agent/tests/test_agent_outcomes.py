"""Whatever a handler returns or raises ends its attempt: its slot is free, the next task runs, and the agent drains."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orki_agent import Agent
from orki_contract.errors import Cancelled, HandlerRejected, OrkiError, Reason, ToolFailed
from orki_control import JitterOptions

BIG = 100_000_000
QUICK = JitterOptions(initial=0.05, maximum=0.1)


@asynccontextmanager
async def running(agent: Agent, orchestrator: Any) -> AsyncIterator[asyncio.Task[None]]:
    """The agent, connected; at the end it must drain by itself."""
    task = asyncio.create_task(agent.run(orchestrator.target, agent_id="a1", backoff=QUICK, drain_grace=60.0))
    try:
        await orchestrator.connected()
        yield task
        agent.drain()
        async with asyncio.timeout(10):
            await asyncio.shield(task)
    finally:
        agent.stop_now()
        await asyncio.gather(task, return_exceptions=True)


def raised(error: BaseException) -> Callable[[Any], Any]:
    def end(work: Any) -> Any:
        raise error

    return end


class Unreadable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Leaving(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class LeavingExit(SystemExit):
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


class NoText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]  # noqa: PLE0307

    __repr__ = __str__


class Huge(Exception):
    def __str__(self) -> str:
        return "x" * BIG


class OddText(str):
    def __getitem__(self, key: object) -> str:
        raise RuntimeError("no slices")

    def __len__(self) -> int:
        return -1  # noqa: PLE0303

    def encode(self, *arguments: Any) -> bytes:
        raise RuntimeError("no bytes")


class Odd(Exception):
    def __str__(self) -> str:
        return OddText("odd")


class NotMyClass(Exception):
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no class")


class NoMessage(OrkiError):
    message: Any = property(lambda self: 1 / 0, lambda self, value: None)  # type: ignore[assignment]


class OddMeta(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no module")


class OddName(Exception, metaclass=OddMeta):
    pass


class Base(BaseException):
    pass


class Response:
    def __init__(self, work: Any) -> None:
        self.__dict__["real"] = work.WorkResponse()

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no class")


def without_module() -> type[Exception]:
    return type("Lost", (Exception,), {"__module__": None})


def same(error: BaseException) -> BaseException:
    error.__cause__ = error
    return error


ENDS: dict[str, Callable[[Any], Any]] = {
    "text of a file name that is not UTF-8": raised(ValueError("\udc80")),
    "a rejection of such a file name": raised(HandlerRejected("a file named \udcff")),
    "a tool's error with such text": raised(ToolFailed("\ud800 \udc80")),
    "NUL and control characters": raised(ValueError("\x00\x1b[2J\n" * 9000)),
    "no text": raised(Unreadable()),
    "a text that leaves": raised(Leaving()),
    "an exit whose text leaves": raised(LeavingExit()),
    "a text that is no string": raised(NoText()),
    "a text of 100 MB": raised(Huge()),
    "a string with methods of its own": raised(Odd()),
    "an error without a class": raised(NotMyClass()),
    "an orki error without a message": raised(NoMessage("m")),
    "an orki error whose message is no string": raised(OrkiError(b"\xff")),  # type: ignore[arg-type]
    "a type without a module": raised(OddName()),
    "a type whose module is None": raised(without_module()()),
    "a type with a name of 100 kB": raised(type("N" * 100_000, (Exception,), {})()),
    "a group": raised(ExceptionGroup("many", [ValueError("\udc80"), ExceptionGroup("more", [Unreadable()])])),
    "a group of exits": raised(BaseExceptionGroup("many", [KeyboardInterrupt(), SystemExit(2)])),
    "an error that is its own cause": raised(same(ValueError("cause"))),
    "a base exception": raised(Base("\udc80")),
    "SystemExit": raised(SystemExit(3)),
    "SystemExit without a code": raised(SystemExit()),
    "KeyboardInterrupt": raised(KeyboardInterrupt()),
    "GeneratorExit": raised(GeneratorExit()),
    "StopIteration": raised(StopIteration(1)),
    "StopAsyncIteration": raised(StopAsyncIteration()),
    "CancelledError without a cancel": raised(asyncio.CancelledError("\udc80")),
    "Cancelled without a cancel": raised(Cancelled("\udc80")),
    "MemoryError": raised(MemoryError()),
    "RecursionError": raised(RecursionError("maximum recursion depth exceeded")),
    "None": lambda work: None,
    "a text": lambda work: "text",
    "a class": lambda work: work.WorkResponse,
    "another message": lambda work: work.WorkRequest(text="x"),
    "an object without a class": Response,
    "a coroutine": lambda work: asyncio.sleep(0),
    "more bytes than the orchestrator takes": lambda work: work.WorkResponse(blob=bytes(8 << 20)),
}
REASONS = {
    "a rejection of such a file name": Reason.REASON_HANDLER_REJECTED,
    "more bytes than the orchestrator takes": Reason.REASON_TOO_LARGE,
    **dict.fromkeys(
        ("None", "a text", "a class", "another message", "an object without a class", "a coroutine"),
        Reason.REASON_INVALID_RESPONSE,
    ),
}


def services(work: SimpleNamespace, end: Callable[[Any], Any]) -> dict[str, Any]:
    """A service of each kind whose handler ends so if its request has a text, and well if it has none."""

    class Async(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return end(work) if request.text else work.WorkResponse(text="well")

    class Sync(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            return end(work) if request.text else work.WorkResponse(text="well")

    return {"async": Async(), "sync": Sync()}


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("end", sorted(ENDS))
async def test_every_end_is_an_outcome(
    orchestrator: Any, work: SimpleNamespace, end: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent("worker", services(work, ENDS[end])[kind], slots=1)
    task = work.WORK if kind == "async" else work.GRIND
    with caplog.at_level(logging.INFO):
        async with running(agent, orchestrator) as run:
            for _ in range(2):
                bad = await orchestrator.submit(task, work.WorkRequest(text="bad"))
                result = await orchestrator.result(bad, 10)
                assert result.WhichOneof("outcome") == "failure"
                assert result.failure.reason == REASONS.get(end, Reason.REASON_HANDLER_FAILED)
                assert len(result.failure.message) <= 2000
                assert len(result.failure.error_type) <= 200
                assert result.failure.message or result.failure.error_type
            good = await orchestrator.submit(task, work.WorkRequest())
            assert (await orchestrator.result(good)).WhichOneof("outcome") == "response"
    assert run.exception() is None
    assert sum(len(record.getMessage()) for record in caplog.records) < 1_000_000
    if REASONS.get(end) == Reason.REASON_INVALID_RESPONSE:
        places = [record.getMessage() for record in caplog.records if __file__ in record.getMessage()]
        assert len(places) == 2, "the log names the handler's place"


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_cancelled_handler_may_end_in_any_way(orchestrator: Any, work: SimpleNamespace, kind: str) -> None:
    def end(work: Any) -> Any:
        raise ValueError("\udc80")

    class Async(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            try:
                await ctx.progress(work.WorkProgress())
                await asyncio.sleep(60)
            finally:
                end(work)

    class Sync(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            ctx.progress(work.WorkProgress())
            for _ in ctx.directives():
                pass
            end(work)

    agent = Agent("worker", Async() if kind == "async" else Sync(), slots=1)
    async with running(agent, orchestrator) as run:
        for _ in range(2):
            task_id = await orchestrator.submit(work.WORK if kind == "async" else work.GRIND, work.WorkRequest())
            # An attempt runs once it is accepted, which is before its handler's first step.
            await orchestrator.until(lambda job=orchestrator.jobs[task_id]: bool(job.progress))
            await orchestrator.cancel(task_id, grace_ms=10_000)
            assert (await orchestrator.result(task_id)).failure.error_type == "ValueError"
    assert run.exception() is None


PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    async def work(self, request, ctx):
        raise ValueError("\\udc80")

class Grinder(work.GrindServiceSyncBase):
    def work(self, request, ctx):
        raise ValueError("\\udc80")

agent = Agent("worker", Worker(), Grinder(), slots=1)
"""


async def test_sigterm_ends_an_agent_whose_handlers_raised(
    orchestrator: Any, work: SimpleNamespace, work_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad_agent.py").write_text(PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py"))))
    command = (sys.executable, "-m", "orki_agent", "run", "bad_agent:agent", "--orchestrator", orchestrator.target)
    path = f"{work_path}:{os.environ.get('PYTHONPATH', '')}"
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stderr=asyncio.subprocess.PIPE
    )
    try:
        await orchestrator.until(lambda: bool(orchestrator.hellos), 30)
        await orchestrator.connected()
        for task in (work.WORK, work.GRIND, work.WORK):
            result = await orchestrator.result(await orchestrator.submit(task, work.WorkRequest()))
            assert (result.failure.error_type, result.failure.message) == ("ValueError", "\\udc80")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            await process.communicate()
        assert process.returncode == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
