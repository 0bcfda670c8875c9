"""A contract made at run time, and an orchestrator that remembers what agents tell it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from orki.control.v1 import session_pb2 as pb
from orki.control.v1 import task_pb2
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.session_pb2_grpc import SessionServiceServicer, add_SessionServiceServicer_to_server
from orki.control.v1.task_pb2_grpc import TaskServiceServicer, add_TaskServiceServicer_to_server
from orki_contract import AsyncTaskService, SyncTaskService, Task
from orki_contract.errors import ContractMismatch, OrkiError, StaleFence
from orki_contract.images import image_of
from orki_contract.trace import new_span
from orki_control import session as s
from orki_control.session import AttemptKey
from orki_control.transport import abort, server_options
from orki_server.embedded import EmbeddedServer

PACKAGE = "agentwork.v1"
FIELDS = {
    "WorkRequest": (("text", 9), ("seconds", 1), ("blob", 12), ("token", 9)),
    "WorkResponse": (("text", 9), ("blob", 12)),
    "WorkProgress": (("number", 13), ("blob", 12)),
    "WorkDirective": (("text", 9),),
    "WorkCheckpoint": (("number", 13), ("blob", 12)),
    "WorkAnswer": (("text", 9),),
}


def work_image() -> bytes:
    """An image with a task service of two methods, built beside the options that orki's own contracts carry."""
    own = descriptor_pb2.FileDescriptorSet.FromString(image_of("orki.events.v1"))
    needed = [each for each in own.file if each.name.startswith(("google/protobuf/", "orki/options/"))]
    pool = descriptor_pool.DescriptorPool()
    for each in needed:
        pool.Add(each)
    options = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.MethodOptions"))()
    extension = pool.FindExtensionByName("orki.options.v1.task")
    options.Extensions[extension].progress = "WorkProgress"
    options.Extensions[extension].directive = "WorkDirective"
    file = descriptor_pb2.FileDescriptorProto(
        name="agentwork/v1/work.proto",
        package=PACKAGE,
        syntax="proto3",
        dependency=["orki/options/v1/options.proto"],
    )
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields, 1):
            added = message.field.add(name=field_name, number=number, type=kind, label=1)  # type: ignore[arg-type]
            if field_name == "token":
                # (orki.options.v1.sensitive) is field 50821 of FieldOptions.
                added.options.MergeFromString(bytes((0xA8, 0xE8, 0x18, 1)))
    for service in ("WorkService", "GrindService"):
        method = file.service.add(name=service).method.add(
            name="Work", input_type=f".{PACKAGE}.WorkRequest", output_type=f".{PACKAGE}.WorkResponse"
        )
        if service == "WorkService":
            method_options = type(options).FromString(options.SerializeToString())
            method_options.Extensions[extension].checkpoint = "WorkCheckpoint"
            method_options.Extensions[extension].answer = "WorkAnswer"
        else:
            method_options = options
        method.options.ParseFromString(method_options.SerializeToString())
    return descriptor_pb2.FileDescriptorSet(file=[*needed, file]).SerializeToString(deterministic=True)


@pytest.fixture(scope="session")
def work_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the module path that holds the contract's package."""
    root = tmp_path_factory.mktemp("contracts")
    (root / "agentwork" / "v1").mkdir(parents=True)
    (root / "agentwork" / "v1" / "contract.binpb").write_bytes(work_image())
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))


@pytest.fixture(scope="session")
def work(work_path: Path) -> SimpleNamespace:
    """What generated code would hold: message classes, task handles, service bases."""
    return make_work(image_of(PACKAGE))


def make_work(image: bytes) -> SimpleNamespace:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(image).file:
        pool.Add(file)
    messages = {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in FIELDS
    }

    def task(service: str, **kept: Any) -> Task[Any, Any, Any, Any]:
        return Task.declare(
            f"{PACKAGE}.{service}/Work",
            request=messages["WorkRequest"],
            response=messages["WorkResponse"],
            progress=messages["WorkProgress"],
            directive=messages["WorkDirective"],
            **kept,
        )

    class WorkServiceBase(AsyncTaskService):
        TASKS = (task("WorkService", checkpoint=messages["WorkCheckpoint"], answer=messages["WorkAnswer"]),)

        @abstractmethod
        async def work(self, request: Any, ctx: Any) -> Any: ...

    class GrindServiceSyncBase(SyncTaskService):
        TASKS = (task("GrindService"),)

        @abstractmethod
        def work(self, request: Any, ctx: Any) -> Any: ...

    return SimpleNamespace(
        WORK=WorkServiceBase.TASKS[0],
        GRIND=GrindServiceSyncBase.TASKS[0],
        WorkServiceBase=WorkServiceBase,
        GrindServiceSyncBase=GrindServiceSyncBase,
        **messages,
    )


