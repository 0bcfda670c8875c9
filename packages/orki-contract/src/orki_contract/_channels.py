"""The protocols between generated code and the runtimes: contexts, channels, handles of tasks, stubs and service bases.

The runtimes implement the protocols; generated base classes and clients use only these.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, Protocol, Unpack

from google.protobuf.message import Message

from orki_contract._handles import TQ, TR, E, EventStream, P, Q, R, SubmitSettings, Task, Tool
from orki_contract.model import BudgetLeft
from orki_contract.trace import Span

if TYPE_CHECKING:
    # PEP 696 defaults; type checkers bring their own copy of typing_extensions, so nothing is installed for it.
    from typing_extensions import TypeVar

    D = TypeVar("D", default=Any)
    D_co = TypeVar("D_co", default=Any, covariant=True)
    P_contra = TypeVar("P_contra", default=Any, contravariant=True)
    K = TypeVar("K", default=bytes)
    A_co = TypeVar("A_co", default=bytes, covariant=True)
else:
    from typing import TypeVar

    D = TypeVar("D")
    D_co = TypeVar("D_co", covariant=True)
    P_contra = TypeVar("P_contra", contravariant=True)

C = TypeVar("C")
R_co = TypeVar("R_co", bound=Message, covariant=True)
P_co = TypeVar("P_co", covariant=True)
D_contra = TypeVar("D_contra", contravariant=True)


class _Parameters:
    """Allows `TaskContext[Progress]` at run time, since type parameters have no defaults before Python 3.13."""

    def __class_getitem__(cls, parameters: Any) -> Any:
        return cls


class _Attempt(Protocol):
    """The attempt that a task context belongs to."""

    @property
    def task_id(self) -> str:
        """Id of the task."""

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""

    @property
    def fence(self) -> int:
        """A number that increases with every attempt. Pass it to other stores so that they reject older writers."""

    @property
    def span(self) -> Span:
        """The attempt's span."""

    @property
    def cancelled(self) -> bool:
        """Whether cancellation was requested."""

    @property
    def answer_overdue(self) -> bool:
        """Whether the last suspension of the task ended without an answer, by its deadline."""

    @property
    def budget(self) -> BudgetLeft:
        """What is left of the budgets that the task is charged to, as far as the agent knows."""

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
        """Record the use of a language model; the cost is in millionths of a US dollar. Does not block on I/O.

        It is charged to the task's budgets. If one of them is used up, this raises `orki_agent.BudgetUsedUp` after the
        use was recorded, which ends the attempt. The task goes on with another attempt when the budget is raised.
        """


