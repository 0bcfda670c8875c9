"""What generated modules export: a contract beside the Python classes that it speaks of.

A handle is what user code passes around (`FINDINGS`, `REVIEW_FILE`). It carries the types for the type checker, the
message classes for the runtimes and the plain contract for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

from google.protobuf.message import Message

from orki_contract.model import Frame, Group, Stream, TaskMethod, ToolMethod

__all__ = ["EventStream", "FrameType", "Payload", "Task", "Tool"]


@runtime_checkable
class FrameType(Protocol):
    """A generated frame class.

    `FRAME` is the layout. `encode` gives block and tail as one `bytes` of `block_length + len(tail)`; it raises
    `FrameMalformed` for a value outside its field's range. `decode` takes what came behind the header and the
    *received* block length (SBE's rule): bytes of a longer block are skipped, fields behind a shorter one are None.
    """

    FRAME: Frame

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

    def subscribed(self, *groups: Group) -> EventStream[E, Any]:
        """The same stream with the groups that another package declares, and only those."""
        return EventStream(self.message, replace(self.contract, groups=tuple(sorted(groups))))


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
