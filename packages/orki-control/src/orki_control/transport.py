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
    "Addresses",
    "ChannelOptions",
    "LaterCall",
    "Peer",
    "abort",
    "channel_options",
    "check_target",
    "check_targets",
    "error_from",
    "is_loopback",
    "open_channel",
    "server_options",
    "typed_error",
]

import asyncio
import ipaddress
import os
import random
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeAlias, cast

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
from orki_control.credentials import Credentials, TokenChannel
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
_RESOLVE_TIMEOUT: Final = 5.0
_METADATA_BYTES: Final = 16 * 1024
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

_TLS_ERRORS: Final = {
    "WRONG_VERSION_NUMBER": "it does not use TLS; unset ORKI_TLS_CA, or serve with --server-certificate",
    "certificate has expired": "its certificate has expired",
    "Hostname Verification Check failed": "its certificate is for another name; set ORKI_TLS_SERVER_NAME to that name",
    "CERTIFICATE_VERIFY_FAILED": "its certificate was not signed by an authority in ORKI_TLS_CA",
    "certificate signature failure": "its certificate was not signed by an authority in ORKI_TLS_CA",
}
"""What the messages of gRPC's TLS handshake mean."""


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
        # Beyond the first size gRPC refuses some requests, beyond the second all.
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * _METADATA_BYTES),
        # Two servers on one port would share its connections silently.
        ("grpc.so_reuseport", 0),
        *_UNCOMPRESSED,
    ]


def check_targets(
    targets: str | Sequence[str], *, insecure: bool = False, credentials: Credentials | None = None
) -> tuple[str, ...]:
    """Return the addresses of orchestrators if all are valid.

    Args:
        targets: `HOST:PORT`, several of them separated by commas, or a sequence of them.
        insecure: Whether plaintext may leave this host.
        credentials: The credentials for them; with TLS, they may be on other hosts.

    Raises:
        InvalidSetting: There is no address, one is not `HOST:PORT`, one is on another host without TLS or `insecure`,
            or a token would leave this host without TLS.
    """
    given = targets.split(",") if isinstance(targets, str) else targets
    found = dict.fromkeys(check_target(each.strip(), insecure=insecure, credentials=credentials) for each in given)
    if not found:
        raise InvalidSetting("no orchestrator is given: use HOST:PORT, such as 127.0.0.1:50051")
    return tuple(found)


def check_target(target: str, *, insecure: bool = False, credentials: Credentials | None = None) -> str:
    """Return one address if it is valid; see `check_targets`."""
    match = _TARGET.match(target)
    if match is None or not 1 <= int(match["port"]) <= 65_535:
        raise InvalidSetting(f"orchestrator {target!r} is not HOST:PORT, such as 127.0.0.1:50051")
    if is_loopback(match["host"].strip("[]")) or (credentials is not None and credentials.encrypted):
        return target
    if credentials is not None and credentials.has_token:
        raise InvalidSetting(
            f"orchestrator {target} is not on this host, and the token would travel unencrypted: set ORKI_TLS_CA to "
            "the file of the certificate authority"
        )
    if not insecure:
        raise InvalidSetting(
            f"orchestrator {target} is not on this host, and the connection is not encrypted: set ORKI_TLS_CA to the "
            "file of the certificate authority, or `insecure` to allow plaintext on a network that you trust"
        )
    return target


class Peer(NamedTuple):
    """One address of an orchestrator.

    Attributes:
        target: The address to connect to, `HOST:PORT`.
        name: The address as it was given, `HOST:PORT`.
    """

    target: str
    name: str

    def __str__(self) -> str:
        return self.name if self.name == self.target else f"{self.name} ({self.target})"