if TYPE_CHECKING:

    class TaskContext(_Attempt, Protocol[P_contra, D_co, K, A_co]):
        """The context of an async handler: `TaskContext[Progress, Directive, Checkpoint, Answer]`; all are optional."""

        async def progress(self, delta: P_contra) -> None:
            """Send progress to watchers. While too much is not stored, the contract's progress policy applies."""

        def directives(self) -> AsyncIterator[D_co]:
            """Iterate over directives as they arrive, until the attempt ends."""

        @property
        def checkpoint(self) -> K | None:
            """The last checkpoint that an earlier attempt of the task, or this one, has stored."""

        async def save_checkpoint(self, checkpoint: K) -> None:
            """Save a checkpoint for the next attempt, in place of the last one. Returns after it is stored."""

        @property
        def answer(self) -> A_co | None:
            """The answer to the last suspension of the task."""

        async def suspend(self, question: str = "", *, deadline: float | None = None) -> NoReturn:
            """End this attempt until the task is answered. It raises an exception, which must not be caught.

            The next attempt has the answer as `ctx.answer`. With a deadline in seconds, the task goes on without an
            answer after it, and `ctx.answer_overdue` is true. No slot is held meanwhile, and no attempt is counted.
            """

        async def publish(self, stream: EventStream[E, Any], event: E) -> None:
            """Publish an event in the attempt's trace. Returns after the server has stored it."""

        def tools(self, client: Callable[[ToolChannel], C]) -> C:
            """Return a hot-path tool client, such as the generated `SourceToolServiceClient`."""

        @property
        def client(self) -> TaskChannel:
            """A client that submits further tasks in the same trace."""

    class SyncTaskContext(_Attempt, Protocol[P_contra, D_co, K, A_co]):
        """The context of a sync handler. Its methods block the handler's thread."""

        def progress(self, delta: P_contra) -> None:
            """Send progress to watchers. While too much is not stored, the contract's progress policy applies."""

        def directives(self) -> Iterator[D_co]:
            """Iterate over directives as they arrive, until the attempt ends."""

        @property
        def checkpoint(self) -> K | None:
            """The last checkpoint that an earlier attempt of the task, or this one, has stored."""

        def save_checkpoint(self, checkpoint: K) -> None:
            """Save a checkpoint for the next attempt, in place of the last one. Returns after it is stored."""

        @property
        def answer(self) -> A_co | None:
            """The answer to the last suspension of the task."""

        def suspend(self, question: str = "", *, deadline: float | None = None) -> NoReturn:
            """End this attempt until the task is answered. It raises an exception, which must not be caught.

            The next attempt has the answer as `ctx.answer`. With a deadline in seconds, the task goes on without an
            answer after it, and `ctx.answer_overdue` is true. No slot is held meanwhile, and no attempt is counted.
            """

        def publish(self, stream: EventStream[E, Any], event: E) -> None:
            """Publish an event in the attempt's trace. Returns after the server has stored it."""

        def tools(self, client: Callable[[SyncToolChannel], C]) -> C:
            """Return a sync hot-path tool client, such as the generated `SourceToolServiceSyncClient`."""

        def raise_if_cancelled(self) -> None:
            """Raise `Cancelled` if cancellation was requested. Call it in long loops."""

else:

    class TaskContext(_Parameters):
        """The context of an async handler: `TaskContext[Progress, Directive, Checkpoint, Answer]`; all are optional."""

    class SyncTaskContext(_Parameters):
        """The context of a sync handler. Its methods block the handler's thread."""


@dataclass(frozen=True, slots=True)
class ProgressGap:
    """Deltas of a task that a watcher cannot get: they were dropped, lost, or trimmed before the watcher read them.

    Attributes:
        attempt: The attempt. If whole attempts are missing, the first of them.
        first: Number of the first missing delta within the attempt, from 1.
        last: Number of the last missing delta, counted on from the first.
    """

    attempt: int
    first: int
    last: int

    @property
    def count(self) -> int:
        """Number of missing deltas."""
        return self.last - self.first + 1


class TaskHandle(Protocol[R_co, P_co, D_contra]):
    """A submitted task."""

    @property
    def task_id(self) -> str:
        """Id of the task."""

    def progress(self, on_gap: Callable[[ProgressGap], object] | None = None) -> AsyncIterator[P_co]:
        """Iterate over all progress of the task, from its start to its end.

        Args:
            on_gap: Called in place of deltas that are missing, before the next delta. Without it, each gap is logged
                as a warning.
        """

    async def result(self, timeout: float | None = None) -> R_co:
        """Wait for the response. Without a timeout it waits forever, even if the orchestrator stays down.

        Args:
            timeout: Maximum wait in seconds; None for no limit. The task continues after a timeout.

        Raises:
            WaitTimeout: The timeout has elapsed.
            OrkiError: The task failed or was cancelled; the error's class gives the reason.
        """

    async def cancel(self, message: str = "") -> None:
        """Request cancellation. Has no effect on a task that has ended."""

    async def direct(self, directive: D_contra) -> None:
        """Send a directive to the running attempt.

        Raises:
            NotDirectable: The task is not running.
        """

    async def answer(self, answer: Message | bytes, *, suspension: int = 0) -> None:
        """Answer the suspended task, which goes on.

        Args:
            answer: The method's answer message; bytes if the method declares none.
            suspension: Number of the suspension; 0 for the current one.

        Raises:
            NotSuspended: The task is not suspended.
            AlreadyAnswered: It was answered before, with another answer.
        """


