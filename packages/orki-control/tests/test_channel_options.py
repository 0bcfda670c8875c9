"""gRPC ignores unknown channel options, so each option that orki sets must exist in gRPC's library."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from orki_control.transport import channel_options, server_options

NAMES = sorted({name for name, _ in (*channel_options(), *server_options())})


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_library_knows_the_option(library: bytes, name: str) -> None:
    assert name.encode() + b"\0" in library


def test_clients_ping_less_often_than_the_server_permits() -> None:
    client, server = dict(channel_options()), dict(server_options())
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1
    assert client["grpc.http2.max_pings_without_data"] == 0
