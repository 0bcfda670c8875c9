"""The seams between generated code and the runtimes.

Generated code declares; the runtimes behave. Between them stand these Protocols and base classes: a runtime implements
the Protocols, generated bases and clients speak to nothing else.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

from google.protobuf.message import Message

from orki_contract.handles import EventStream, Payload, Task, Tool
from orki_contract.trace import Span

if TYPE_CHECKING:
    # PEP 696 defaults; type checkers bring their own copy of typing_extensions, so nothing is installed for it.
    from typing_extensions import TypeVar

    D = TypeVar("D", default=Any)
    D_co = TypeVar("D_co", default=Any, covariant=True)
    P_contra = TypeVar("P_contra", default=Any, contravariant=True)
else:
    from typing import TypeVar

    D = TypeVar("D")
    D_co = TypeVar("D_co", covariant=True)
    P_contra = TypeVar("P_contra", contravariant=True)

__all__ = [
    "AsyncTaskService",
    "AsyncToolService",
    "SyncTaskContext",
    "SyncTaskService",
    "SyncToolChannel",
    "SyncToolService",
    "SyncToolStub",
    "TaskChannel",
    "TaskContext",
    "TaskHandle",
    "TaskStub",
    "ToolCall",
    "ToolChannel",
    "ToolStub",
]

C = TypeVar("C")
E = TypeVar("E", bound=Message)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
R_co = TypeVar("R_co", bound=Message, covariant=True)
P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
D_contra = TypeVar("D_contra", contravariant=True)
TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


class _OneOrTwoParameters:
    """Lets `TaskContext[Progress]` be written at run time, where the second parameter has no default before 3.13."""

    def __class_getitem__(cls, parameters: Any) -> Any:
        return cls


class _Attempt(Protocol):
    """What every task context knows of its attempt."""

    @property
    def task_id(self) -> str:
        """The task."""
        ...

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        ...

    @property
    def fence(self) -> int:
        """Rises with every attempt, never repeats: hand it to stores downstream, so that they refuse older writers."""
        ...

    @property
    def span(self) -> Span:
        """The attempt's span."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the end of the attempt."""
        ...

    def usage(
        self,
        *,
        model: str,
        input_tokens: int,
        output_tokens: int,
        provider: str = "",
        cached_tokens: int = 0,
        cost_micros: int = 0,
    ) -> None:
        """Records the use of a language model; cost in millionths of a US dollar. Never blocks on I/O."""
        ...


if TYPE_CHECKING:

    class TaskContext(_Attempt, Protocol[P_contra, D_co]):
        """What an async handler gets: `TaskContext[Progress, Directive]`; the second may be left out."""

        async def progress(self, delta: P_contra) -> None:
            """Sends news to whoever watches; waits while too much of it is on its way."""

        def directives(self) -> AsyncIterator[D_co]:
            """Directives as they come; ends when the attempt does."""
            ...

        async def publish(self, stream: EventStream[E, Any], event: E) -> None:
            """Publishes an event in the attempt's trace; returns once the server has it."""

        def tools(self, client: Callable[[ToolChannel], C]) -> C:
            """A client of tools over the hot path, such as the generated `SourceToolServiceClient`."""
            ...

        @property
        def client(self) -> TaskChannel:
            """For submitting further tasks, in the same trace."""
            ...

    class SyncTaskContext(_Attempt, Protocol[P_contra, D_co]):
        """What a sync handler gets; its methods block the handler's own thread."""

        def progress(self, delta: P_contra) -> None:
            """Sends news to whoever watches; waits while too much of it is on its way."""

        def directives(self) -> Iterator[D_co]:
            """Directives as they come; ends when the attempt does."""
            ...

        def publish(self, stream: EventStream[E, Any], event: E) -> None:
            """Publishes an event in the attempt's trace; returns once the server has it."""

        def tools(self, client: Callable[[SyncToolChannel], C]) -> C:
            """A sync client of tools over the hot path, such as the generated `SourceToolServiceSyncClient`."""
            ...

        def raise_if_cancelled(self) -> None:
            """Raises `Cancelled` once somebody has asked for the end of the attempt; call it in long loops."""

else:

    class TaskContext(_OneOrTwoParameters):
        """What an async handler gets: `TaskContext[Progress, Directive]`; the second may be left out."""

    class SyncTaskContext(_OneOrTwoParameters):
        """What a sync handler gets; its methods block the handler's own thread."""


class TaskHandle(Protocol[R_co, P_co, D_contra]):
    """A submitted task."""

    @property
    def task_id(self) -> str:
        """The task."""
        ...

    def progress(self) -> AsyncIterator[P_co]:
        """The task's news, from its beginning, until it ends."""
        ...

    async def result(self, timeout: float | None = None) -> R_co:
        """The response. Without a limit it waits as long as it takes, an orchestrator that is gone for good included.

        Args:
            timeout: Longest wait in seconds; None for no limit. The task goes on after it.

        Raises:
            WaitTimeout: It took longer than `timeout`.
            OrkiError: The typed error for which the task failed or was cancelled.
        """
        ...

    async def cancel(self, message: str = "") -> None:
        """Asks for the task's end; harmless when it has ended."""

    async def direct(self, directive: D_contra) -> None:
        """Sends a directive to the running attempt.

        Raises:
            NotDirectable: The task is not running.
        """


