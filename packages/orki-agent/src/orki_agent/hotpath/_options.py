"""Limits of both ends, and the records of finished calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from orki_agent.hotpath.frames import HEADER_BYTES
from orki_contract.errors import InvalidSetting
from orki_contract.trace import Span

_MIB = 1 << 20
_U32 = (1 << 32) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeOptions:
    """Limits of a tool bridge. Times are in seconds.

    Attributes:
        max_connections: Connections at once; further ones wait in the kernel's queue.
        max_connections_per_uid: Connections of one user at once; further ones are refused with `Overloaded`.
        max_frame_bytes: Longest frame in either direction, header included.
        max_calls: Calls in flight on one connection; further ones are answered with `TooManyCalls`.
        max_blocked: Blocking handlers that run in threads of their own at once, over all connections. Beyond it, a
            connection is not read until its blocking handler returns.
        handshake_timeout: Time from accepting a connection to its hello.
        frame_timeout: Time from a frame's first byte to its last, in either direction.
        call_timeout: Longest timeout that a caller may ask for.
        stop_timeout: Time that running calls have to end when the bridge stops.
        allowed_uids: Users that may connect; empty for the bridge's own user only.
    """

    max_connections: int = 64
    max_connections_per_uid: int = 64
    max_frame_bytes: int = 16 * _MIB
    max_calls: int = 128
    max_blocked: int = 32
    handshake_timeout: float = 5.0
    frame_timeout: float = 5.0
    call_timeout: float = 3_600.0
    stop_timeout: float = 5.0
    allowed_uids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_range("max_connections", self.max_connections, 1, 4_096)
        _check_range("max_connections_per_uid", self.max_connections_per_uid, 1, 4_096)
        _check_range("max_frame_bytes", self.max_frame_bytes, HEADER_BYTES + 1_024, 1_024 * _MIB)
        _check_range("max_calls", self.max_calls, 1, 65_536)
        _check_range("max_blocked", self.max_blocked, 1, 1_024)
        _check_range("handshake_timeout", self.handshake_timeout, 0.01, 60)
        _check_range("frame_timeout", self.frame_timeout, 0.01, 600)
        _check_range("call_timeout", self.call_timeout, 0.001, 4_294)
        _check_range("stop_timeout", self.stop_timeout, 0, 600)
        for uid in self.allowed_uids:
            _check_range("allowed_uids", uid, 0, _U32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolClientOptions:
    """Limits of a tool client.

    Attributes:
        max_connections: Sync client: connections, and so calls, at once.
        max_calls: Async client: calls in flight; the bridge's limit applies if it is lower.
        max_waiting: Calls that may wait for another to end; further ones fail with `TooManyCalls`.
        max_frame_bytes: Longest accepted frame, header included.
        connect_timeout: Seconds from connecting to the bridge's welcome.
        bridge_uids: Users whose bridge may receive the token; empty for the client's own user only.
    """

    max_connections: int = 8
    max_calls: int = 64
    max_waiting: int = 1_024
    max_frame_bytes: int = 16 * _MIB
    connect_timeout: float = 5.0
    bridge_uids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_range("max_connections", self.max_connections, 1, 1_024)
        _check_range("max_calls", self.max_calls, 1, 65_536)
        _check_range("max_waiting", self.max_waiting, 0, 1_048_576)
        _check_range("max_frame_bytes", self.max_frame_bytes, HEADER_BYTES + 1_024, 1_024 * _MIB)
        _check_range("connect_timeout", self.connect_timeout, 0.01, 600)
        for uid in self.bridge_uids:
            _check_range("bridge_uids", uid, 0, _U32)


def _check_range(option: str, value: float, low: float, high: float) -> None:
    known: object = value  # callers may not run a type checker
    if isinstance(known, bool) or not isinstance(known, int | float) or not low <= known <= high:
        raise InvalidSetting(f"{option} is {value!r}, it must be a number from {low} to {high}")


class ToolRecord(NamedTuple):
    """A finished call as the client saw it.

    Attributes:
        method: The tool as `package.Service/Method`.
        duration_ns: Duration in nanoseconds.
        request_bytes: Length of block and tail of the request.
        reply_bytes: Length of block and tail of the reply; 0 without a reply.
        reason: Number of the error's `orki.errors.v1.Reason`; 0 if the call succeeded.
        tool_code: The tool's own error code; 0 without one.
        span: The caller's span.
    """

    method: str
    duration_ns: int
    request_bytes: int
    reply_bytes: int
    reason: int
    tool_code: int
    span: Span | None


CallHook = Callable[[ToolRecord], object]
"""Called after each call in the caller's thread or loop. It must be quick (a deque's `append`) and must not raise."""
