"""Bounds on connections that gRPC does not have: per address, and for connections on which no call has arrived.

gRPC itself ends a connection that does not complete the TLS and HTTP/2 handshakes in time, and closes what exceeds the
total. It does not know callers, so many silent connections would keep agents out. `Connections` looks at the sockets
of this process from time to time. A connection is established once a call with a valid identity has arrived on it. The
others are ended after the handshake timeout, and earlier, the oldest first, when there are too many of them.

A socket is ended by `shutdown` on a duplicate of its descriptor: gRPC then sees the end of the stream. The duplicate
cannot be confused with another connection, even if gRPC closes its descriptor meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from orki_contract.errors import InvalidSetting

_DESCRIPTORS: Final = "/proc/self/fd"
_RESERVE: Final = 64
"""Descriptors kept for the store, the event plane, logs and files."""
_LEAST: Final = 16
"""Least number of connections with which an orchestrator starts."""
_FEW: Final = 1_000
"""Number of connections below which a limit of open files is worth a warning."""
_WATCH_INTERVAL: Final = 0.1
"""Seconds between two looks at the number of descriptors."""
_GROWTH: Final = 8
"""Number of new descriptors after which all sockets are looked at at once."""
_LOOK_INTERVAL: Final = 1.0
"""Seconds after which all sockets are looked at if the number of descriptors has changed."""
_FULL_INTERVAL: Final = 5.0
"""Seconds after which all sockets are looked at in any case: others may have the same descriptors."""
_REST: Final = 10
"""Least pause after a look, as a multiple of its duration."""
_SLICE: Final = 20
"""Sockets that are handled without a pause of the event loop."""
_log = logging.getLogger("orki.server.connections")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits of connections.

    Attributes:
        total: Maximum number of connections.
        per_address: Maximum number of connections of one address.
        handshakes: Maximum number of connections on which no call has arrived.
        timeout: Seconds within which a call must arrive.
    """

    total: int
    per_address: int
    handshakes: int
    timeout: float


def connection_limits(*, wanted: int, per_address: int, handshakes: int, timeout: float) -> ConnectionLimits:
    """Return the limits that the file descriptors of this process allow.

    Args:
        wanted: Maximum number of connections; fewer if there are too few descriptors.
        per_address: Maximum number of one address; 0 for three quarters of all.
        handshakes: Maximum number without a call; 0 for half of all.
        timeout: Seconds within which a call must arrive.

    Raises:
        InvalidSetting: There are hardly any descriptors.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    total = wanted
    if soft != resource.RLIM_INFINITY:
        free = soft - _open_descriptors() - _RESERVE
        if free < _LEAST:
            raise InvalidSetting(
                f"the process may open {soft} files, which leaves {max(free, 0)} for connections; it needs at least "
                f"{_LEAST}: raise the limit with `ulimit -n` or LimitNOFILE="
            )
        if free < wanted:
            # A low limit is rarely intended.
            _log.log(
                logging.WARNING if free < _FEW else logging.INFO,
                "the process may open %d files, so that it takes at most %d connections instead of max_connections %d; "
                "raise the limit with `ulimit -n` or LimitNOFILE=",
                *(soft, free, wanted),
            )
            total = free
    return ConnectionLimits(
        total=total,
        per_address=min(per_address or max(1, total * 3 // 4), total),
        handshakes=min(handshakes or max(1, total // 2), total),
        timeout=timeout,
    )


def raise_descriptor_limit(connections: int) -> None:
    """Raise the soft limit of open files towards what this many connections need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _open_descriptors() + 2 * _RESERVE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(slots=True)
class _Connection:
    inode: int
    peer: str
    address: str
    since: float


