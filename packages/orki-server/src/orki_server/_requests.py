"""What a request may hold: every field is checked here, once, before anything is done with it."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import grpc

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import CancelRequest, DirectRequest, ListRequest, Submission, WatchRequest
from orki_contract.errors import InvalidArgument, LocalProtocolError, OrkiError, TooLarge, UnknownTask
from orki_control.transport import abort
from orki_server._store.ids import shard_of
from orki_server._store.queries import TaskFilter

MOST_SUBMISSIONS: Final = 1000
"""Submissions in one call."""
_DEFAULT_PAGE: Final = 100
_LONGEST_PAGE: Final = 1000
_KEY_BYTES: Final = 256
_MESSAGE: Final = 1000
_METHOD: Final = re.compile(r"[A-Za-z_][\w.]{0,500}/[A-Za-z_]\w{0,200}\Z", re.ASCII)
_AGENT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_CURSOR: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}\Z")


class RequestRules:
    """Checks requests.

    Args:
        max_payload_bytes: Longest request or directive.
        shards: Number of the store's shards; an id that names another is unknown.
    """

    def __init__(self, max_payload_bytes: int, shards: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._shards = shards

    def task_id(self, task_id: str) -> str:
        """A task's id.

        Raises:
            UnknownTask: It is none; the same as for one that nobody has.
        """
        if shard_of(task_id) >= self._shards:
            raise UnknownTask(f"there is no task {task_id!r}")
        return task_id

    def submission(self, submission: Submission) -> None:
        """One submission.

        Raises:
            InvalidArgument: A field is malformed.
            TooLarge: The request is longer than messages to agents may be.
        """
        _method("method", submission.method)
        self._payload("request", submission.request)
        if len(submission.idempotency_key.encode()) > _KEY_BYTES:
            raise InvalidArgument(f"idempotency_key: at most {_KEY_BYTES} bytes; hash what is longer")

    def cancel(self, request: CancelRequest) -> None:
        """A cancel.

        Raises:
            UnknownTask, InvalidArgument: A field is malformed.
        """
        self.task_id(request.task_id)
        if len(request.message) > _MESSAGE:
            raise InvalidArgument(f"message: at most {_MESSAGE} characters, not {len(request.message)}")

    def direct(self, request: DirectRequest) -> None:
        """A directive.

        Raises:
            UnknownTask, TooLarge: A field is malformed, or too large.
        """
        self.task_id(request.task_id)
        self._payload("payload", request.payload)

    def watch(self, request: WatchRequest) -> None:
        """A watch.

        Raises:
            UnknownTask, InvalidArgument: A field is malformed.
        """
        self.task_id(request.task_id)
        if request.after and not _CURSOR.match(request.after):
            raise InvalidArgument(
                f"after: {request.after[:40]!r} is no cursor that Watch gave out; leave it empty to begin"
            )

    def list(self, request: ListRequest) -> tuple[TaskFilter, int]:
        """A list: its filter and page size.

        Raises:
            InvalidArgument: A field is malformed.
        """
        if request.page_size > _LONGEST_PAGE:
            raise InvalidArgument(
                f"page_size: from 1 to {_LONGEST_PAGE}, or 0 for {_DEFAULT_PAGE}; not {request.page_size}"
            )
        known = set(TaskState.values()) - {TaskState.TASK_STATE_UNSPECIFIED}
        if unknown := [state for state in request.states if state not in known]:
            raise InvalidArgument(f"states: {unknown[0]} is no state of a task")
        if request.method:
            _method("method", request.method)
        if request.agent_id and not _AGENT_ID.match(request.agent_id):
            raise InvalidArgument(f"agent_id: {request.agent_id[:40]!r} is no agent's name")
        which = TaskFilter(states=frozenset(request.states), method=request.method, agent_id=request.agent_id)
        return which, request.page_size or _DEFAULT_PAGE

    def _payload(self, field: str, payload: bytes) -> None:
        if len(payload) > self._max_payload_bytes:
            raise TooLarge(
                f"{field}: {len(payload)} bytes are more than the {self._max_payload_bytes} that fit into a message; "
                "put the bulk elsewhere and send where it is"
            )


def _method(field: str, method: str) -> None:
    if not _METHOD.match(method):
        raise InvalidArgument(f"{field}: {method[:80]!r} is not of the form package.Service/Method")


Q = TypeVar("Q")
R = TypeVar("R")
S = TypeVar("S")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

ACTOR_KEY: Final = "orki-actor"
"""Metadata with the name of whoever asks, for the audit; nobody checks it while there is no identity."""
_ACTOR: Final = re.compile(r"[A-Za-z0-9_.@:/-]{1,128}\Z")
_log = logging.getLogger("orki.server.rpc")


def typed(method: Callable[[S, Q, Context], Awaitable[R]]) -> Callable[[S, Q, Context], Awaitable[R]]:
    """Lets a unary method raise `OrkiError`."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> R:
        try:
            return await method(self, request, context)
        except OrkiError as error:
            await abort(context, error)
        except Exception as error:
            await _defect(context, method.__name__, error)

    return wrapped


def typed_stream(
    method: Callable[[S, Q, Context], AsyncIterator[R]],
) -> Callable[[S, Q, Context], AsyncIterator[R]]:
    """Lets a method that streams its answers raise `OrkiError`."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> AsyncIterator[R]:
        try:
            async for response in method(self, request, context):
                yield response
        except OrkiError as error:
            await abort(context, error)
        except Exception as error:
            await _defect(context, method.__name__, error)

    return wrapped


async def _defect(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    _log.error("%s failed: a defect", method, exc_info=error)
    await abort(context, LocalProtocolError(f"{method}: the orchestrator failed; its log says how"))


def actor_of(context: Context) -> str:
    """Who asks, as the metadata says; `anonymous` when it does not say, or not decently."""
    for key, value in context.invocation_metadata() or ():
        if key == ACTOR_KEY and isinstance(value, str) and _ACTOR.match(value):
            return value
    return "anonymous"
