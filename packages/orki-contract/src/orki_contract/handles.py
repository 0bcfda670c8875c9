"""What generated modules export: a contract beside the Python classes that it speaks of.

A handle is what user code passes around (`FINDINGS`, `REVIEW_FILE`). It carries the types for the type checker, the
message classes for the runtimes and the plain contract for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, ClassVar, Generic, Protocol, Self, TypedDict, TypeVar, Unpack, overload, runtime_checkable

from google.protobuf.message import Message

from orki_contract.model import Backoff, Frame, Group, Stream, TaskMethod, ToolMethod
from orki_contract.naming import snake_name

__all__ = ["EventStream", "FrameType", "Payload", "Task", "TaskSettings", "Tool", "ToolSettings", "payload_name"]


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
D = TypeVar("D")
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
