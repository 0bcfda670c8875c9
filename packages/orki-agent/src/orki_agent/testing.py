"""Running one handler in process, without an orchestrator: what an agent's author tests with.

```python
async def test_reviews_an_empty_file():
    run = await run_handler(Reviewer().review_file, ReviewFileRequest(path="a.py"), tools=[FakeTools()])
    assert run.response.lines == 0
    assert [delta.fraction for delta in run.progress] == [0.5]
```

The handler, its context and its tools (over a real bridge) are those of a real agent; only the session is not there.
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
from orki_agent.async_handlers import AsyncExecution
from orki_agent.catalog import Handler, find_handlers
from orki_agent.crossing import Mailbox
from orki_agent.execution import Execution
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_agent.outcomes import decode
from orki_agent.surroundings import Offered
from orki_agent.sync_handlers import SyncExecution
from orki_agent.tool_access import ToolAccess, ToolServices
from orki_contract import EventStream, SyncToolChannel, TaskChannel, ToolChannel
from orki_contract.errors import Cancelled, InvalidSetting, OrkiError, WaitTimeout, error_for
from orki_contract.trace import Span, new_span
from orki_control.session import DEFAULT_MESSAGE_BYTES, AttemptKey, Outcome

__all__ = ["HandlerRun", "Published", "RunningHandler", "run_handler", "start_handler"]

E = TypeVar("E", bound=Message)

_ATTEMPT: Final = AttemptKey("test-task", 1, 1)


class Published(NamedTuple):
    """An event that a handler published, or that its tool calls became."""

    stream: str
    event: Message
    span: Span


@dataclass(slots=True)
class HandlerRun:
    """What came of a handler.

    Attributes:
        progress: Its progress, in order.
        usage: Its uses of language models.
        events: All that was published, tool calls among them.
        failure: What the orchestrator would have been told, had it failed; None where it did not.
        cancelled: Whether it ended because it was cancelled.
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
            OrkiError: The typed error that the submitter would see.
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
        """The events of one stream."""
        return [each.event for each in self.events if isinstance(each.event, stream.message)]


class RunningHandler:
    """A handler at work in a test."""

    def __init__(self, execution: Execution, run: HandlerRun, ended: asyncio.Event, flush: Callable[[], None]) -> None:
        self._execution = execution
        self._flush = flush
        self._run = run
        self._ended = ended

    @property
    def so_far(self) -> HandlerRun:
        """What has come of it by now."""
        return self._run

    def direct(self, directive: Message) -> None:
        """Sends a directive."""
        self._execution.direct(directive.SerializeToString())

    def cancel(self) -> None:
        """Asks for its end, as an orchestrator would; asking again asks harder."""
        self._execution.cancel()

    async def wait(self, timeout: float = 10.0) -> HandlerRun:
        """Waits for its end.

        Raises:
            WaitTimeout: It took longer than `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        except TimeoutError:
            raise WaitTimeout(f"the handler has not ended within {timeout} s") from None
        self._flush()
        return self._run


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
    """Runs a handler to its end.

    Args:
        handler: A bound method of a task service, such as `Reviewer().review_file`.
        request: Its request.
        directives: Sent at once, in this order.
        tools: Tool services behind `ctx.tools`, on a real bridge in this process.
        client: What `ctx.client` gives.
        cancel_after: Seconds until somebody asks for its end; None for nobody.
        timeout: Longest wait in seconds.

    Raises:
        WaitTimeout: It took longer than `timeout`.
        InvalidSetting: `handler` is no method of a task service.
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
    """Starts a handler, for tests that speak to it while it runs. It is cancelled at the end, if it still runs.

    The handler has been called when the block begins: a cancel from there is one that it sees.
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
    bench = _Bench(run, found, client, services, loop)
    offered = Offered(attempt, request.SerializeToString(), new_span())
    crew = ThreadPool("orki-test-handler")
    execution: Execution
    if found.is_async:
        execution = AsyncExecution(offered, replace(found, call=call), bench, on_end, user, 64)
    else:
        execution = SyncExecution(offered, replace(found, call=call), bench, on_end, crew, 64)
    bench.execution = execution
    bench.tools.start(user.post)
    running = RunningHandler(execution, run, ended, bench.tools.flush)
    try:
        execution.start()
        await begun.wait()
        yield running
    finally:
        if not ended.is_set():
            execution.cancel()
            await running.wait()
        await bench.tools.close()
        crew.close(1.0)


class _Bench:
    """Surroundings that remember."""

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
        self.execution.grant(1)

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
            raise InvalidSetting("the handler submits tasks: give the test a client=")
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
    raise InvalidSetting(f"{handler!r} is no handler: give a bound method of a task service, such as Reviewer().review")


def _take(run: HandlerRun, handler: Handler, outcome: Outcome) -> None:
    if isinstance(outcome, bytes):
        run._response = decode(handler.task.response, outcome, "response")
    elif isinstance(outcome, Failure):
        run.failure = outcome
    else:
        run.cancelled = True
