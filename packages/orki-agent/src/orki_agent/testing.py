"""Tests of handlers: run one handler in this process, without an orchestrator.

```python
async def test_reviews_an_empty_file():
    run = await run_handler(Reviewer().review_file, ReviewFileRequest(path="a.py"), tools=[FakeTools()])
    assert run.response.lines == 0
    assert [delta.fraction for delta in run.progress] == [0.5]
```

The handler, its context and its tools (over a real bridge) are those of a real agent. Only the session is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import Failure
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_agent._handlers import AsyncExecution, Execution, SyncExecution, decode
from orki_agent._services import Handler, Offered, find_handlers
from orki_agent._threads import Mailbox
from orki_agent._tools import ToolAccess, ToolServices
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_contract import EventStream, SyncToolChannel, TaskChannel, ToolChannel
from orki_contract.errors import Cancelled, InvalidSetting, OrkiError, WaitTimeout, error_for
from orki_contract.trace import Span, new_span
from orki_control.session import DEFAULT_MESSAGE_BYTES, AttemptKey, Outcome

__all__ = ["HandlerRun", "Published", "RunningHandler", "run_handler", "start_handler"]

E = TypeVar("E", bound=Message)

_ATTEMPT: Final = AttemptKey("test-task", 1, 1)


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
        usage: Its uses of language models.
        events: All published events, including those of tool calls.
        failure: The failure that the orchestrator would receive; None for a handler that succeeded.
        cancelled: Whether the handler ended because it was cancelled.
    """

    progress: list[Any] = field(default_factory=list)
    usage: list[UsageEvent] = field(default_factory=list)
    events: list[Published] = field(default_factory=list)
    failure: Failure | None = None
    cancelled: bool = False
    _response: Any = None

    @property
    def response(self) -> Any:
        """The response.

        Raises:
            OrkiError: The typed error that the submitter would receive.
        """
        if self.cancelled:
            raise Cancelled("the handler was cancelled")
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

    def __init__(self, execution: Execution, run: HandlerRun, ended: asyncio.Event, flush: Callable[[], None]) -> None:
        self._execution = execution
        self._flush = flush
        self.run = run
        self._ended = ended

    def direct(self, directive: Message) -> None:
        """Send a directive."""
        self._execution.direct(directive.SerializeToString())

    def cancel(self) -> None:
        """Cancel the handler, as an orchestrator would. A repeated call cancels again."""
        self._execution.cancel()

    async def wait(self, timeout: float = 10.0) -> HandlerRun:
        """Wait for its end.

        Raises:
            WaitTimeout: The handler did not end within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
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
        cancel_after: Seconds until the handler is cancelled; None for no cancel.
        timeout: Maximum wait in seconds.

    Raises:
        WaitTimeout: The handler did not end within `timeout`.
        InvalidSetting: `handler` is not a method of a task service.
    """
    async with start_handler(handler, request, tools=tools, client=client) as running:
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
    attempt: AttemptKey = _ATTEMPT,
) -> AsyncIterator[RunningHandler]:
    """Start a handler, for tests that interact with it. It is cancelled at the end of the block if it still runs.

    The handler was called before the block begins, so it sees a cancel from there.
    """
    found = _find(handler)
    run = HandlerRun()
    begun, ended = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    user = Mailbox(loop)

    def on_end(outcome: Outcome) -> None:
        user.post(_take, run, found, outcome)
        user.post(begun.set)
        user.post(ended.set)

    def call(*arguments: Any) -> Any:
        user.post(begun.set)
        return found.call(*arguments)

    services = tuple(tools) if isinstance(tools, Iterable) else (tools,)
    agent = _TestAgent(run, found, client, services, loop)
    offered = Offered(attempt, request.SerializeToString(), new_span())
    pool = ThreadPool("orki-test-handler")
    execution: Execution
    if found.is_async:
        execution = AsyncExecution(offered, replace(found, call=call), agent, on_end, user, 64)
    else:
        execution = SyncExecution(offered, replace(found, call=call), agent, on_end, pool, 64)
    agent.execution = execution
    agent.tools.start(user.post)
    running = RunningHandler(execution, run, ended, agent.tools.flush)
    try:
        execution.start()
        await begun.wait()
        yield running
    finally:
        if not ended.is_set():
            execution.cancel()
            await running.wait()
        await agent.tools.close()
        pool.close(1.0)


class _TestAgent:
    """Agent services that record."""

    agent_id = "test-agent"
    max_payload_bytes = DEFAULT_MESSAGE_BYTES

    def __init__(
        self,
        run: HandlerRun,
        handler: Handler,
        client: TaskChannel | None,
        tools: tuple[ToolServices, ...],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.tools = ToolAccess(tools, None, self.agent_id, self.collect)
        self.execution: Execution | None = None
        self._run = run
        self._handler = handler
        self._client = client
        self._loop = loop

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        self._run.progress.append(decode(self._handler.task.progress, payload, "progress"))
        assert self.execution is not None
        self.execution.grant(1, len(payload))

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        if stream is USAGE:
            assert isinstance(event, UsageEvent)
            self._run.usage.append(event)
        self._run.events.append(Published(stream.contract.name, event, span))

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        self.collect(stream, event, span)

    def publish_blocking(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        self.collect(stream, event, span)

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
    name = getattr(handler, "__name__", "")
    try:
        handlers = find_handlers((service,)) if service is not None else {}
    except OrkiError:
        handlers = {}
    for each in handlers.values():
        if each.task.attribute == name:
            return each
    raise InvalidSetting(
        f"{handler!r} is not a handler: give a bound method of a task service, such as Reviewer().review"
    )


def _take(run: HandlerRun, handler: Handler, outcome: Outcome) -> None:
    if isinstance(outcome, bytes):
        run._response = decode(handler.task.response, outcome, "response")
    elif isinstance(outcome, Failure):
        run.failure = outcome
    else:
        run.cancelled = True