@dataclass
class Job:
    """A task at the orchestrator of the tests."""

    method: str
    request: bytes
    traceparent: str
    lease: float = 10.0
    attempt: int = 0
    fence: int = 0
    state: str = "queued"
    result: pb.Result | None = None
    results: int = 0
    progress: list[s.ArrivedProgress] = field(default_factory=list)
    accepted_at: float = 0.0
    cancelled_at: float = 0.0
    acknowledged_at: float = 0.0
    declined: list[s.Decline] = field(default_factory=list)


class Orchestrator(SessionServiceServicer, TaskServiceServicer):
    """Speaks `OrchestratorSession` over real gRPC; its store is a dict, and a test may hold back what it answers."""

    def __init__(self) -> None:
        self.options = s.OrchestratorSessionOptions(orchestrator_id="o1", heartbeat_interval=0.3)
        self.attempt_timeout_ms = 60_000
        self.jobs: dict[str, Job] = {}
        self.heartbeats: list[tuple[float, s.HeartbeatArrived]] = []
        self.hellos: list[pb.Hello] = []
        self.traceparents: set[tuple[str, str]] = set()
        self.refuse_with: OrkiError | None = None
        self.acknowledging = True
        self.storing = True
        self.echoing = True
        self.ended: list[s.SessionEnded] = []
        self.drained = False
        self.port = 0
        self._fences = 0
        self._epoch = 0
        self._server: grpc.aio.Server | None = None
        self._live: _Stream | None = None
        self._changed = asyncio.Condition()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server(options=server_options())
        add_SessionServiceServicer_to_server(self, self._server)
        add_TaskServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def cut(self, status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        """The stream ends without a word and with this status."""
        assert self._live is not None
        self._live.cut_status = status
        self._live.cut.set()
        await self.until(lambda: self._live is None)

    # --- what tests do ---

    async def until(self, condition: Callable[[], bool], timeout: float = 15.0) -> None:
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)

    async def connected(self) -> None:
        await self.until(lambda: self._live is not None and self._live.session.state is s.OrchestratorState.OPEN)

    @property
    def session(self) -> s.OrchestratorSession:
        assert self._live is not None
        return self._live.session

    async def submit(self, task: Task[Any, Any, Any, Any], request: Any, *, lease: float = 10.0) -> str:
        task_id = f"t{len(self.jobs) + 1}"
        payload = request if isinstance(request, bytes) else request.SerializeToString()
        self.jobs[task_id] = Job(task.contract.full_name, payload, new_span().traceparent, lease)
        await self.dispatch()
        return task_id

    async def result(self, task_id: str, timeout: float = 15.0) -> pb.Result:
        await self.until(lambda: self.jobs[task_id].result is not None, timeout)
        result = self.jobs[task_id].result
        assert result is not None
        return result

    async def running(self, task_id: str) -> None:
        await self.until(lambda: self.jobs[task_id].state == "running")

    def key(self, task_id: str) -> AttemptKey:
        job = self.jobs[task_id]
        return AttemptKey(task_id, job.attempt, job.fence)

    async def cancel(self, task_id: str, grace_ms: int = 1000) -> None:
        self.jobs[task_id].cancelled_at = time.monotonic()
        assert self.session.cancel(self.key(task_id), grace_ms=grace_ms, message="a test asks")
        await self.flush()

    async def say(self, *messages: pb.OrchestratorMessage) -> None:
        """Has the machine send what no honest orchestrator would."""
        for message in messages:
            self.session._queue.put_control(message)
        await self.flush()

    async def flush(self) -> None:
        if self._live is not None:
            self._live.changed()
        async with self._changed:
            self._changed.notify_all()

    async def dispatch(self) -> None:
        for task_id, job in self.jobs.items():
            if job.state == "queued" and self._live is not None and self._live.session.free_slots:
                self._fences += 1
                job.attempt, job.fence, job.state = job.attempt + 1, self._fences, "offered"
                offer = pb.Offer(
                    attempt=self.key(task_id).ref(),
                    method=job.method,
                    request=job.request,
                    lease_ms=round(job.lease * 1000),
                    accept_timeout_ms=5000,
                    attempt_timeout_ms=self.attempt_timeout_ms,
                )
                self._live.session.offer(offer, job.traceparent, time.monotonic())
        await self.flush()

    # --- the servicers ---

    async def Submit(self, request: Any, context: Any) -> Any:
        outcomes = []
        for submission in request.submissions:
            task_id = f"t{len(self.jobs) + 1}"
            self.jobs[task_id] = Job(submission.method, submission.request, submission.traceparent)
            outcomes.append(task_pb2.SubmitOutcome(task=self._snapshot(task_id)))
        await self.dispatch()
        return task_pb2.SubmitResponse(outcomes=outcomes)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        job, seen = self.jobs[request.task_id], int(request.after or 0)
        while True:
            for number, each in enumerate(job.progress[seen:], seen + 1):
                progress = task_pb2.WatchedProgress(cursor=str(number), payload=each.payload)
                yield task_pb2.WatchResponse(progress=progress)
            seen = len(job.progress)
            yield task_pb2.WatchResponse(task=self._snapshot(request.task_id))
            if job.result is not None:
                return
            async with self._changed:
                await self._changed.wait_for(lambda seen=seen: job.result is not None or len(job.progress) > seen)

    async def Cancel(self, request: Any, context: Any) -> Any:
        await self.cancel(request.task_id)
        return task_pb2.CancelResponse(task=self._snapshot(request.task_id))

    async def Direct(self, request: Any, context: Any) -> Any:
        key = self.key(request.task_id)
        self.session.direct(key, request.payload)
        await self.flush()
        return task_pb2.DirectResponse(attempt=key.ref())

    async def Get(self, request: Any, context: Any) -> Any:
        return task_pb2.GetResponse(task=self._snapshot(request.task_id))

    async def List(self, request: Any, context: Any) -> Any:
        return task_pb2.ListResponse(tasks=[self._snapshot(each) for each in self.jobs])

    def _snapshot(self, task_id: str) -> task_pb2.TaskSnapshot:
        job = self.jobs[task_id]
        states = {"queued": 1, "offered": 2, "running": 3, "declined": 6}
        ends = {"response": TaskState.TASK_STATE_SUCCEEDED, "failure": TaskState.TASK_STATE_FAILED}
        outcome = str(job.result.WhichOneof("outcome")) if job.result else ""
        state = ends.get(outcome, TaskState.TASK_STATE_CANCELLED) if job.result else states[job.state]
        return task_pb2.TaskSnapshot(
            task_id=task_id,
            method=job.method,
            state=state,  # type: ignore[arg-type]
            response=job.result.response if job.result else b"",
            failure=job.result.failure if job.result and outcome == "failure" else None,
            traceparent=job.traceparent,
        )

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        stream = _Stream(self, context)
        try:
            await stream.run()
        finally:
            if self._live is stream:
                self._live = None
            await self.flush()

    def take(self, stream: _Stream, events: list[s.OrchestratorEvent]) -> None:
        for event in events:
            match event:
                case s.HelloArrived():
                    self._greet(stream, event)
                case s.OffersAccepted(attempts):
                    for key in attempts:
                        self.jobs[key.task_id].state = "running"
                        self.jobs[key.task_id].accepted_at = time.monotonic()
                case s.OffersDeclined(declines):
                    for decline in declines:
                        self.jobs[decline.attempt.task_id].declined.append(decline)
                        self.jobs[decline.attempt.task_id].state = "declined"
                case s.ProgressArrived(progress):
                    for each in progress:
                        self.jobs[each.attempt.task_id].progress.append(each)
                        if self.storing:
                            stream.session.acknowledge_progress(each.attempt, each.number)
                case s.ResultsArrived(results):
                    for key, result in results:
                        self._result(stream, key, result)
                case s.CancelsAcknowledged(attempts):
                    for key in attempts:
                        self.jobs[key.task_id].acknowledged_at = time.monotonic()
                case s.HeartbeatArrived(number=number):
                    self.heartbeats.append((time.monotonic(), event))
                    if self.echoing:
                        stream.session.echo(number)
                case s.AgentDraining():
                    self.drained = True
                case s.SessionEnded():
                    self.ended.append(event)

    def _greet(self, stream: _Stream, event: s.HelloArrived) -> None:
        self.hellos.append(event.hello)
        if self.refuse_with is not None:
            stream.session.refuse_session(self.refuse_with)
            return
        if self._live is not None and self._live is not stream:
            self.ended.extend(self._live.session.replace(event.hello.instance_id))  # type: ignore[arg-type]
            self._live.changed()
        keep = [
            (key, self.jobs[key.task_id].traceparent)
            for key, _ in event.held
            if key.task_id in self.jobs and self.jobs[key.task_id].fence == key.fence
        ]
        self._epoch += 1
        stream.session.welcome(session_epoch=self._epoch, keep=keep, now=time.monotonic())
        self._live = stream

    def _result(self, stream: _Stream, key: AttemptKey, result: pb.Result) -> None:
        job = self.jobs[key.task_id]
        job.results += 1
        if job.fence != key.fence:
            stream.session.refuse(key, StaleFence("stale"))
            return
        job.result, job.state = result, "ended"
        if self.acknowledging:
            stream.session.acknowledge(key)


