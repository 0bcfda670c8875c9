"""What is checked before a servicer is called: the caller's identity, and that the request can be decoded.

grpc.aio ends a call whose request cannot be decoded with UNKNOWN and no reason, and a stream with OK. So the
deserializers here never raise: they return an `Undecodable`, and the call is aborted where a message is expected.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from orki_contract.errors import InvalidArgument, OrkiError
from orki_control.transport import abort
from orki_server._identity import Gate


class Undecodable:
    """Stands for a request that could not be decoded.

    Attributes:
        error: The error for the peer.
    """

    __slots__ = ("error",)

    def __init__(self, error: InvalidArgument) -> None:
        self.error = error


class TypedRequests(grpc.aio.ServerInterceptor):
    """Aborts calls without a valid identity, and calls with undecodable requests.

    A method that reads from its context gets the `Undecodable` itself.

    Args:
        gate: Finds the caller of each call.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._handlers: dict[str, Any] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler of a method; None for an unknown method."""
        found = self._handlers.get(details.method)
        if found is None:
            handler = await continuation(details)
            if handler is None:
                return None
            found = self._handlers[details.method] = _typed(handler, details.method, self._gate)
        return found


def _typed(handler: Any, method: str, gate: Gate) -> Any:
    deserialize = handler.request_deserializer

    def parse(payload: bytes) -> Any:
        try:
            return deserialize(payload)
        except Exception as error:
            name = deserialize.__self__.DESCRIPTOR.full_name  # It is `FromString` of a message class.
            return Undecodable(InvalidArgument(f"{method.strip('/')}: the request is not a {name} ({error})"))

    if handler.request_streaming:
        behaviour = handler.stream_stream if handler.response_streaming else handler.stream_unary
    else:
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary

    async def checked(request: Any, context: Any) -> Any:
        await _enter(gate, context)
        return await behaviour(await _check(request, context), context)

    async def checked_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await _enter(gate, context)
        async for response in behaviour(await _check(request, context), context):
            yield response

    call = checked_stream if inspect.isasyncgenfunction(behaviour) else checked
    kind = ("unary", "stream")[handler.request_streaming] + "_" + ("unary", "stream")[handler.response_streaming]
    make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(call, request_deserializer=parse, response_serializer=handler.response_serializer)


async def _enter(gate: Gate, context: Any) -> None:
    try:
        gate.enter(context)
    except OrkiError as error:
        await abort(context, error)


async def _check(request: Any, context: Any) -> Any:
    if isinstance(request, Undecodable):
        await abort(context, request.error)
    return _checked_each(request, context) if isinstance(request, AsyncIterator) else request


async def _checked_each(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Undecodable):
            await abort(context, request.error)
        yield request
