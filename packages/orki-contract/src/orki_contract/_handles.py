"""Handles that generated modules export.

A handle such as `FINDINGS` or `REVIEW_FILE` combines a contract with its message classes and their types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    Self,
    TypedDict,
    Unpack,
    overload,
    runtime_checkable,
)

from google.protobuf.message import Message

from orki_contract.model import Backoff, Budget, Frame, Group, ProgressPolicy, Stream, TaskMethod, ToolMethod
from orki_contract.naming import snake_name

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


@runtime_checkable
class FrameType(Protocol):
    """A generated frame class.

    `FRAME` is the layout. `encode` returns block and tail as one `bytes` of `block_length + len(tail)`; it raises
    `FrameMalformed` for a value outside its field's range. `decode` takes the bytes after the header and the
    *received* block length (as in SBE): it skips extra bytes of a longer block and sets fields beyond a shorter block
    to None.
    """

    FRAME: ClassVar[Frame]

    def encode(self) -> bytes:
        """Return the block and the tail."""

    @classmethod
    def decode(cls, body: bytes | memoryview, block_length: int) -> Self:
        """Return the frame in `body`, which contains the block and the tail."""


Payload = Message | FrameType
"""The type of a tool's request or response."""

E = TypeVar("E", bound=Message)
G = TypeVar("G", bound=str)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
P = TypeVar("P")
TQ = TypeVar("TQ", bound=Payload)
TR = TypeVar("TR", bound=Payload)


@dataclass(frozen=True, slots=True, eq=False)
class EventStream(Generic[E, G]):
    """A stream whose entries have class `E` and whose groups have the literal names `G`.

    Attributes:
        message: Class of the entries.
        contract: The stream's contract.
    """

    message: type[E]
    contract: Stream

    def with_groups(self, *groups: Group) -> EventStream[E, Any]:
        """Return the stream with only the given groups, which another package declares."""
        return EventStream(self.message, replace(self.contract, groups=tuple(sorted(groups))))


class TaskSettings(TypedDict, total=False):
    """The settings of a `TaskMethod`. Omitted settings have their defaults."""

    heartbeat_timeout: float
    attempt_timeout: float
    stall_timeout: float
    total_timeout: float
    max_attempts: int
    backoff: Backoff
    cancel_grace: float
    progress_policy: ProgressPolicy
    budget: Budget
    durability: str


class _Declared(TaskSettings, total=False):
    """The settings, and the messages that are no type parameters of a task."""

    checkpoint: type[Any]
    answer: type[Any]


class SubmitSettings(TypedDict, total=False):
    """When and where a task may run, and with whom it ends. Omitted settings have their defaults.

    Labels and keys have 1 to 128 letters, digits and `_./:@-`.

    Attributes:
        priority: From 0 to 9, 5 by default. Tasks of a higher priority are offered first. A queued task also advances
            by one priority for each hour that it waits.
        delay: Earliest start after the submission, in seconds; at most 366 days.
        start_at: Earliest start, with a time zone; at most 366 days ahead. A past time is at once.
        labels: Only agents with all of these labels get the task; at most 16.
        limits: Keys of limits, such as `model:small`, that the task's attempts count for; at most 8.
        fairness_key: Tasks of a method and priority take turns by this key, such as a tenant.
        budget: Maximum usage of the task and all tasks below it. When it is used up, they pause until it is raised.
        durability: What the task survives once it is acknowledged, if that is more than the orchestrator's setting:
            `memory`, `fsync` (on the store's disk), or `replicas:N` (N replicas of the store have it).
        on_parent_end: In a handler, what happens to the task when the handler's own task fails or is cancelled, through
            whichever orchestrator: it is cancelled, or left alone, which is the default.
    """

    priority: int
    delay: float
    start_at: datetime
    labels: Mapping[str, str]
    limits: Sequence[str]
    fairness_key: str
    budget: Budget
    durability: str
    on_parent_end: Literal["leave", "cancel"]


class ToolSettings(TypedDict, total=False):
    """The settings of a `ToolMethod`. Omitted settings have their defaults."""

    timeout: float
    idempotent: bool


@dataclass(frozen=True, slots=True, eq=False)
class Task(Generic[Q, R, P, D]):
    """A task method; `P` is `None` without progress, and `D` is `None` without directives.

    Attributes:
        contract: Names and timeouts.
        attribute: Name of the handler's method and of the client's attribute.
        checkpoint: Class of the checkpoints: a message, or bytes.
        answer: Class of the answers: a message, or bytes.
    """

    contract: TaskMethod
    attribute: str
    request: type[Q]
    response: type[R]
    progress: type[P]
    directive: type[D]
    checkpoint: type[Any] = bytes
    answer: type[Any] = bytes

    @overload
    @staticmethod
    def declare(
        method: str, *, request: type[Q], response: type[R], **settings: Unpack[_Declared]
    ) -> Task[Q, R, None, None]: ...

    @overload
    @staticmethod
    def declare(
        method: str, *, request: type[Q], response: type[R], progress: type[P], **settings: Unpack[_Declared]
    ) -> Task[Q, R, P, None]: ...

    @overload
    @staticmethod
    def declare(
        method: str, *, request: type[Q], response: type[R], directive: type[D], **settings: Unpack[_Declared]
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
        **settings: Unpack[_Declared],
    ) -> Task[Q, R, P, D]: ...

    @staticmethod
    def declare(
        method: str,
        *,
        request: type[Any],
        response: type[Any],
        progress: type[Any] = NoneType,
        directive: type[Any] = NoneType,
        checkpoint: type[Any] = bytes,
        answer: type[Any] = bytes,
        **settings: Unpack[TaskSettings],
    ) -> Task[Any, Any, Any, Any]:
        """Create the task method `package.Service/Method`; generated code calls this.

        `settings` are those that differ from the defaults of `TaskMethod`.
        """
        service, _, name = method.partition("/")
        contract = TaskMethod(
            service=service,
            name=name,
            request=payload_name(request),
            response=payload_name(response),
            progress=payload_name(progress),
            directive=payload_name(directive),
            checkpoint=payload_name(checkpoint),
            answer=payload_name(answer),
            **settings,
        )
        return Task(contract, snake_name(name), request, response, progress, directive, checkpoint, answer)


@dataclass(frozen=True, slots=True, eq=False)
class Tool(Generic[TQ, TR]):
    """A tool method.

    Attributes:
        contract: Opcode and timeout.
        attribute: Name of the handler's method and of the client's.
    """

    contract: ToolMethod
    attribute: str
    request: type[TQ]
    response: type[TR]

    @staticmethod
    def declare(
        method: str, *, opcode: int, request: type[TQ], response: type[TR], **settings: Unpack[ToolSettings]
    ) -> Tool[TQ, TR]:
        """Create the tool method `package.Service/Method`; generated code calls this.

        Request and response are messages or frames. `settings` are those that differ from the defaults of `ToolMethod`.
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
    """Return the full message name of a message or frame class; empty for `type(None)`."""
    if issubclass(payload, Message):
        return payload.DESCRIPTOR.full_name
    frame = getattr(payload, "FRAME", None)
    return frame.message if isinstance(frame, Frame) else ""
