"""One real Valkey for a module's tests, emptied between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis import Redis

from orki_server import keys
from orki_server.embedded import EmbeddedServer
from orki_server.store import Store


@pytest.fixture(scope="module")
def valkey() -> Iterator[EmbeddedServer]:
    """A server that the module's tests share."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedServer) -> Iterator[str]:
    """URL of an empty server; afterwards every key that a test left must be one of the table's or the event plane's."""
    with Redis.from_url(valkey.url) as redis:
        redis.flushall()
        yield valkey.url
        names = [name.decode() for name in redis.scan_iter(count=1000)]
        unknown = [name for name in names if not keys.match(name) and not name.startswith(("orki:ev:", "orki:streams"))]
        assert unknown == [], "keys that keys.py does not list"


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    """A store of four shards on the empty server."""
    opened = Store(redis_url, shards=4, retention_ms=60_000)
    await opened.open()
    yield opened
    await opened.close()