class Addresses:
    """The addresses of orchestrators that serve one fleet, in turn and without an end.

    Names that resolve to several addresses count as several. Names are resolved again in every round, in a random order
    of their addresses, so that many agents do not all go to the same one.

    Args:
        targets: The addresses, from `check_targets`.

    Attributes:
        count: Number of addresses in this round; 0 before the first.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self.count = 0
        self._targets = tuple(targets)
        self._round: deque[Peer] = deque()

    async def next(self) -> Peer:
        """Return the next address."""
        if not self._round:
            for peers in await asyncio.gather(*(_resolved(target) for target in self._targets)):
                self._round.extend(peers)
            self.count = len(self._round)
        return self._round.popleft()


async def _resolved(target: str) -> list[Peer]:
    """Return the addresses of a target; the target itself unless its name has several."""
    host, _, port = target.rpartition(":")
    if host == "localhost" or _is_address(host.strip("[]")):
        return [Peer(target, target)]
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            found.set_result([])

    # A thread of its own: a look-up that hangs must not delay the end of the event loop.
    threading.Thread(target=look_up, name="orki-resolve", daemon=True).start()
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT):
            infos = await asyncio.wrap_future(found)
    except TimeoutError:
        infos = []
    addresses = list(dict.fromkeys(info[4][0] for info in infos))
    if len(addresses) < 2:
        return [Peer(target, target)]  # gRPC resolves it, and its error says why it could not.
    random.shuffle(addresses)
    return [Peer(f"[{each}]:{port}" if ":" in each else f"{each}:{port}", target) for each in addresses]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def open_channel(
    target: str,
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES,
    *,
    authority: str = "",
    credentials: Credentials | None = None,
) -> grpc.aio.Channel:
    """Open a channel to an orchestrator. It connects at the first call and belongs to the running event loop.

    Args:
        target: `HOST:PORT`.
        max_message_bytes: Maximum message size in either direction.
        authority: The address as it was given, where `target` is one that it resolved to.
        credentials: Own identity, and the trusted orchestrators; None for plaintext without an identity.

    Raises:
        InvalidSetting: A file of the credentials cannot be read or is malformed.
    """
    import grpc

    options = channel_options(max_message_bytes)
    name = ""
    if authority:
        options.append(("grpc.default_authority", authority))
        name = authority.rpartition(":")[0].strip("[]") if authority != target else ""
    if is_loopback(target.rpartition(":")[0].strip("[]")):
        options.append(("grpc.enable_http_proxy", 0))
    plain = grpc.Compression.NoCompression
    if credentials is None or not credentials.encrypted:
        channel = grpc.aio.insecure_channel(target, options=options, compression=plain)
    else:
        if name := credentials.server_name or name:
            options.append(("grpc.ssl_target_name_override", name))
        secure = credentials.channel_credentials()
        channel = grpc.aio.secure_channel(target, secure, options=options, compression=plain)
    if credentials is None or not credentials.has_token:
        return channel
    return cast("grpc.aio.Channel", TokenChannel(channel, credentials))


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
        too_large = "larger than max" in details or "metadata size exceeds" in details
        return TooLarge(f"{target}: {details}") if too_large else Overloaded(f"{target}: {details}")
    if code == "UNIMPLEMENTED":
        return ProtocolVersion(
            f"{target} does not know this call: is it an orki orchestrator of this version? ({details})"
        )
    for sign, meaning in _TLS_ERRORS.items():
        if code == "UNAVAILABLE" and sign in details:
            return OrchestratorUnavailable(f"{target}: {meaning} ({details[:200]})")
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


class LaterCall:
    """A call that comes after a moment, once for all requests until then."""

    __slots__ = ("_call", "_loop", "_timer", "_wait")

    def __init__(self, loop: asyncio.AbstractEventLoop, wait: float, call: Callable[[], object]) -> None:
        """Create it without a request.

        Args:
            loop: The loop of the caller and the call.
            wait: Time between the first request and the call.
            call: What is called.
        """
        self._loop = loop
        self._wait = wait
        self._call = call
        self._timer: asyncio.TimerHandle | None = None

    def request(self) -> None:
        """Request the call."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._wait, self._due)

    def cancel(self) -> None:
        """Take the request back, if there is one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self._call()
