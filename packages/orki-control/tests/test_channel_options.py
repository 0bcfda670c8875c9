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
