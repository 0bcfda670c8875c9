"""Tests of the client against a fake servicer: submitting, waiting, and reconnecting."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from types import ModuleType, SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, StringValue, UInt32Value

import orki_control
from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, Failure, TaskState
from orki.control.v1.task_pb2_grpc import (
    FleetServiceServicer,
    TaskServiceServicer,
    add_FleetServiceServicer_to_server,
    add_TaskServiceServicer_to_server,
)
from orki_contract import Task, TaskStub
from orki_contract.errors import (
    Cancelled,
    HandlerFailed,
    IdempotencyConflict,
    InvalidArgument,
    InvalidResponse,
    InvalidSetting,
    NotDirectable,
    OrchestratorUnavailable,
    OrkiError,
    Overloaded,
    ProtocolVersion,
    Reason,
    StoreUnavailable,
    TooLarge,
    UnknownTask,
    WaitTimeout,
    error_for,
    status_of,
)
from orki_contract.trace import new_span, use_span
from orki_control import Client, ClientOptions, JitterOptions
from orki_control.transport import abort, check_targets, server_options

ECHO: Task[Any, Any, Any, Any] = Task.declare(
    "test.v1.EchoService/Echo",
    request=StringValue,
    response=StringValue,
    progress=UInt32Value,
    directive=StringValue,
)
OPTIONS = ClientOptions(patience=5.0, backoff=JitterOptions(initial=0.02, maximum=0.1))


class Orchestrator(TaskServiceServicer, FleetServiceServicer):
    """Tasks in a dict; the test moves them on."""

    def __init__(self) -> None:
        self.tasks: dict[str, pb.TaskSnapshot] = {}
        self.keys: dict[str, str] = {}
        self.progress: dict[str, list[bytes]] = {}
        self.submits: list[int] = []
        self.submissions: list[pb.Submission] = []
        self.watches: list[str] = []
        self.directives: list[bytes] = []
        self.fail: list[OrkiError] = []
        self.forget_answers = 0
        self.lose_directives = 0
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._changed = asyncio.Condition()
        self._changes = 0

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=server_options())
        add_TaskServiceServicer_to_server(self, self._server)
        add_FleetServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def move(self, task_id: str, state: TaskState.ValueType, **fields: Any) -> None:
        snapshot = pb.TaskSnapshot(state=state, **fields)
        self.tasks[task_id].MergeFrom(snapshot)
        await self._notify()

    async def tell(self, task_id: str, number: int) -> None:
        self.progress[task_id].append(UInt32Value(value=number).SerializeToString())
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changes += 1
            self._changed.notify_all()

    async def _maybe_fail(self, context: Any) -> None:
        if self.fail:
            await abort(context, self.fail.pop(0))

    async def Submit(self, request: Any, context: Any) -> Any:
        self.submits.append(len(request.submissions))
        self.submissions += request.submissions
        await self._maybe_fail(context)
        outcomes = []
        for submission in request.submissions:
            if submission.request == b"\n\x03bad":
                failure = Failure(reason=Reason.REASON_UNKNOWN_METHOD, message="nobody serves it")
                outcomes.append(pb.SubmitOutcome(failure=failure))
                continue
            task_id = self.keys.setdefault(submission.idempotency_key, f"t{len(self.tasks) + 1}")
            if task_id not in self.tasks:
                self.progress[task_id] = []
                self.tasks[task_id] = pb.TaskSnapshot(
                    task_id=task_id,
                    method=submission.method,
                    state=TaskState.TASK_STATE_QUEUED,
                    response=submission.request,
                    traceparent=submission.traceparent,
                )
            outcomes.append(pb.SubmitOutcome(task=self.tasks[task_id]))
        if self.forget_answers:
            self.forget_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        return pb.SubmitResponse(outcomes=outcomes)

    async def Get(self, request: Any, context: Any) -> Any:
        await self._maybe_fail(context)
        if request.task_id not in self.tasks:
            await abort(context, UnknownTask(f"no task {request.task_id}"))
        return pb.GetResponse(task=self.tasks[request.task_id])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watches.append(request.after)
        task = self.tasks.get(request.task_id)
        if task is None:
            await abort(context, UnknownTask(f"no task {request.task_id}"))
        assert task is not None
        seen = int(request.after or 0)
        while True:
            seen_changes = self._changes
            ended = task.state >= TaskState.TASK_STATE_SUCCEEDED
            for number in range(seen + 1, len(self.progress[task.task_id]) + 1):
                payload = self.progress[task.task_id][number - 1]
                progress = pb.WatchedProgress(cursor=str(number), attempt=1, index=number, payload=payload)
                yield pb.WatchResponse(progress=progress)
            seen = len(self.progress[task.task_id])
            yield pb.WatchResponse(task=task)
            if ended:
                return
            async with self._changed:
                # A change during a write above must not be missed.
                while self._changes == seen_changes:
                    await self._changed.wait()

    async def Cancel(self, request: Any, context: Any) -> Any:
        await self.move(request.task_id, TaskState.TASK_STATE_CANCELLED)
        return pb.CancelResponse(task=self.tasks[request.task_id])

    async def Direct(self, request: Any, context: Any) -> Any:
        if self.tasks[request.task_id].state != TaskState.TASK_STATE_RUNNING:
            await abort(context, NotDirectable(f"task {request.task_id} is not running"))
        self.directives.append(request.payload)
        if self.lose_directives:
            self.lose_directives -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        return pb.DirectResponse(attempt=AttemptRef(task_id=request.task_id, attempt=1, fence=1))

    async def List(self, request: Any, context: Any) -> Any:
        start = int(request.page_token or 0)
        page = sorted(self.tasks)[start : start + 2]
        more = str(start + 2) if start + 2 < len(self.tasks) else ""
        return pb.ListResponse(tasks=[self.tasks[each] for each in page], next_page_token=more)

    async def ListAgents(self, request: Any, context: Any) -> Any:
        return pb.ListAgentsResponse(agents=[pb.AgentSnapshot(agent_id="a1")])

    async def ListServices(self, request: Any, context: Any) -> Any:
        return pb.ListServicesResponse(services=[pb.ServiceSnapshot(service=request.service or "x.Y")])


@pytest.fixture
async def server() -> AsyncIterator[Orchestrator]:
    running = Orchestrator()
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
async def client(server: Orchestrator) -> AsyncIterator[Client]:
    async with Client(server.target, OPTIONS) as opened:
        yield opened


async def test_submit_and_wait(server: Orchestrator, client: Client) -> None:
    echo = TaskStub(client, ECHO)
    handle = await echo.submit(StringValue(value="hi"))
    waiting = asyncio.create_task(handle.result(10))
    await asyncio.sleep(0.05)
    await server.move(handle.task_id, TaskState.TASK_STATE_SUCCEEDED)
    assert (await waiting).value == "hi"
    assert (await handle.result()).value == "hi"
    assert server.watches == [""]
    already = asyncio.create_task(echo(StringValue(value="again"), timeout=10))
    while len(server.tasks) < 2:
        await asyncio.sleep(0.01)
    await server.move("t2", TaskState.TASK_STATE_SUCCEEDED)
    assert (await already).value == "again"


async def test_a_retried_submit_never_doubles(server: Orchestrator, client: Client) -> None:
    server.forget_answers = 2
    handle = await client.submit(ECHO, StringValue(value="once"))
    assert handle.task_id == "t1"
    assert len(server.tasks) == 1
    assert server.submits == [1, 1, 1]


async def test_the_submitters_span_travels(server: Orchestrator, client: Client) -> None:
    span = new_span()
    with use_span(span):
        handle = await client.submit(ECHO, StringValue())
    assert handle.snapshot.traceparent == span.traceparent
    outside = await client.submit(ECHO, StringValue())
    assert outside.span is not None
    assert outside.span.trace_id != span.trace_id


async def test_many_are_submitted_in_chunks_of_count_and_size(server: Orchestrator) -> None:
    async with Client(server.target, OPTIONS) as client:
        handles = await client.submit_many(ECHO, [StringValue(value=str(n)) for n in range(2100)])
    assert server.submits == [1000, 1000, 100]
    assert [each.task_id for each in handles] == [f"t{n}" for n in range(1, 2101)]
    server.submits.clear()
    small = ClientOptions(max_message_bytes=256 * 1024, patience=0)
    async with Client(server.target, small) as client:
        await client.submit_many(ECHO, [StringValue(value="x" * 60_000)] * 7)
        assert server.submits == [3, 3, 1]
        with pytest.raises(TooLarge, match="the request has 300004 bytes"):
            await client.submit(ECHO, StringValue(value="x" * 300_000))


async def test_the_first_refused_submission_is_named(server: Orchestrator, client: Client) -> None:
    with pytest.raises(OrkiError, match="submission 2 of 3: nobody serves it") as refused:
        await client.submit_many(ECHO, [StringValue(value=each) for each in ("a", "bad", "c")])
    assert refused.value.reason == Reason.REASON_UNKNOWN_METHOD
    assert len(server.tasks) == 2


async def test_progress_goes_on_over_a_killed_orchestrator(server: Orchestrator, client: Client) -> None:
    handle = await client.submit(ECHO, StringValue(value="x"))
    numbers = []

    async def follow() -> None:
        async for delta in handle.progress():
            numbers.append(delta.value)

    following = asyncio.create_task(follow())
    result = asyncio.create_task(handle.result())
    await server.tell(handle.task_id, 1)
    await server.tell(handle.task_id, 2)
    while numbers != [1, 2]:
        await asyncio.sleep(0.01)
    await server.stop()
    server.progress[handle.task_id].append(UInt32Value(value=3).SerializeToString())
    await asyncio.sleep(0.3)
    await server.start()
    await server.tell(handle.task_id, 4)
    await server.move(handle.task_id, TaskState.TASK_STATE_SUCCEEDED)
    await asyncio.wait_for(following, 10)
    assert (await asyncio.wait_for(result, 10)).value == "x"
    assert numbers == [1, 2, 3, 4]
    assert "2" in server.watches


async def test_a_wait_ends_and_the_task_goes_on(server: Orchestrator, client: Client) -> None:
    handle = await client.submit(ECHO, StringValue(value="x"))
    with pytest.raises(WaitTimeout, match="it goes on"):
        await handle.result(0.1)
    await server.move(handle.task_id, TaskState.TASK_STATE_SUCCEEDED)
    assert (await handle.result(10)).value == "x"


async def test_failed_cancelled_and_undecodable_results_raise_typed_errors(
    server: Orchestrator, client: Client
) -> None:
    failed = await client.submit(ECHO, StringValue())
    failure = Failure(reason=Reason.REASON_HANDLER_FAILED, message="odd", error_type="ValueError")
    await server.move(failed.task_id, TaskState.TASK_STATE_FAILED, failure=failure)
    with pytest.raises(HandlerFailed, match=r"task t1 \(test.v1.EchoService/Echo\), attempt 0: ValueError: odd"):
        await failed.result(10)
    cancelled = await client.submit(ECHO, StringValue())
    await cancelled.cancel("enough")
    with pytest.raises(Cancelled):
        await cancelled.result(10)
    strange = await client.submit(ECHO, StringValue())
    await server.move(strange.task_id, TaskState.TASK_STATE_SUCCEEDED, response=b"\xff")
    with pytest.raises(InvalidResponse, match="not a StringValue"):
        await strange.result(10)


async def test_a_directive_reaches_a_running_task_only(server: Orchestrator, client: Client) -> None:
    handle = await client.submit(ECHO, StringValue())
    with pytest.raises(NotDirectable):
        await handle.direct(StringValue(value="go"))
    await server.move(handle.task_id, TaskState.TASK_STATE_RUNNING)
    await handle.direct(StringValue(value="go"))
    assert server.directives == [StringValue(value="go").SerializeToString()]


async def test_tasks_agents_and_services_are_listed(server: Orchestrator, client: Client) -> None:
    await client.submit_many(ECHO, [StringValue()] * 5)
    assert [task.task_id async for task in client.list_tasks()] == ["t1", "t2", "t3", "t4", "t5"]
    assert [each.agent_id for each in await client.list_agents()] == ["a1"]
    assert [each.service for each in await client.list_services("p.S")] == ["p.S"]
    assert (await client.get("t3")).method == "test.v1.EchoService/Echo"
    assert client.handle(ECHO, "t3").task_id == "t3"


async def test_unknown_tasks_are_typed(client: Client) -> None:
    with pytest.raises(UnknownTask, match="no task t99"):
        await client.get("t99")
    with pytest.raises(UnknownTask):
        await client.handle(ECHO, "t99").result(5)
    with pytest.raises(UnknownTask):
        async for _ in client.handle(ECHO, "t99").progress():
            pass


@pytest.mark.parametrize("reason", [value for value in Reason.values() if value])
async def test_every_reason_comes_back_as_its_own_class(server: Orchestrator, reason: Reason.ValueType) -> None:
    error = error_for(reason, "what, where — and what to do")
    server.fail = [error]
    async with Client(server.target, ClientOptions(patience=0)) as client:
        with pytest.raises(type(error)) as raised:
            await client.get("t1")
    assert raised.value.message == error.message
    assert status_of(reason)


async def test_retryable_errors_are_tried_again_and_others_are_not(server: Orchestrator, client: Client) -> None:
    server.fail = [StoreUnavailable("no"), Overloaded("busy")]
    await client.submit(ECHO, StringValue())
    assert server.submits == [1, 1, 1]
    server.fail = [IdempotencyConflict("other request")]
    with pytest.raises(IdempotencyConflict):
        await client.submit(ECHO, StringValue(), idempotency_key="k")


async def test_an_unreachable_orchestrator_raises_after_the_patience(unused_tcp_port: int) -> None:
    options = ClientOptions(patience=0.3, backoff=JitterOptions(initial=0.02, maximum=0.05))
    async with Client(f"127.0.0.1:{unused_tcp_port}", options) as client:
        with pytest.raises(OrchestratorUnavailable, match=f"127.0.0.1:{unused_tcp_port}"):
            await client.get("t1")


async def test_another_grpc_server_on_the_port_raises_protocol_version(server: Orchestrator) -> None:
    other = grpc.aio.server()
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    async with Client(f"127.0.0.1:{port}", ClientOptions(patience=0)) as client:
        with pytest.raises(ProtocolVersion, match="is it an orki orchestrator"):
            await client.get("t1")
    await other.stop(None)


async def test_a_response_that_is_too_large_raises_a_typed_error(server: Orchestrator) -> None:
    server.tasks["t1"] = pb.TaskSnapshot(task_id="t1", response=BytesValue(value=b"x" * 300_000).SerializeToString())
    async with Client(server.target, ClientOptions(patience=0, max_message_bytes=200_000)) as client:
        with pytest.raises(TooLarge):
            await client.get("t1")


async def test_wrong_use_of_the_client_raises_a_clear_error(server: Orchestrator, client: Client) -> None:
    with pytest.raises(InvalidArgument, match="takes StringValue, not UInt32Value"):
        await client.submit(ECHO, UInt32Value())
    with pytest.raises(InvalidArgument, match="exceeds 256 bytes"):
        await client.submit(ECHO, StringValue(), idempotency_key="k" * 300)
    with pytest.raises(InvalidArgument, match="1 idempotency keys for 2 requests"):
        await client.submit_many(ECHO, [StringValue()] * 2, idempotency_keys=["a"])
    closed = Client(server.target)
    with pytest.raises(OrchestratorUnavailable, match="async with"):
        await closed.get("t1")
    with pytest.raises(InvalidSetting, match="is open already"):
        await client.__aenter__()


@pytest.mark.parametrize("target", ["", "localhost", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:70000", "http://x:1"])
def test_targets_are_checked(target: str) -> None:
    with pytest.raises(InvalidSetting, match="is not HOST:PORT"):
        Client(target)


def test_plaintext_stays_on_this_host() -> None:
    assert check_targets("[::1]:50051") == ("[::1]:50051",)
    assert check_targets("orki.internal:50051", insecure=True)
    with pytest.raises(InvalidSetting, match="not encrypted"):
        check_targets("orki.internal:50051")


@pytest.mark.parametrize("options", [{"patience": -1}, {"call_timeout": 0}, {"max_message_bytes": 5}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        ClientOptions(**options)


@pytest.mark.parametrize("options", [{"initial": 0}, {"initial": 2, "maximum": 1}, {"stable": -1}])
def test_back_off_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting):
        JitterOptions(**options)


async def test_the_example_of_the_docstring_runs(
    server: Orchestrator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generated: Any = ModuleType("greenhouse.v1.watering_orki")
    generated.WaterBedRequest = lambda bed: StringValue(value=bed)
    generated.WateringServiceClient = lambda channel: SimpleNamespace(water_bed=TaskStub(channel, ECHO))
    monkeypatch.setitem(sys.modules, generated.__name__, generated)
    example = _example(orki_control.__doc__ or "", server) + "return response"
    names: dict[str, Any] = {}
    exec(compile("async def main():\n" + textwrap.indent(example, "    "), "docstring", "exec"), names)
    running = asyncio.create_task(names["main"]())
    for number, task_id in enumerate(("t1", "t2"), 1):
        while task_id not in server.tasks:
            await asyncio.sleep(0.01)
        await server.tell(task_id, number)
        await server.move(task_id, TaskState.TASK_STATE_SUCCEEDED)
    assert (await asyncio.wait_for(running, 10)).value == "south"
    assert capsys.readouterr().out == "value: 2\n\n"
    assert server.keys["south-monday"] == "t2"


def _example(text: str, server: Orchestrator) -> str:
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "127.0.0.1:50051" in example
    return str(example).replace("127.0.0.1:50051", server.target)


# --- Several addresses. ---


def free_target() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
async def second() -> AsyncIterator[Orchestrator]:
    running = Orchestrator()
    await running.start()
    yield running
    await running.stop()


CALLS: dict[str, Callable[[Client], Any]] = {
    "submit": lambda client: client.submit(ECHO, StringValue(value="x")),
    "get": lambda client: client.get("t0"),
    "cancel": lambda client: client.cancel("t0"),
    "direct": lambda client: client.direct("t0", b"d"),
    "list_tasks": lambda client: anext(client.list_tasks()),
    "list_agents": lambda client: client.list_agents(),
    "list_services": lambda client: client.list_services(),
    "watch": lambda client: anext(client.watch("t0")),
}


@pytest.mark.parametrize("patience", [0.0, 5.0])
@pytest.mark.parametrize("name", sorted(CALLS))
async def test_every_call_goes_on_at_the_next_address(server: Orchestrator, name: str, patience: float) -> None:
    server.tasks["t0"] = pb.TaskSnapshot(task_id="t0", state=TaskState.TASK_STATE_RUNNING)
    server.progress["t0"] = []
    options = ClientOptions(patience=patience, backoff=JitterOptions(initial=0.01, maximum=0.05))
    async with asyncio.timeout(10), Client([free_target(), free_target(), server.target], options) as client:
        assert await CALLS[name](client)


async def test_a_lost_answer_is_asked_for_again_elsewhere_but_no_directive(
    server: Orchestrator, second: Orchestrator
) -> None:
    second.keys, second.tasks, second.progress = server.keys, server.tasks, server.progress
    async with Client(f"{server.target},{second.target}", OPTIONS) as client:
        server.forget_answers = 1
        handle = await client.submit(ECHO, StringValue(value="once"))
        assert (server.submits, second.submits, len(server.tasks)) == ([1], [1], 1)
        await server.move(handle.task_id, TaskState.TASK_STATE_RUNNING)
        second.lose_directives = 1
        with pytest.raises(OrchestratorUnavailable):
            await client.direct(handle.task_id, b"d")
        assert (server.directives, second.directives) == ([], [b"d"])


async def test_a_watch_goes_on_elsewhere_after_the_last_progress(server: Orchestrator, second: Orchestrator) -> None:
    second.keys, second.tasks, second.progress = server.keys, server.tasks, server.progress
    async with Client((server.target, second.target), OPTIONS) as client:
        handle = await client.submit(ECHO, StringValue())
        other = asyncio.create_task(client.submit(ECHO, StringValue(value="other")))
        server.progress[handle.task_id] += [UInt32Value(value=1).SerializeToString()]
        deltas = handle.progress()
        assert (await anext(deltas)).value == 1
        await other
        await server.stop()
        server.progress[handle.task_id] += [UInt32Value(value=2).SerializeToString()]
        assert (await anext(deltas)).value == 2
        assert (server.watches, second.watches) == ([""], ["1"])
        await second.move(handle.task_id, TaskState.TASK_STATE_SUCCEEDED)
        assert [delta async for delta in deltas] == []


async def test_calls_under_way_survive_a_change_of_the_address(server: Orchestrator, second: Orchestrator) -> None:
    second.keys, second.tasks, second.progress = server.keys, server.tasks, server.progress
    async with Client((server.target, second.target), OPTIONS) as client:
        handle = await client.submit(ECHO, StringValue())
        waiting = asyncio.create_task(handle.result(10))
        while not server.watches:
            await asyncio.sleep(0.01)
        server.fail = [StoreUnavailable("away")]
        await client.get(handle.task_id)
        await server.move(handle.task_id, TaskState.TASK_STATE_SUCCEEDED)
        await waiting
        assert second.watches == []


@pytest.mark.parametrize("targets", [[], (), "127.0.0.1:1,", "127.0.0.1:1,,127.0.0.1:2", ["127.0.0.1:1", "x"]])
def test_every_address_is_checked(targets: Any) -> None:
    with pytest.raises(InvalidSetting, match="HOST:PORT"):
        Client(targets)


def test_addresses_are_given_as_text_or_as_a_sequence() -> None:
    expected = ("127.0.0.1:1", "[::1]:2")
    assert check_targets("127.0.0.1:1, [::1]:2,127.0.0.1:1") == expected
    assert check_targets(expected) == expected
    assert Client(expected).target == "127.0.0.1:1,[::1]:2"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"priority": 9}, pb.Submission(priority=9)),
        ({"priority": 0, "delay": 1.5}, pb.Submission(priority=0, delay_ms=1500)),
        ({"delay": 0.0001}, pb.Submission(delay_ms=1)),
        ({"start_at": datetime(2026, 1, 1, tzinfo=UTC)}, pb.Submission(start_at_us=1_767_225_600_000_000)),
        (
            {"labels": {"gpu": "a100"}, "limits": ["model:small"], "fairness_key": "t1"},
            pb.Submission(labels={"gpu": "a100"}, limits=["model:small"], fairness_key="t1"),
        ),
        ({"start_at": datetime(1960, 1, 1, tzinfo=UTC)}, pb.Submission(start_at_us=1)),
    ],
)
async def test_a_placement_is_sent(server: Orchestrator, settings: Any, expected: pb.Submission) -> None:
    async with Client(server.target, OPTIONS) as client:
        await client.submit(ECHO, StringValue(value="a"), **settings)
        await client.submit_many(ECHO, [StringValue(value="a")], **settings)
        stub: TaskStub[Any, Any, Any, Any] = TaskStub(client, ECHO)
        await stub.submit(StringValue(value="a"), **settings)
    assert len(server.submissions) == 3
    for sent in server.submissions:
        for field in ("method", "request", "idempotency_key", "traceparent"):
            sent.ClearField(field)
        assert sent == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"priority": 10}, "priority 10"),
        ({"priority": -1}, "priority -1"),
        ({"priority": True}, "priority True"),
        ({"priority": 1.0}, "priority 1.0"),
        ({"delay": -1}, "delay -1"),
        ({"delay": float("nan")}, "delay nan"),
        ({"delay": 1e9}, "delay"),
        ({"delay": "1"}, "delay '1'"),
        ({"start_at": datetime(2026, 1, 1)}, "time zone"),  # noqa: DTZ001 - the naive time is the point
        ({"start_at": 1}, "start_at 1"),
        ({"delay": 1, "start_at": datetime(2026, 1, 1, tzinfo=UTC)}, "not both"),
        ({"prio": 1}, "unknown setting 'prio'"),
        ({"labels": {"gpu": "a b"}}, "'gpu'='a b'"),
        ({"labels": {"gpu": 1}}, "'gpu'=1"),
        ({"labels": "gpu"}, "labels 'gpu'"),
        ({"labels": {str(number): "x" for number in range(17)}}, "at most 16"),
        ({"limits": "model"}, "limits 'model'"),
        ({"limits": ["a", ""]}, "key ''"),
        ({"limits": ["a"] * 9}, "at most 8"),
        ({"fairness_key": "a,b"}, "key 'a,b'"),
    ],
)
async def test_a_bad_placement_is_refused_before_it_is_sent(server: Orchestrator, settings: Any, says: str) -> None:
    async with Client(server.target, OPTIONS) as client:
        with pytest.raises(InvalidArgument, match=re.escape(says)):
            await client.submit(ECHO, StringValue(value="a"), **settings)
    assert server.submissions == []


async def test_each_of_many_submissions_has_its_own_outcome(server: Orchestrator, client: Client) -> None:
    requests: list[Any] = [
        StringValue(value="a"),
        StringValue(value="bad"),
        UInt32Value(value=1),
        StringValue(value="b"),
    ]
    found = await client.submit_each(ECHO, requests, idempotency_keys=["1", "2", "3", "4"], priority=7)
    assert [getattr(each, "task_id", type(each).__name__) for each in found] == [
        *("t1", "UnknownMethod", "InvalidArgument", "t2"),
    ]
    assert [each.priority for each in server.submissions] == [7, 7, 7]
    assert await client.submit_each(ECHO, []) == []
    with pytest.raises(InvalidArgument, match="one for each"):
        await client.submit_each(ECHO, requests, idempotency_keys=["1"])
    server.fail = [StoreUnavailable("down")] * 1000
    impatient = ClientOptions(patience=0.0, backoff=JitterOptions(initial=0.02, maximum=0.1))
    async with Client(server.target, impatient) as other:
        (refused,) = await other.submit_each(ECHO, [StringValue(value="a")])
    assert isinstance(refused, StoreUnavailable)
