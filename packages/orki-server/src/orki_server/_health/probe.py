"""Reads the snapshots that the findings are made of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import replace

from orki_contract.errors import InvalidSetting, OrkiError
from orki_events.connection import Address, Command, Connection, parse_address
from orki_events.registry import StreamRegistry
from orki_server._health.findings import (
    VERDICTS,
    Check,
    Snapshot,
    check_dead_letters,
    check_groups,
    check_losses,
    check_server,
    parse_info,
    replicas,
)
from orki_server._keys import FleetKeys
from orki_server._observers.stream_stats import read_stream_stats
from orki_server._store.cluster import topology


class ServerProbe:
    """Connections that ask one server, or the primaries of a cluster, for their state.

    Attributes:
        server: What the names of its checks begin with.
    """

    def __init__(self, address: Address, *, server: str, timeout: float, writes: bool = True) -> None:
        self.server = server
        # The role decides how errors are classified, and the event plane's classes are finer.
        self._address = replace(address, role="event server")
        self._timeout = timeout
        self._write: Command = (b"DEL", FleetKeys.PROBE) if writes else (b"PING",)
        self._links: dict[str, Connection] = {}
        self._replicas: dict[str, int] = {}

    @classmethod
    def of(cls, url: str, *, server: str, timeout: float, writes: bool = True) -> ServerProbe:
        """Create a probe for a URL; raises InvalidSetting if it is malformed."""
        return cls(parse_address(url, role="store"), server=server, timeout=timeout, writes=writes)

    @property
    def is_cluster(self) -> bool:
        return self._address.is_cluster

    @property
    def link(self) -> Connection:
        """The connection to the server; to the first node of a cluster."""
        return self._link(self._address)

    async def checks(self) -> list[Check]:
        """Check the server. Of the nodes of a cluster, the worst result of each check counts."""
        found: dict[str, Check] = {}
        for snapshot in await self.read():
            for check in check_server(snapshot, self.server):
                if check.name in found and self._address.is_cluster:
                    check = max(found[check.name], check, key=lambda each: VERDICTS.index(each.verdict))
                found[check.name] = check
        return list(found.values())

    async def read(self) -> list[Snapshot]:
        """Read a snapshot of the server, or of each primary of the cluster, also of one that is down."""
        if not self._address.is_cluster:
            return [await self._read(self._address, self._write)]
        try:
            ranges = (await topology(self._address.at(*self._address.seeds[0]))).ranges
        except OrkiError as error:
            return [Snapshot(shown=self._address.shown, timeout=self._timeout, failure=error)]
        nodes = {address.location: address for _, _, address in ranges}
        return list(await asyncio.gather(*map(self._read, nodes.values())))

    async def _read(self, address: Address, write: Command = (b"PING",), tries: int = 2) -> Snapshot:
        snapshot = Snapshot(shown=address.shown, timeout=self._timeout)
        link = self._link(address)
        began, connected = asyncio.get_running_loop().time(), link.opened
        try:
            pong, info, written = await link.pipeline((b"PING",), (b"INFO",), write)
        except OrkiError as error:
            silent = asyncio.get_running_loop().time() - began >= self._timeout
            if tries > 1 and not silent and link.opened == connected > 0:
                # The connection of the last look ended in the meantime.
                return await self._read(address, write, tries - 1)
            return replace(snapshot, failure=error, accepts=silent and await _accepts(address, self._timeout))
        fields = None if isinstance(info, OrkiError) else parse_info(info.decode())
        if fields is not None and fields.get("role") == "master":
            seen = self._replicas.get(address.location, 0)
            self._replicas[address.location] = max(seen, len(replicas(fields)))
        return replace(
            snapshot,
            info=fields,
            failure=pong if isinstance(pong, OrkiError) else None,
            write=written if isinstance(written, OrkiError) else None,
            replicas=self._replicas.get(address.location, 0),
        )

    def _link(self, address: Address) -> Connection:
        if address.location not in self._links:
            self._links[address.location] = Connection(
                address, name="orki:health", connect_timeout=self._timeout, answer_timeout=self._timeout
            )
        return self._links[address.location]

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()


async def check_streams(link: Connection, registry: StreamRegistry) -> list[Check]:
    """Check the groups of all registered streams; raises an OrkiError if the server does not answer."""
    figures = await read_stream_stats(link, await registry.streams(link))
    groups = [group for stream in figures for group in stream.groups]
    return [*check_groups(groups), *check_dead_letters(groups), *check_losses(figures)]


async def refuse_evicting(probes: Iterable[ServerProbe]) -> None:
    """Refuse servers that evict keys: they delete streams with their groups.

    Raises:
        InvalidSetting: A server evicts.
    """
    for probe in probes:
        for check in await probe.checks():
            if check.state == "evicting":
                raise InvalidSetting(
                    f"{probe.link.address.shown} has maxmemory-policy {check.figure}. {check.cause} {check.next_step}"
                )


async def _accepts(address: Address, timeout: float) -> bool:
    """Return whether the server accepts connections: one that does so but does not reply is hung, not down."""
    if address.service:
        return False  # the address is that of the sentinels
    settings = address.settings
    try:
        async with asyncio.timeout(timeout):
            if "path" in settings:
                _, writer = await asyncio.open_unix_connection(settings["path"])
            else:
                _, writer = await asyncio.open_connection(settings["host"], settings["port"])
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