class TaskChannel(Protocol):
    """Whatever submits tasks: `orki_control.Client`, or `ctx.client` inside a handler."""

    async def submit(self, task: Task[Q, R, P, D], request: Q, *, idempotency_key: str = "") -> TaskHandle[R, P, D]:
        """Submits one task; when it returns the task survives the orchestrator's death."""
        ...

    async def submit_many(
        self, task: Task[Q, R, P, D], requests: list[Q], *, idempotency_keys: list[str] | None = None
    ) -> list[TaskHandle[R, P, D]]:
        """Submits many tasks of one method in few calls; handles in the order of the requests."""
        ...


class TaskStub(Generic[Q, R, P, D]):
    """One method of a generated client: call it for the response, or submit for a handle."""

    __slots__ = ("_channel", "_task")

    def __init__(self, channel: TaskChannel, task: Task[Q, R, P, D]) -> None:
        self._channel = channel
        self._task = task

    async def __call__(self, request: Q, *, idempotency_key: str = "", timeout: float | None = None) -> R:
        """Submits and waits; limit and errors as those of `TaskHandle.result`."""
        handle = await self._channel.submit(self._task, request, idempotency_key=idempotency_key)
        return await handle.result(timeout)

    async def submit(self, request: Q, *, idempotency_key: str = "") -> TaskHandle[R, P, D]:
        """Submits; same key and same request give the same task again."""
        return await self._channel.submit(self._task, request, idempotency_key=idempotency_key)

    async def submit_many(
        self, requests: list[Q], *, idempotency_keys: list[str] | None = None
    ) -> list[TaskHandle[R, P, D]]:
        """Submits many in few calls; handles in the order of the requests."""
        return await self._channel.submit_many(self._task, requests, idempotency_keys=idempotency_keys)


class ToolChannel(Protocol):
    """Whatever carries tool calls for async callers."""

    async def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """One call.

        Args:
            tool: Which.
            request: Its request.
            timeout: Longest time in seconds; None for the contract's.

        Raises:
            ToolDeadline, ToolFailed, ToolCancelled, PeerLost, UnknownOpcode, TooManyCalls, FrameTooLarge.
        """
        ...


class SyncToolChannel(Protocol):
    """Whatever carries tool calls for blocking callers."""

    def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """One call; arguments and errors as those of `ToolChannel.call`."""
        ...


class ToolStub(Generic[TQ, TR]):
    """One method of a generated async tool client: call it and await the response."""

    __slots__ = ("_channel", "_tool")

    def __init__(self, channel: ToolChannel, tool: Tool[TQ, TR]) -> None:
        self._channel = channel
        self._tool = tool

    def __call__(self, request: TQ, *, timeout: float | None = None) -> Coroutine[Any, Any, TR]:
        """One call; arguments and errors as those of `ToolChannel.call`."""
        return self._channel.call(self._tool, request, timeout=timeout)


class SyncToolStub(Generic[TQ, TR]):
    """One method of a generated blocking tool client."""

    __slots__ = ("_channel", "_tool")

    def __init__(self, channel: SyncToolChannel, tool: Tool[TQ, TR]) -> None:
        self._channel = channel
        self._tool = tool

    def __call__(self, request: TQ, *, timeout: float | None = None) -> TR:
        """One call; arguments and errors as those of `ToolChannel.call`."""
        return self._channel.call(self._tool, request, timeout=timeout)


class ToolCall(Protocol):
    """What a tool's handler knows of the call."""

    @property
    def span(self) -> Span | None:
        """The caller's span."""
        ...

    @property
    def client(self) -> str:
        """Name that the caller gave in its hello."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether the caller has gone, gave up, or ran out of time."""
        ...


class AsyncTaskService(ABC):  # noqa: B024 - the generated subclasses bring the abstract methods
    """Base of generated task services whose handlers are coroutines."""

    TASKS: ClassVar[tuple[Task[Any, Any, Any, Any], ...]] = ()


class SyncTaskService(ABC):  # noqa: B024
    """Base of generated task services whose handlers block and run in threads."""

    TASKS: ClassVar[tuple[Task[Any, Any, Any, Any], ...]] = ()


class AsyncToolService(ABC):  # noqa: B024
    """Base of generated tool services whose handlers are coroutines."""

    TOOLS: ClassVar[tuple[Tool[Any, Any], ...]] = ()


class SyncToolService(ABC):  # noqa: B024
    """Base of generated tool services whose handlers block."""

    TOOLS: ClassVar[tuple[Tool[Any, Any], ...]] = ()
