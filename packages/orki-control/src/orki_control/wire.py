"""gRPC's settings for both ends, in one place because they must fit each other.

A server answers pings that come faster than it allows with GOAWAY `too_many_pings` (gRPC `doc/keepalive.md`), so what
the client sends every 20 s the server allows every 10 s. Compression is off: gRPC bounds the size of what arrives, not
of what it inflates.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, TypeAlias

import grpc

from orki_contract.errors import InvalidSetting
from orki_control.session.options import DEFAULT_MESSAGE_BYTES

__all__ = ["ChannelOptions", "channel_options", "check_target", "open_channel", "server_options"]

ChannelOptions: TypeAlias = list[tuple[str, int | str]]
"""What grpc takes as `options`."""

_UNCOMPRESSED: Final[ChannelOptions] = [
    ("grpc.default_compression_algorithm", 0),
    ("grpc.compression_enabled_algorithms_bitset", 1),
]
_TARGET: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})\Z")


def channel_options(max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> ChannelOptions:
    """Options of a channel to an orchestrator."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Our own jitter decides when to dial; gRPC's backoff would only hide a peer that is back.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 2_000),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.enable_retries", 0),
        # A new channel is a new connection, not another's.
        ("grpc.use_local_subchannel_pool", 1),
        *_UNCOMPRESSED,
    ]


def server_options(max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> ChannelOptions:
    """Options of an orchestrator's server."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_metadata_size", 16 * 1024),
        # Two servers on one port would share its connections without a word.
        ("grpc.so_reuseport", 0),
        *_UNCOMPRESSED,
    ]


def check_target(target: str, *, insecure: bool = False) -> str:
    """The target, if it is one.

    Args:
        target: `HOST:PORT`.
        insecure: Whether plaintext may leave this host.

    Raises:
        InvalidSetting: It is not `HOST:PORT`, or names another host and `insecure` is not set.
    """
    match = _TARGET.match(target)
    if match is None or not 1 <= int(match["port"]) <= 65_535:
        raise InvalidSetting(f"orchestrator {target!r} is not HOST:PORT, such as 127.0.0.1:50051")
    if not insecure and not _is_loopback(match["host"].strip("[]")):
        raise InvalidSetting(
            f"orchestrator {target} is not on this host, and the connection is not encrypted: allow it with `insecure` "
            "only on a network that you trust"
        )
    return target


def open_channel(target: str, max_message_bytes: int = DEFAULT_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to an orchestrator; connects when the first call is made. Belongs to the running loop."""
    options = channel_options(max_message_bytes)
    if _is_loopback(target.rpartition(":")[0].strip("[]")):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.aio.insecure_channel(target, options=options, compression=grpc.Compression.NoCompression)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