class TaskChannel(Protocol):
    """Submits tasks: `orki_control.Client`, or `ctx.client` inside a handler."""

    async def submit(
        self, task: Task[Q, R, P, D], request: Q, *, idempotency_key: str = "", **settings: Unpack[SubmitSettings]
    ) -> TaskHandle[R, P, D]:
        """Submit one task. Once this returns, the task survives an orchestrator crash."""

    async def submit_many(
        self,
        task: Task[Q, R, P, D],
        requests: list[Q],
        *,
        idempotency_keys: list[str] | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> list[TaskHandle[R, P, D]]:
        """Submit many tasks of one method in few calls. Handles are in the order of the requests."""


class TaskStub(Generic[Q, R, P, D]):
    """One method of a generated client. Call it for the response, or use `submit` for a handle."""

    __slots__ = ("_channel", "_task")

    def __init__(self, channel: TaskChannel, task: Task[Q, R, P, D]) -> None:
        self._channel = channel
        self._task = task

    async def __call__(
        self,
        request: Q,
        *,
        idempotency_key: str = "",
        timeout: float | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> R:
        """Submit a task and wait for its response. `timeout` and errors are those of `TaskHandle.result`."""
        # A channel that knows at the submission that somebody waits saves a request. The method is optional.
        call: Callable[..., Coroutine[Any, Any, R]] | None = getattr(self._channel, "call", None)
        if call is not None:
            return await call(self._task, request, idempotency_key=idempotency_key, timeout=timeout, **settings)
        handle = await self._channel.submit(self._task, request, idempotency_key=idempotency_key, **settings)
        return await handle.result(timeout)

    async def submit(
        self, request: Q, *, idempotency_key: str = "", **settings: Unpack[SubmitSettings]
    ) -> TaskHandle[R, P, D]:
        """Submit a task. Submitting the same request again with the same key returns the same task."""
        return await self._channel.submit(self._task, request, idempotency_key=idempotency_key, **settings)

    async def submit_many(
        self, requests: list[Q], *, idempotency_keys: list[str] | None = None, **settings: Unpack[SubmitSettings]
    ) -> list[TaskHandle[R, P, D]]:
        """Submit many tasks in few calls. Handles are in the order of the requests."""
        return await self._channel.submit_many(self._task, requests, idempotency_keys=idempotency_keys, **settings)


class ToolChannel(Protocol):
    """Carries tool calls of async callers."""

    async def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """Call a tool.

        Args:
            tool: The tool.
            request: Its request.
            timeout: Maximum time in seconds; None for the contract's.

        Raises:
            ToolDeadline, ToolFailed, ToolCancelled, PeerLost, UnknownOpcode, TooManyCalls, FrameTooLarge.
        """


class SyncToolChannel(Protocol):
    """Carries tool calls of blocking callers."""

    def call(self, tool: Tool[TQ, TR], request: TQ, *, timeout: float | None = None) -> TR:
        """Call the tool. Arguments and errors are those of `ToolChannel.call`."""


class ToolStub(Generic[TQ, TR]):
    """One method of a generated async tool client."""

    __slots__ = ("_channel", "_tool")

    def __init__(self, channel: ToolChannel, tool: Tool[TQ, TR]) -> None:
        self._channel = channel
        self._tool = tool

    def __call__(self, request: TQ, *, timeout: float | None = None) -> Coroutine[Any, Any, TR]:
        """Call the tool. Arguments and errors are those of `ToolChannel.call`."""
        return self._channel.call(self._tool, request, timeout=timeout)


class SyncToolStub(Generic[TQ, TR]):
    """One method of a generated blocking tool client."""

    __slots__ = ("_channel", "_tool")

    def __init__(self, channel: SyncToolChannel, tool: Tool[TQ, TR]) -> None:
        self._channel = channel
        self._tool = tool

    def __call__(self, request: TQ, *, timeout: float | None = None) -> TR:
        """Call the tool. Arguments and errors are those of `ToolChannel.call`."""
        return self._channel.call(self._tool, request, timeout=timeout)


class ToolCall(Protocol):
    """The call that a tool's handler serves."""

    @property
    def span(self) -> Span | None:
        """The caller's span."""

    @property
    def client(self) -> str:
        """Name of the caller, from its hello message."""

    @property
    def cancelled(self) -> bool:
        """Whether the caller disconnected, cancelled, or timed out."""


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
