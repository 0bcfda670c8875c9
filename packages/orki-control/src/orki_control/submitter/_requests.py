"""The requests of a client, and the events of its end of a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from orki.control.v1 import submitter_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki.control.v1.task_pb2 import ProgressPosition, TaskSnapshot, WatchResponse
from orki_contract.errors import OrkiError
from orki_control.submitter._options import NUMBER_BYTES
from orki_control.submitter._tables import RequestState


@dataclass(slots=True, eq=False)
class Request:
    """One request of the client.

    Attributes:
        message: The message; its number is set when it is sent.
        size: Estimated size of the message in bytes.
        deadline: Time at which the client gives up; None for watches.
        context: Belongs to the shell; the machine does not use it.
        state: State of the request.
        task_id: The watched task; empty before the submission was accepted.
        after: Cursor of the last received progress or gap.
        position: Its position; None before the first.
        mode: Mode of its watch; WATCH_MODE_UNSPECIFIED without one.
        credit: Progress messages that the orchestrator may still send.
        attempts: How often it was sent.
    """

    message: pb.SubmitterMessage
    size: int
    deadline: float | None = None
    context: Any = None
    state: RequestState = RequestState.WAITING
    task_id: str = ""
    after: str = ""
    position: ProgressPosition | None = None
    mode: pb.WatchMode.ValueType = pb.WATCH_MODE_UNSPECIFIED
    credit: int = 0
    attempts: int = 0

    @property
    def number(self) -> int:
        """Number of the request on the current stream; 0 before it was sent."""
        return self.message.request

    @property
    def closed(self) -> bool:
        """Whether it was answered, has failed or was given up."""
        return self.state is RequestState.CLOSED


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The welcome arrived."""


@dataclass(frozen=True, slots=True)
class OrchestratorDraining:
    """The orchestrator stops soon."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request has its outcome: the task of a submission or a cancel, or the attempt of a directive."""

    request: Request
    outcome: TaskSnapshot | AttemptRef


@dataclass(frozen=True, slots=True)
class Updated:
    """A watch received a snapshot, progress or a gap. A terminal snapshot is the last update."""

    request: Request
    update: WatchResponse


@dataclass(frozen=True, slots=True)
class Failed:
    """A request failed."""

    request: Request
    error: OrkiError


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The shell must close the stream and open another one."""

    error: OrkiError


ClientEvent: TypeAlias = SessionOpened | OrchestratorDraining | Answered | Updated | Failed | SessionLost


def request_of(
    message: pb.SubmitterMessage,
    deadline: float | None,
    mode: pb.WatchMode.ValueType = pb.WATCH_MODE_UNSPECIFIED,
) -> Request:
    """Return a request with the size of its message."""
    return Request(message, message.ByteSize() + NUMBER_BYTES, deadline, mode=mode)


def seen(update: WatchResponse) -> tuple[str, ProgressPosition] | None:
    """Return the cursor and the position of progress or a gap; None for a snapshot."""
    if update.HasField("progress"):
        progress = update.progress
        position = ProgressPosition(attempt=progress.attempt, index=progress.index, number=progress.number)
        return progress.cursor, position
    if update.HasField("gap"):
        gap = update.gap
        return gap.cursor, ProgressPosition(attempt=gap.attempt, index=gap.last_index, number=gap.number)
    return None
