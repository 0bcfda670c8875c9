"""The edge of the unary services: typed errors become statuses, and nothing else of ours leaves."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

import grpc

from orki_contract.errors import LocalProtocolError, OrkiError
from orki_control.statuses import abort

__all__ = ["ACTOR_KEY", "Context", "actor_of", "typed", "typed_stream"]

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
