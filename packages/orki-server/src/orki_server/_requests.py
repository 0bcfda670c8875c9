"""The edge of the unary gRPC services: typed errors become statuses, and every field of a request is validated."""

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
from orki_server._store.operations import shard_of
from orki_server._store.tasks import TaskFilter

Q = TypeVar("Q")
R = TypeVar("R")
S = TypeVar("S")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

ACTOR_KEY: Final = "orki-actor"
"""Metadata key with the caller's name for the audit. It is not verified, as there is no authentication."""
MAX_SUBMISSIONS: Final = 1000
"""Maximum number of submissions in one call."""
_DEFAULT_PAGE: Final = 100
_MAX_PAGE: Final = 1000
_KEY_BYTES: Final = 256
_MESSAGE: Final = 1000
_ACTOR: Final = re.compile(r"[A-Za-z0-9_.@:/-]{1,128}\Z")
_METHOD: Final = re.compile(r"[A-Za-z_][\w.]{0,500}/[A-Za-z_]\w{0,200}\Z", re.ASCII)
_AGENT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_CURSOR: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}\Z")
_log = logging.getLogger("orki.server.requests")


def typed(method: Callable[[S, Q, Context], Awaitable[R]]) -> Callable[[S, Q, Context], Awaitable[R]]:
    """Turn an OrkiError that a unary method raises into a status."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> R:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _abort(context, method.__name__, error)

    return wrapped


def typed_stream(
    method: Callable[[S, Q, Context], AsyncIterator[R]],
) -> Callable[[S, Q, Context], AsyncIterator[R]]:
    """Turn an OrkiError that a streaming method raises into a status."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Q, context: Context) -> AsyncIterator[R]:
        try:
            async for response in method(self, request, context):
                yield response
        except Exception as error:
            await _abort(context, method.__name__, error)

    return wrapped


async def _abort(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, OrkiError):
        _log.error("%s failed: a defect", method, exc_info=error)
        error = LocalProtocolError(f"{method}: the orchestrator failed; see its log")
    await abort(context, error)


def actor_of(context: Context) -> str:
    """Return the caller's name from the metadata; `anonymous` if it is missing or malformed."""
    for key, value in context.invocation_metadata() or ():
        if key == ACTOR_KEY and isinstance(value, str) and _ACTOR.match(value):
            return value
    return "anonymous"


class RequestRules:
    """Validates requests. Its methods raise InvalidArgument, TooLarge or UnknownTask for an invalid field."""

    def __init__(self, max_payload_bytes: int, shards: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._shards = shards

    def task_id(self, task_id: str) -> str:
        """Validate a task id and return it."""
        if shard_of(task_id) >= self._shards:
            raise UnknownTask(f"there is no task {task_id!r}")
        return task_id

    def submission(self, submission: Submission) -> None:
        _check_method("method", submission.method)
        self._check_payload("request", submission.request)
        if len(submission.idempotency_key.encode()) > _KEY_BYTES:
            raise InvalidArgument(f"idempotency_key: at most {_KEY_BYTES} bytes; hash a longer key")

    def cancel(self, request: CancelRequest) -> None:
        self.task_id(request.task_id)
        if len(request.message) > _MESSAGE:
            raise InvalidArgument(f"message: at most {_MESSAGE} characters, not {len(request.message)}")

    def direct(self, request: DirectRequest) -> None:
        self.task_id(request.task_id)
        self._check_payload("payload", request.payload)

    def watch(self, request: WatchRequest) -> None:
        self.task_id(request.task_id)
        if request.after and not _CURSOR.match(request.after):
            raise InvalidArgument(
                f"after: Watch did not return the cursor {request.after[:40]!r}; leave it empty to begin"
            )

    def list(self, request: ListRequest) -> tuple[TaskFilter, int]:
        """Validate a list and return its filter and page size."""
        if request.page_size > _MAX_PAGE:
            raise InvalidArgument(
                f"page_size: from 1 to {_MAX_PAGE}, or 0 for {_DEFAULT_PAGE}; not {request.page_size}"
            )
        known = set(TaskState.values()) - {TaskState.TASK_STATE_UNSPECIFIED}
        if unknown := [state for state in request.states if state not in known]:
            raise InvalidArgument(f"states: {unknown[0]} is not a state of a task")
        if request.method:
            _check_method("method", request.method)
        if request.agent_id and not _AGENT_ID.match(request.agent_id):
            raise InvalidArgument(f"agent_id: {request.agent_id[:40]!r} is not a valid agent id")
        which = TaskFilter(states=frozenset(request.states), method=request.method, agent_id=request.agent_id)
        return which, request.page_size or _DEFAULT_PAGE

    def _check_payload(self, field: str, payload: bytes) -> None:
        if len(payload) > self._max_payload_bytes:
            raise TooLarge(
                f"{field}: {len(payload)} bytes exceed the maximum of {self._max_payload_bytes}; "
                "store the payload externally and send a reference"
            )


def _check_method(field: str, method: str) -> None:
    if not _METHOD.match(method):
        raise InvalidArgument(f"{field}: {method[:80]!r} does not have the form package.Service/Method")
