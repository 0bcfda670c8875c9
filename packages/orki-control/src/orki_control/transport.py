"""gRPC settings and error mapping, shared by clients, agents and orchestrators.

The keepalive settings of both ends must fit each other: a server answers pings that come faster than it permits with
GOAWAY `too_many_pings` (gRPC `doc/keepalive.md`). Clients ping every 20 s, and the server permits a ping every 10 s.
Compression is off, because gRPC bounds the size of a compressed message but not of what it inflates to.

An orki error travels as the gRPC status of its reason (`orki_contract.errors.status_of`). The status carries the
message, and the trailing metadata carries the name of the reason under `orki-reason`. A status without a reason was
made by gRPC itself or by a proxy; then the status code decides.

grpc is imported when the first function here needs it, so that importing orki stays fast.
"""

from __future__ import annotations

__all__ = [
    "MESSAGE_CHARACTERS",
    "REASON_KEY",
    "ChannelOptions",
    "abort",
    "channel_options",
    "check_target",
    "error_from",
    "is_loopback",
    "open_channel",
    "server_options",
    "typed_error",
]

import ipaddress
import os
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import (
    InvalidArgument,
    InvalidSetting,
    OrchestratorUnavailable,
    OrkiError,
    Overloaded,
    PeerRefused,
    ProtocolVersion,
    TooLarge,
    error_for,
    status_of,
)
from orki_control.session._options import DEFAULT_MESSAGE_BYTES

if TYPE_CHECKING:
    import grpc

# gRPC reads this when it is first imported. Its fork handlers crash a child between fork and exec (grpc issue 43055),
# so a handler that starts a program with `preexec_fn` would fail at random.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

ChannelOptions: TypeAlias = list[tuple[str, int | str]]
"""The `options` of a gRPC channel or server."""
REASON_KEY: Final = "orki-reason"
"""Trailing metadata with the name of the reason, such as `REASON_UNKNOWN_TASK`."""
MESSAGE_CHARACTERS: Final = 1000
"""Maximum length of a status message. It travels percent-encoded in a header, which HTTP/2 peers limit to kilobytes."""

_UNCOMPRESSED: Final[ChannelOptions] = [
    ("grpc.default_compression_algorithm", 0),
    ("grpc.compression_enabled_algorithms_bitset", 1),
]
_TARGET: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})\Z")
_REASONS: Final = frozenset(Reason.keys())
_WITHOUT_REASON: Final[dict[str, type[OrkiError]]] = {
    "UNAVAILABLE": OrchestratorUnavailable,
    # A cancellation by the peer or a proxy is a lost connection. Our own is `asyncio.CancelledError`.
    "CANCELLED": OrchestratorUnavailable,
    "DEADLINE_EXCEEDED": OrchestratorUnavailable,
    "INVALID_ARGUMENT": InvalidArgument,
    "PERMISSION_DENIED": PeerRefused,
    "UNAUTHENTICATED": PeerRefused,
}


def channel_options(max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> ChannelOptions:
    """Return the options of a channel to an orchestrator."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # orki's own back-off decides when to connect again. A long back-off of gRPC would hide a peer that is back.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.enable_retries", 0),
        # A new channel opens a new connection instead of sharing one.
        ("grpc.use_local_subchannel_pool", 1),
        *_UNCOMPRESSED,
    ]


def server_options(max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> ChannelOptions:
    """Return the options of an orchestrator's server."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_metadata_size", 16 * 1024),
        # Two servers on one port would share its connections silently.
        ("grpc.so_reuseport", 0),
        *_UNCOMPRESSED,
    ]


def check_target(target: str, *, insecure: bool = False) -> str:
    """Return the target if it is valid.

    Args:
        target: `HOST:PORT`.
        insecure: Whether plaintext may leave this host.

    Raises:
        InvalidSetting: The target is not `HOST:PORT`, or it names another host and `insecure` is not set.
    """
    match = _TARGET.match(target)
    if match is None or not 1 <= int(match["port"]) <= 65_535:
        raise InvalidSetting(f"orchestrator {target!r} is not HOST:PORT, such as 127.0.0.1:50051")
    if not insecure and not is_loopback(match["host"].strip("[]")):
        raise InvalidSetting(
            f"orchestrator {target} is not on this host, and the connection is not encrypted: set `insecure` to allow "
            "that, and only on a network that you trust"
        )
    return target


def open_channel(target: str, max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> grpc.aio.Channel:
    """Open a channel to an orchestrator. It connects at the first call and belongs to the running event loop."""
    import grpc

    options = channel_options(max_message_bytes)
    if is_loopback(target.rpartition(":")[0].strip("[]")):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.aio.insecure_channel(target, options=options, compression=grpc.Compression.NoCompression)


def is_loopback(host: str) -> bool:
    """Return whether a host, without brackets, is on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: OrkiError) -> NoReturn:
    """End a call of a servicer with a typed error."""
    import grpc

    status = status_of(error.reason)
    code = next(code for code in grpc.StatusCode if code.value[0] == status)
    await context.abort(code, _bounded(error.message), ((REASON_KEY, Reason.Name(error.reason)),))
    raise AssertionError("abort always raises")


def error_from(failed: grpc.aio.AioRpcError, target: str) -> OrkiError:
    """Return the typed error for a failed call.

    Args:
        failed: The exception of the call.
        target: The server that was called, for the message.
    """
    code = failed.code().name
    details = failed.details() or code
    for key, value in failed.trailing_metadata() or ():
        if key == REASON_KEY:
            name = value if isinstance(value, str) else value.decode("ascii", "replace")
            if name in _REASONS:
                return error_for(Reason.Value(name), details)
            return OrkiError(f"{details} (unknown reason {name}: the orchestrator is newer)")
    if code == "RESOURCE_EXHAUSTED":
        too_large = "larger than max" in details
        return TooLarge(f"{target}: {details}") if too_large else Overloaded(f"{target}: {details}")
    if code == "UNIMPLEMENTED":
        return ProtocolVersion(
            f"{target} does not know this call: is it an orki orchestrator of this version? ({details})"
        )
    known = _WITHOUT_REASON.get(code)
    return known(f"{target}: {details}") if known else OrkiError(f"{target}: {code}: {details}")


def typed_error(raised: Exception, target: str) -> OrkiError:
    """Return the typed error for an exception of a call; raise the exception again if it is not one of gRPC."""
    import grpc

    if isinstance(raised, OrkiError):
        return raised
    if isinstance(raised, grpc.aio.AioRpcError):
        return error_from(raised, target)
    if isinstance(raised, grpc.aio.UsageError):
        # The channel was closed during the call.
        return OrchestratorUnavailable(f"{target}: {raised}")
    raise raised


def _bounded(message: str) -> str:
    return message if len(message) <= MESSAGE_CHARACTERS else message[: MESSAGE_CHARACTERS - 1] + "…"
