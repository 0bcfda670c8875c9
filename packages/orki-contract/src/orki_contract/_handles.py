"""What generated modules export: a contract beside the Python classes that it speaks of.

A handle is what user code passes around (`FINDINGS`, `REVIEW_FILE`). It carries the types for the type checker, the
message classes for the runtimes and the plain contract for everything else.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypedDict, Unpack, overload, runtime_checkable

from google.protobuf.message import Message

from orki_contract.model import Backoff, Frame, Group, Stream, TaskMethod, ToolMethod
from orki_contract.naming import snake_name
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


@runtime_checkable
class FrameType(Protocol):
    """A generated frame class.

    `FRAME` is the layout. `encode` gives block and tail as one `bytes` of `block_length + len(tail)`; it raises
    `FrameMalformed` for a value outside its field's range. `decode` takes what came behind the header and the
    *received* block length (SBE's rule): bytes of a longer block are skipped, fields behind a shorter one are None.
    """

    FRAME: ClassVar[Frame]

    def encode(self) -> bytes:
        """Block and tail."""
        ...

    @classmethod
    def decode(cls, body: bytes | memoryview, block_length: int) -> Self:
        """The frame in `body`, which holds the block and the tail."""
        ...


Payload = Message | FrameType
"""What a tool call may carry."""

E = TypeVar("E", bound=Message)
G = TypeVar("G", bound=str)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
P = TypeVar("P")
TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


@dataclass(frozen=True, slots=True, eq=False)
class EventStream(Generic[E, G]):
    """A stream: its entries are of class `E`, its groups are named by the literals `G`.

    Attributes:
        message: Class of the entries.
        contract: Everything else.
    """

    message: type[E]
    contract: Stream

    def with_groups(self, *groups: Group) -> EventStream[E, Any]:
        """The same stream with the groups that another package declares, and only those."""
        return EventStream(self.message, replace(self.contract, groups=tuple(sorted(groups))))


class TaskSettings(TypedDict, total=False):
    """The settings of a `TaskMethod`; what is left out has its default."""

    heartbeat_timeout: float
    attempt_timeout: float
    stall_timeout: float
    total_timeout: float
    max_attempts: int
    backoff: Backoff
    cancel_grace: float


class ToolSettings(TypedDict, total=False):
    """The settings of a `ToolMethod`; what is left out has its default."""

    timeout: float
    idempotent: bool


@dataclass(frozen=True, slots=True, eq=False)
class Task(Generic[Q, R, P, D]):
    """A task method; `P` and `D` are `None` where it has no progress or directives.

    Attributes:
        contract: Names and timeouts.
        attribute: Name of the handler's method and of the client's attribute.
        request: Class of the request.
        response: Class of the response.
        progress: Class of the progress, or None.
        directive: Class of the directives, or None.
    """

    contract: TaskMethod
    attribute: str
    request: type[Q]
    response: type[R]
    progress: type[P]
    directive: type[D]

    @overload
    @staticmethod
    def declare(
        method: str, *, request: type[Q], response: type[R], **settings: Unpack[TaskSettings]
    ) -> Task[Q, R, None, None]: ...

    @overload
    @staticmethod
    def declare(
        method: str, *, request: type[Q], response: type[R], progress: type[P], **settings: Unpack[TaskSettings]
    ) -> Task[Q, R, P, None]: ...

    @overload
    @staticmethod
    def declare(
        method: str, *, request: type[Q], response: type[R], directive: type[D], **settings: Unpack[TaskSettings]
    ) -> Task[Q, R, None, D]: ...

    @overload
    @staticmethod
    def declare(
        method: str,
        *,
        request: type[Q],
        response: type[R],
        progress: type[P],
        directive: type[D],
        **settings: Unpack[TaskSettings],
    ) -> Task[Q, R, P, D]: ...

    @staticmethod
    def declare(
        method: str,
        *,
        request: type[Any],
        response: type[Any],
        progress: type[Any] = NoneType,
        directive: type[Any] = NoneType,
        **settings: Unpack[TaskSettings],
    ) -> Task[Any, Any, Any, Any]:
        """A task method as generated code writes it down.

        Args:
            method: `package.Service/Method`.
            request: Class of the request.
            response: Class of the response.
            progress: Class of the progress; left out: it reports none.
            directive: Class of the directives; left out: it takes none.
            settings: What differs from the defaults of `TaskMethod`.
        """
        service, _, name = method.partition("/")
        contract = TaskMethod(
            service=service,
            name=name,
            request=payload_name(request),
            response=payload_name(response),
            progress=payload_name(progress),
            directive=payload_name(directive),
            **settings,
        )
        return Task(contract, snake_name(name), request, response, progress, directive)


@dataclass(frozen=True, slots=True, eq=False)
class Tool(Generic[TQ, TR]):
    """A tool method.

    Attributes:
        contract: Opcode and timeout.
        attribute: Name of the handler's method and of the client's.
        request: Class of the request.
        response: Class of the response.
    """

    contract: ToolMethod
    attribute: str
    request: type[TQ]
    response: type[TR]

    @staticmethod
    def declare(
        method: str,
        *,
        opcode: int,
        request: type[TQ],
        response: type[TR],
        **settings: Unpack[ToolSettings],
    ) -> Tool[TQ, TR]:
        """A tool method as generated code writes it down.

        Args:
            method: `package.Service/Method`.
            opcode: Number of the call.
            request: Class of the request, a message or a frame.
            response: Class of the response, likewise.
            settings: What differs from the defaults of `ToolMethod`.
        """
        service, _, name = method.partition("/")
        contract = ToolMethod(
            service=service,
            name=name,
            opcode=opcode,
            request=payload_name(request),
            response=payload_name(response),
            **settings,
        )
        return Tool(contract, snake_name(name), request, response)


def payload_name(payload: type[Any]) -> str:
    """Full name of the message that a message class or a frame class stands for; empty for `type(None)`."""
    if issubclass(payload, Message):
        return payload.DESCRIPTOR.full_name
    frame = getattr(payload, "FRAME", None)
    return frame.message if isinstance(frame, Frame) else ""


C = TypeVar("C")
R_co = TypeVar("R_co", bound=Message, covariant=True)
P_co = TypeVar("P_co", covariant=True)
D_contra = TypeVar("D_contra", contravariant=True)


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