class Connections:
    """The connections of one listening port.

    Args:
        limits: Their limits.
        port: The port; 0 until `run` gets it.

    Attributes:
        limits: Their limits.
        ended: Number of connections that were ended by a limit.
    """

    def __init__(self, limits: ConnectionLimits, port: int = 0) -> None:
        self.limits = limits
        self.ended = 0
        self._port = port
        self._known: dict[int, _Connection] = {}
        self._other: dict[int, int] = {}
        # When the last call of a peer arrived.
        self._calls: dict[str, float] = {}
        self._looked_at = 0.0

    def established(self, peer: str) -> None:
        """Note that a call with a valid identity has arrived from a peer, as gRPC names it."""
        self._calls[peer] = time.monotonic()

    async def run(self, port: int) -> None:
        """Apply the limits to the connections of a port until cancelled."""
        loop = asyncio.get_running_loop()
        self._port = port
        count = 0
        looked_at = applied_at = -_FULL_INTERVAL
        ended = 0
        while True:
            pause = _WATCH_INTERVAL
            now, grown = loop.time(), _open_descriptors() - count
            # Ended connections may have been replaced by as many new ones.
            soon = grown > _GROWTH or self.ended != ended
            if soon or now >= looked_at + (_LOOK_INTERVAL if grown else _FULL_INTERVAL):
                ended = self.ended
                await self.look(now)
                looked_at, applied_at, count = now, -_FULL_INTERVAL, _open_descriptors()
                pause = max(_WATCH_INTERVAL, _REST * (loop.time() - now))
            if now >= applied_at + _LOOK_INTERVAL:
                await self.apply(now)
                applied_at = now
            await asyncio.sleep(pause)

    async def look(self, now: float) -> None:
        """Bring the connections up to date with the descriptors of this process."""
        found: set[int] = set()
        before, self._looked_at = self._looked_at, now
        for number, name in enumerate(os.listdir(_DESCRIPTORS), 1):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
            descriptor = int(name)
            try:
                status = os.fstat(descriptor)
            except OSError:
                continue
            if not stat.S_ISSOCK(status.st_mode):
                continue
            found.add(descriptor)
            known = self._known.get(descriptor)
            if (known.inode if known else self._other.get(descriptor)) == status.st_ino:
                continue
            self._known.pop(descriptor, None)
            self._other.pop(descriptor, None)
            peer = self._peer(descriptor)
            if peer is None:
                self._other[descriptor] = status.st_ino
            else:
                self._known[descriptor] = _Connection(status.st_ino, *peer, now)
                if self._calls.get(peer[0], now) < before:
                    # An earlier connection had the same address and port.
                    del self._calls[peer[0]]
        for gone in self._known.keys() - found:
            del self._known[gone]
        for gone in self._other.keys() - found:
            del self._other[gone]

    def _peer(self, descriptor: int) -> tuple[str, str] | None:
        """Return gRPC's name and the address of the peer; None unless it is a connection to the port."""
        with contextlib.suppress(OSError, IndexError), _duplicate(descriptor) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == self._port:
                host, port = connection.getpeername()[:2]
                host = host.removeprefix("::ffff:")
                if ":" in host:
                    return f"ipv6:{quote(f'[{host}]', safe='')}:{port}", host
                return f"ipv4:{host}:{port}", host
        return None

    async def apply(self, now: float) -> None:
        """End the connections that exceed a limit."""
        limits = self.limits
        peers = {each.peer for each in self._known.values()}
        # Connections that opened since the last look are not known yet.
        for peer in [peer for peer, at in self._calls.items() if at < self._looked_at and peer not in peers]:
            del self._calls[peer]
        by_age = sorted(self._known.items(), key=lambda item: item[1].since)
        waiting = [item for item in by_age if item[1].peer not in self._calls]
        surplus = max(len(waiting) - limits.handshakes, 0)
        late = sum(1 for _, each in waiting if now - each.since >= limits.timeout)
        await self._end(waiting[: max(surplus, late)], "on which no call arrived")
        waiting = waiting[max(surplus, late) :]
        counts = Counter(each.address for each in self._known.values())
        for address, count in counts.items():
            if count > limits.per_address:
                # Silent connections go first, then the newest.
                own = [item for item in waiting if item[1].address == address]
                own += [item for item in reversed(by_age) if item[1].address == address and item[1].peer in self._calls]
                await self._end(own[: count - limits.per_address], f"of {address}, which has too many")

    async def _end(self, connections: Iterable[tuple[int, _Connection]], which: str) -> None:
        count = 0
        for number, (descriptor, known) in enumerate(connections, 1):
            if number % _SLICE == 0:
                await asyncio.sleep(0)
            if self._known.get(descriptor) is not known:
                continue
            with contextlib.suppress(OSError), _duplicate(descriptor) as connection:
                if os.fstat(connection.fileno()).st_ino == known.inode:
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
            del self._known[descriptor]
        if count:
            self.ended += count
            _log.warning("ended %d connections %s", count, which)


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    connection = socket.socket(fileno=os.dup(descriptor))
    try:
        yield connection
    finally:
        connection.close()


def _open_descriptors() -> int:
    """Return the number of open files of this process. Linux 6.2 and newer has it as the size of the folder."""
    try:
        return os.stat(_DESCRIPTORS).st_size or len(os.listdir(_DESCRIPTORS))
    except OSError:
        return 0
