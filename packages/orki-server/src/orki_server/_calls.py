"""What all servicers share: typed errors, the caller's name, and what a caller may read."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc

from orki.control.v1 import task_pb2 as pb
from orki_contract.errors import LocalProtocolError, OrkiError
from orki_control.transport import abort
from orki_server._identity import Action, caller

Q = TypeVar("Q")
R = TypeVar("R")
S = TypeVar("S")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

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
    """Return the caller's name for the audit."""
    return caller().name


def readable(task: pb.TaskSnapshot) -> pb.TaskSnapshot:
    """Return a snapshot without the response if the caller may not read it."""
    if not caller().may(Action.READ, task.method):
        task.ClearField("response")
    return task