class _Stream:
    """One stream: a reader, a writer, and the machine's timer."""

    def __init__(self, orchestrator: Orchestrator, context: Any) -> None:
        self.orchestrator = orchestrator
        self.context = context
        self.session = s.OrchestratorSession(orchestrator.options, time.monotonic())
        self.cut = asyncio.Event()
        self.cut_status = grpc.StatusCode.UNAVAILABLE
        self._wake = asyncio.Event()

    def changed(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        writer = asyncio.create_task(self._write())
        reader = asyncio.create_task(self._read())
        cut = asyncio.create_task(self.cut.wait())
        try:
            await asyncio.wait([writer, reader, cut], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.orchestrator.take(self, self.session.connection_lost(time.monotonic()))
            for each in (reader, cut):
                each.cancel()
            # A write under way must end before anything else may be done with the call.
            self._wake.set()
            await asyncio.gather(reader, writer, cut, return_exceptions=True)
        if self.cut.is_set() and self.cut_status is not grpc.StatusCode.OK:
            await self.context.abort(self.cut_status, "the wire is cut")
        for each in (reader, writer):
            if not each.cancelled() and isinstance(error := each.exception(), OrkiError):
                await abort(self.context, error)

    async def _read(self) -> None:
        while (request := await self.context.read()) is not grpc.aio.EOF:
            for message in request.messages:
                self.orchestrator.traceparents.add((str(message.WhichOneof("body")), message.traceparent))
            self.orchestrator.take(self, self.session.receive_batch(request.messages, time.monotonic()))
            await self.orchestrator.dispatch()
            self.changed()

    async def _write(self) -> None:
        while True:
            while (response := self.session.messages_to_send()) is not None:
                await self.context.write(response)
            if self.session.state is s.OrchestratorState.ENDED:
                return
            due = self.session.next_timer()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                    await self._wake.wait()
            except TimeoutError:
                self.orchestrator.take(self, self.session.handle_timer(time.monotonic()))
            self._wake.clear()


@pytest.fixture
async def orchestrator() -> AsyncIterator[Orchestrator]:
    """A running orchestrator, whose port stays the same over `stop` and `start`."""
    async with AsyncExitStack() as stack:
        running = Orchestrator()
        await running.start()
        stack.push_async_callback(running.stop)
        yield running


@pytest.fixture
def mismatch() -> OrkiError:
    """What an orchestrator says to a contract that differs."""
    return ContractMismatch("service agentwork.v1.WorkService is live with another contract")


class Served:
    """An `orki serve` process."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    async def end(self, number: signal.Signals) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)
        await self.process.communicate()


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with EmbeddedServer() as server:
        yield server.url


@pytest.fixture
async def serve(store: str, work_path: Path) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """Starts orchestrators on the store; ends what is left of them."""
    started: list[Served] = []

    async def start(*arguments: str, listen: str = "127.0.0.1:0", redis: str = store) -> Served:
        command = (sys.executable, "-m", "orki_server", "serve", "--redis", redis, "--listen", listen, "--json")
        process = await asyncio.create_subprocess_exec(*command, *arguments, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async with asyncio.timeout(30):
            ready = json.loads(await process.stdout.readline())
        started.append(Served(process, ready["address"]))
        return started[-1]

    yield start
    await asyncio.gather(*(each.end(signal.SIGTERM) for each in started))
