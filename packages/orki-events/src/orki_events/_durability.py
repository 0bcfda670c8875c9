"""Durability of published events: waits until the server's disk or its replicas have what a connection has written.

A server may answer WAITAOF with `appendfsync everysec` when the kernel has the writes, but not the disk (Redis 7.4.0 to
7.4.2, and Valkey up to 9.1 at least). Unless it flushes each write, events count as durable only when the server's own
statistics show a flush that began after them.
"""

from __future__ import annotations

import asyncio
from typing import Final

from orki_contract import errors
from orki_contract.model import Durability, Stream
from orki_events.connection import Command, Connection

_TIMEOUT: Final = 10.0
"""Maximum time for events to become durable."""
_PROBE_TIMEOUT: Final = 0.5
_FLUSH_INTERVAL: Final = 1.2
"""Time in which a server with `appendfsync everysec` begins a flush if none is under way, with some slack."""
_SAMPLE_INTERVAL: Final = 0.05
_IDLE: Final = b"aof_pending_bio_fsync:0"
"""Says in the statistics that no flush is under way."""
# A wait covers what its connection has written, and with that all that the server has executed before.
_MARK: Final[Command] = (b"SET", b"orki:durable", b"", b"PX", 1)


async def check_durability(connection: Connection, stream: Stream) -> None:
    """Check that the server can keep a stream's durability.

    Raises:
        EventsRefused: It never can.
        EventsReadOnly: It has too few replicas now.
        OrkiError: It does not answer, or refuses.
    """
    if stream.durability is Durability.FSYNC:
        try:
            await connection.execute((b"WAITAOF", 1, 0, round(_PROBE_TIMEOUT * 1_000)))
        except errors.EventsRefused as error:
            raise errors.EventsRefused(
                f'stream "{stream.name}" needs durability fsync, which needs appendonly, and Redis or Valkey 7.2 or '
                f"newer: {error.message}"
            ) from error
        if await _policy(connection) == b"no":
            raise errors.EventsRefused(
                f'stream "{stream.name}" needs durability fsync, and {connection.address.shown} never flushes its '
                "file (appendfsync no)"
            )
    elif stream.durability is Durability.REPLICAS:
        found = await connection.execute((b"WAIT", stream.replicas, round(_PROBE_TIMEOUT * 1_000)))
        _require_replicas(connection, stream, found)


async def confirm_durability(connection: Connection, stream: Stream, *, marked: bool = True) -> None:
    """Wait until all that the connection has written is durable.

    Args:
        connection: The connection that has written the events.
        stream: A stream with the durability.
        marked: Whether this connection has written; if not, it writes a mark, which covers what others have written.

    Raises:
        EventsNotPersisting: The disk does not have it in time.
        EventsReadOnly: Too few replicas have it in time.
        OrkiError: The server does not answer, or refuses.
    """
    limit, opened = round(_TIMEOUT * 1_000), connection.opened
    if not marked:
        await connection.execute(_MARK)
        opened = connection.opened
    fsync = stream.durability is Durability.FSYNC
    command: Command = (b"WAITAOF", 1, 0, limit) if fsync else (b"WAIT", stream.replicas, limit)
    (reply,) = await connection.pipeline(command, timeout=_TIMEOUT + connection.answer_timeout, same=opened)
    if isinstance(reply, errors.OrkiError):
        raise reply
    if not fsync:
        _require_replicas(connection, stream, reply)
    elif reply[0] < 1:
        raise _unflushed(connection)
    elif await _policy(connection) != b"always":
        await _see_flush(connection, opened)


def _require_replicas(connection: Connection, stream: Stream, found: int) -> None:
    if found < stream.replicas:
        raise errors.EventsReadOnly(
            f'{found} of the {stream.replicas} replicas that stream "{stream.name}" needs have confirmed to '
            f"{connection.address.shown}"
        )


def _unflushed(connection: Connection) -> errors.EventsNotPersisting:
    return errors.EventsNotPersisting(f"{connection.address.shown} did not flush its file within {_TIMEOUT:g} s")


async def _policy(connection: Connection) -> bytes:
    """Return `appendfsync`; empty if the user may not read it."""
    (reply,) = await connection.pipeline((b"CONFIG", b"GET", b"appendfsync"))
    return b"" if isinstance(reply, errors.OrkiError) or len(reply) < 2 else bytes(reply[1])


async def _see_flush(connection: Connection, opened: int) -> None:
    """Wait until a flush that began after this call has ended.

    It began between an answer that shows none and one that shows one, or, as the server begins one each second, in the
    time in which none was seen.
    """
    loop = asyncio.get_running_loop()
    due, idle_since, began = loop.time() + _TIMEOUT, 0.0, False
    while loop.time() < due:
        asked = loop.time()
        (text,) = await connection.pipeline((b"INFO", b"persistence"), same=opened)
        if isinstance(text, errors.OrkiError):
            raise text
        if _IDLE not in text:
            began = began or idle_since > 0
            idle_since = 0.0
        elif began or (idle_since and asked - idle_since > _FLUSH_INTERVAL):
            return
        else:
            idle_since = idle_since or loop.time()
        await asyncio.sleep(_SAMPLE_INTERVAL)
    raise _unflushed(connection)
