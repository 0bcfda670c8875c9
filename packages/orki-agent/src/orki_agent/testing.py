"""Tests of handlers: run one handler in this process, without an orchestrator.

```python
async def test_reviews_an_empty_file():
    run = await run_handler(Reviewer().review_file, ReviewFileRequest(path="a.py"), tools=[FakeTools()])
    assert run.response.lines == 0
    assert [delta.fraction for delta in run.progress] == [0.5]
```

The handler, its context, its tools (over a real bridge), its attempt and both ends of its session are those of a real
agent. Only the network and the store are missing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.message import Message

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import Budget, Failure
from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_agent._checkpoints import checkpoint_payload, store_blocking
from orki_agent._outcomes import decode
from orki_agent._runner import Runner
from orki_agent._services import Handler, OnStored, find_handlers
from orki_agent._settings import ToolsAt
from orki_agent._threads import Mailbox
from orki_agent._tools import ToolAccess, ToolServices
from orki_contract import AsyncTaskService, EventStream, SyncTaskService, SyncToolChannel, TaskChannel, ToolChannel
from orki_contract.errors import Cancelled, InvalidArgument, InvalidSetting, NotDirectable, WaitTimeout, error_for
from orki_contract.trace import Span, new_span
from orki_control.session import (
    AgentSession,
    AgentSessionOptions,
    AttemptKey,
    CheckpointsArrived,
    OrchestratorSession,
    OrchestratorSessionOptions,
    ProgressArrived,
    ResultsArrived,
)

__all__ = ["HandlerRun", "Published", "RunningHandler", "run_handler", "start_handler"]

E = TypeVar("E", bound=Message)

_ATTEMPT: Final = AttemptKey("test-task", 1, 1)
_AGENT_ID: Final = "test-agent"
_WINDOW: Final = 64
_LEASE_MS: Final = 86_400_000
_ENDED_WITHIN: Final = 1.0
"""Seconds for a handler that ignored its cancel to end with its test."""


class Published(NamedTuple):
    """An event that a handler published, or the event of a tool call."""

    stream: str
    event: Message
    span: Span


@dataclass(slots=True)
class HandlerRun:
    """The result of a handler.

    Attributes:
        progress: Its progress messages, in order.
        checkpoints: Its checkpoints, in order.
        usage: Its uses of language models.
        events: All published events, including those of tool calls.
        failure: The failure that the orchestrator would receive; None for a handler that succeeded.
        suspended: The suspension that ended the attempt; None without one.
        cancelled: Whether the attempt ended because it was cancelled, also if its handler ignored the cancel.
    """

    progress: list[Any] = field(default_factory=list)
    usage: list[UsageEvent] = field(default_factory=list)
    events: list[Published] = field(default_factory=list)
    failure: Failure | None = None
    cancelled: bool = False
    _response: Any = None
    _cancelled_by: Reason.ValueType = Reason.REASON_UNSPECIFIED
    checkpoints: list[Any] = field(default_factory=list)
    suspended: pb.SuspendedOutcome | None = None

    @property
    def response(self) -> Any:
        """The response.

        Raises:
            OrkiError: The typed error that the submitter would receive.
            InvalidArgument: The handler suspended its task.
        """
        if self._cancelled_by == Reason.REASON_CANCEL_UNRESPONSIVE:
            raise error_for(self._cancelled_by, "the handler did not end after its cancel")
        if self.cancelled:
            raise Cancelled("the handler was cancelled")
        if self.suspended is not None:
            raise InvalidArgument(f"the handler has no response: it suspended its task: {self.suspended.question}")
        if self.failure is not None:
            text = self.failure.message
            if self.failure.error_type:
                text = f"{self.failure.error_type}: {text}"
            raise error_for(self.failure.reason, text)
        return self._response

    def of(self, stream: EventStream[E, Any]) -> list[E]:
        """Return the events of one stream."""
        return [each.event for each in self.events if isinstance(each.event, stream.message)]


class RunningHandler:
    """A handler that runs in a test.

    Attributes:
        run: Its result so far.
    """

    def __init__(self, session: _Session, run: HandlerRun, flush: Callable[[], None]) -> None:
        self._session = session
        self._flush = flush
        self.run = run

    def direct(self, directive: Message) -> None:
        """Send a directive.

        Raises:
            NotDirectable: The method declares no directive.
            InvalidArgument: `directive` is not the method's directive message.
        """
        task = self._session.handler.task
        if not issubclass(task.directive, Message):
            raise NotDirectable(f"{self._session.handler.name} declares no directive")
        _check(self._session.handler, "as its directive", task.directive, directive)
        self._session.direct(directive.SerializeToString())

    def cancel(self) -> None:
        """Cancel the attempt, as an orchestrator does. After the method's `cancel_grace` it ends in any case."""
        self._session.cancel()

    async def wait(self, timeout: float = 10.0) -> HandlerRun:
        """Wait for the end of the attempt.

        Raises:
            WaitTimeout: It did not end within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._session.ended.wait()
        except TimeoutError:
            raise WaitTimeout(f"the handler did not end within {timeout} s") from None
        self._flush()
        return self.run


async def run_handler(
    handler: Callable[[Any, Any], Any],
    request: Message,
    *,
    directives: Iterable[Message] = (),
    tools: ToolServices | Iterable[ToolServices] = (),
    client: TaskChannel | None = None,
    checkpoint: Message | bytes | None = None,
    answer: Message | bytes | None = None,
    cancel_after: float | None = None,
    timeout: float = 10.0,
) -> HandlerRun:
    """Run a handler to its end.

    Args:
        handler: A bound method of a task service, such as `Reviewer().review_file`.
        request: Its request.
        directives: Directives to send at once, in this order.
        tools: Tool services behind `ctx.tools`, on a real bridge in this process.
        client: The channel behind `ctx.client`.
        checkpoint: The checkpoint that an earlier attempt has saved.
        answer: The answer to the suspension of an earlier attempt.
        cancel_after: Seconds until the handler is cancelled; None for no cancel.
        timeout: Maximum wait in seconds.

    Raises:
        WaitTimeout: The handler did not end within `timeout`.
        InvalidSetting: `handler` is not a method of a task service, or an agent would refuse the service.
        InvalidArgument: `request` is not the method's request message.
        TooLarge: The orchestrator accepts no request of that size.
    """
    async with start_handler(
        handler, request, tools=tools, client=client, checkpoint=checkpoint, answer=answer
    ) as running:
        for directive in directives:
            running.direct(directive)
        if cancel_after is not None:
            asyncio.get_running_loop().call_later(cancel_after, running.cancel)
        return await running.wait(timeout)


@asynccontextmanager
async def start_handler(
    handler: Callable[[Any, Any], Any],
    request: Message,
    *,
    tools: ToolServices | Iterable[ToolServices] = (),
    client: TaskChannel | None = None,
    checkpoint: Message | bytes | None = None,
    answer: Message | bytes | None = None,
    attempt: AttemptKey = _ATTEMPT,
) -> AsyncIterator[RunningHandler]:
    """Start a handler, for tests that interact with it. It is cancelled at the end of the block if it still runs.

    The handler was called before the block begins, so it sees a cancel from there.

    Raises:
        InvalidSetting: `handler` is not a method of a task service, or an agent would refuse the service.
        InvalidArgument: `request` is not the method's request message.
        TooLarge: The orchestrator accepts no request of that size.
    """
    found = _find(handler)
    _check(found, "as its request", found.task.request, request)
    run = HandlerRun()
    services = tuple(tools) if isinstance(tools, Iterable) else (tools,)
    agent = _TestAgent(run, client, services)
    session = _Session(found, agent, run, attempt)
    agent.session = session
    kept = None if checkpoint is None else checkpoint_payload(found, checkpoint)
    if answer is not None:
        _check(found, "as its answer", found.task.answer, answer)
    answered = answer.SerializeToString() if isinstance(answer, Message) else answer
    session.offer(request.SerializeToString(), kept, answered)
    agent.tools.start(Mailbox(asyncio.get_running_loop()).post)
    try:
        await session.begun.wait()
        yield RunningHandler(session, run, agent.tools.flush)
    finally:
        await session.close()
        await agent.tools.close()


class _Session:
    """Both ends of a session, joined in this loop, and the runner of a real agent."""

    def __init__(self, handler: Handler, agent: _TestAgent, run: HandlerRun, attempt: AttemptKey) -> None:
        self.handler = handler
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self._run = run
        self._attempt = attempt
        self._loop = asyncio.get_running_loop()
        self._coroutines: list[Coroutine[Any, Any, Any]] = []
        self._agent = AgentSession(
            AgentSessionOptions(agent_id=_AGENT_ID, instance_id="test-instance", services=(), slots=1)
        )
        self._orchestrator = OrchestratorSession(
            OrchestratorSessionOptions(orchestrator_id="test-orchestrator"), self._loop.time()
        )
        self._mailbox = mailbox = Mailbox(self._loop)
        call = functools.wraps(handler.call)(lambda *arguments: self._call(*arguments))
        served = replace(handler, call=call)
        self.runner = Runner(self._agent, {handler.name: served}, agent, mailbox, mailbox, _WINDOW)
        self.runner.on_other = lambda event: None
        self._agent.connection_made(self._loop.time())
        self._exchange()
        self._orchestrator.welcome(session_epoch=1, now=self._loop.time())
        self._exchange()
        self._agent.on_change = self._orchestrator.on_change = self._changed
        self._exchanging = False

    @property
    def max_payload_bytes(self) -> int:
        return self._agent.max_payload_bytes

    def offer(self, request: bytes, checkpoint: bytes | None, answer: bytes | None) -> None:
        offer = pb.Offer(
            attempt=self._attempt.ref(),
            method=self.handler.name,
            request=request,
            lease_ms=_LEASE_MS,
            accept_timeout_ms=_LEASE_MS,
            checkpoint=checkpoint,
            answer=answer,
        )
        self._orchestrator.offer(offer, new_span().traceparent, self._loop.time())

    def direct(self, payload: bytes) -> None:
        self._exchange()
        self._orchestrator.direct(self._attempt, payload)

    def cancel(self) -> None:
        self._exchange()
        grace_ms = round(self.handler.task.contract.cancel_grace * 1000)
        self._orchestrator.cancel(self._attempt, grace_ms=grace_ms, message="a test cancels it")

    async def close(self) -> None:
        """Cancel the attempt if it runs, and end a handler that ignored its cancel."""
        if not self.ended.is_set():
            self.cancel()
            await self.ended.wait()
        for each in self._coroutines:
            # The loop could not be closed as long as a coroutine ignores every cancel.
            with suppress(RuntimeError, ValueError):
                each.close()
        self.runner.cancel_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(_ENDED_WITHIN):
                await self.runner.idle()
        self.runner.close(_ENDED_WITHIN)

    def _call(self, *arguments: Any) -> Any:
        self._mailbox.post(self.begun.set)  # A blocking handler is called in its thread.
        called = self.handler.call(*arguments)
        if asyncio.iscoroutine(called):
            self._coroutines.append(called)
        return called

    def _changed(self) -> None:
        if not self._exchanging:
            self._exchanging = True
            self._loop.call_soon(self._exchange)

    def _exchange(self) -> None:
        """Carry messages until neither end has more."""
        self._exchanging = False
        moved = True
        while moved:
            moved = False
            while (request := self._agent.messages_to_send()) is not None:
                moved = True
                self.runner.grant()
                self._take(self._orchestrator.receive_batch(request.messages, self._loop.time()))
            while (response := self._orchestrator.messages_to_send()) is not None:
                moved = True
                self.runner.handle(self._agent.receive_batch(response.messages, self._loop.time()))

    def _take(self, events: Iterable[Any]) -> None:
        task = self.handler.task
        for event in events:
            match event:
                case ProgressArrived(progress):
                    self._run.progress += [decode(task.progress, each.payload, "progress") for each in progress]
                    for each in progress:
                        self._orchestrator.acknowledge_progress(each.attempt, each.number)
                case CheckpointsArrived(checkpoints):
                    for key, number, payload in checkpoints:
                        kept = payload if task.checkpoint is bytes else decode(task.checkpoint, payload, "checkpoint")
                        self._run.checkpoints.append(kept)
                        self._orchestrator.acknowledge_checkpoint(key, number)
                case ResultsArrived(results):
                    for key, result in results:
                        self._end(result)
                        self._orchestrator.acknowledge(key)

    def _end(self, result: pb.Result) -> None:
        run = self._run
        match result.WhichOneof("outcome"):
            case "response":
                run._response = decode(self.handler.task.response, result.response, "response")
            case "failure":
                run.failure = result.failure
            case "suspended":
                run.suspended = result.suspended
            case _:
                run.cancelled, run._cancelled_by = True, result.cancelled.reason
        self.begun.set()
        self.ended.set()


class _TestAgent:
    """Agent services that record."""

    agent_id = _AGENT_ID
    session: _Session

    def __init__(self, run: HandlerRun, client: TaskChannel | None, tools: tuple[ToolServices, ...]) -> None:
        self.tools = ToolAccess(tools, None, self.agent_id, self.collect)
        self._run = run
        self._client = client

    @property
    def max_payload_bytes(self) -> int:
        return self.session.max_payload_bytes

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        self.session.runner.send_progress(attempt, payload)

    def report_usage(self, attempt: AttemptKey, total: Budget) -> None:
        self.session.runner.report_usage(attempt, total)

    def save_checkpoint(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        self.session.runner.save_checkpoint(attempt, payload, on_stored)

    def store_checkpoint(self, attempt: AttemptKey, payload: bytes) -> None:
        store_blocking(self.save_checkpoint, attempt, payload)

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        if stream is USAGE:
            assert isinstance(event, UsageEvent)
            self._run.usage.append(event)
        self._run.events.append(Published(stream.contract.name, event, span))

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        self.collect(stream, event, span)

    def publish_blocking(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        self.collect(stream, event, span)

    def tools_at(self) -> ToolsAt:
        return self.tools.tools_at()

    def tool_channel(self) -> ToolChannel:
        return self.tools.async_channel()

    def sync_tool_channel(self) -> SyncToolChannel:
        return self.tools.sync_channel()

    def task_channel(self) -> TaskChannel:
        if self._client is None:
            raise InvalidSetting("the handler submits tasks: pass client= to the test")
        return self._client


def _find(handler: Callable[[Any, Any], Any]) -> Handler:
    service = getattr(handler, "__self__", None)
    if isinstance(service, AsyncTaskService | SyncTaskService):
        for each in find_handlers((service,)).values():
            if each.call == handler:
                return each
    raise InvalidSetting(
        f"{handler!r} is not a handler: give a bound method of a task service, such as Reviewer().review"
    )


def _check(handler: Handler, role: str, expected: type[Any], given: object) -> None:
    if not isinstance(given, expected):
        raise InvalidArgument(f"{handler.name} declares {expected.__name__} {role}, not {type(given).__name__}")
