"""Agents of the fleet in Redis, as all orchestrators see them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from orki.control.v1.task_pb2 import AgentSnapshot, Pause
from orki_contract.errors import DamagedRecord, OrkiError
from orki_events.connection import Connection
from orki_server._keys import FleetKeys
from orki_server._store.connection import StoreConnection
from orki_server._store.contracts import Contracts
from orki_server._store.store import read_layout

_KEPT: Final = 86_400
"""Seconds for which an agent is kept after its last message."""
_RECENT: Final = 60
"""Seconds after its last message in which a connected agent counts as such: its orchestrator may have been killed."""

# KEYS: agent, agents, then each served service. ARGV: agent id, instance, snapshot, now (ms), kept (s), contracts, then
# the digest of each service.
# -> session epoch, previous instance; or "" and the position (from 1) of a service whose contract is not registered
_OPEN_SESSION: Final = """
redis.call('DEL', KEYS[1] .. ':none') -- Out of memory, Redis refuses only a script's first write.
for at = 3, #KEYS do
  if redis.call('HEXISTS', KEYS[at], 'image:' .. ARGV[at + 4]) == 0 then return { '', tostring(at - 2) } end
end
for at = 3, #KEYS do
  redis.call('HINCRBY', KEYS[at], 'admissions:' .. ARGV[at + 4], 1)
  redis.call('HDEL', KEYS[at], 'ahead:' .. ARGV[at + 4])
end
local previous = redis.call('HGET', KEYS[1], 'instance_id') or ''
local epoch = redis.call('HINCRBY', KEYS[1], 'session_epoch', 1)
redis.call('HSET', KEYS[1], 'instance_id', ARGV[2], 'snapshot', ARGV[3], 'contracts', ARGV[6])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
return { tostring(epoch), previous }
"""

# KEYS: agent, agents. ARGV: agent id, session epoch, snapshot, now (ms), kept (s), "1" to keep the time of the last
# message. -> 1 if the session is the agent's newest
_UPDATE: Final = """
redis.call('DEL', KEYS[1] .. ':none') -- Out of memory, Redis refuses only a script's first write.
if redis.call('HGET', KEYS[1], 'session_epoch') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'snapshot', ARGV[3])
if ARGV[6] ~= '1' then
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """The store's reply to a hello.

    Attributes:
        epoch: Number of the session among the agent's; 0 if it has none because a contract is not registered.
        previous: Instance that had the session before; empty for none.
        missing: The service whose contract is not registered, or no longer.
    """

    epoch: int
    previous: str
    missing: str = ""


@dataclass(frozen=True, slots=True)
class AgentContracts:
    """An agent and the contracts that it serves.

    Attributes:
        agent: Its last snapshot.
        digests: Digest of the contract by service.
    """

    agent: AgentSnapshot
    digests: Mapping[str, str]

    def serves(self, service: str, digest: str) -> bool:
        """Whether it serves the service under this contract."""
        return service in self.agent.services and self.digests.get(service) == digest


class Fleet:
    """Agents in Redis."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection

    async def open_session(self, agent: AgentSnapshot, digests: Mapping[str, str]) -> SessionGrant:
        """Begin a session of an agent, if its contracts (digest by service) are registered.

        Raises:
            StoreUnavailable: The store is down.
        """
        served = sorted(digests.items())
        keys = (FleetKeys.agent(agent.agent_id), FleetKeys.AGENTS, *(FleetKeys.service(name) for name, _ in served))
        reply = await self._connection.call(
            "EVAL",
            _OPEN_SESSION,
            len(keys),
            *keys,
            agent.agent_id,
            agent.instance_id,
            agent.SerializeToString(),
            _now_ms(),
            _KEPT,
            "\n".join(f"{name} {digest}" for name, digest in served),
            *(digest for _, digest in served),
        )
        if not reply[0]:
            return SessionGrant(0, "", served[int(reply[1]) - 1][0])
        return SessionGrant(int(reply[0]), reply[1].decode())

    async def update(self, agents: list[tuple[AgentSnapshot, int]], *, alive: bool = True) -> None:
        """Update agents, each with its session epoch. An agent with a newer session is not changed.

        Raises:
            StoreUnavailable: The store is down.
        """
        commands = []
        for agent, epoch in agents:
            row = (agent.agent_id, epoch, agent.SerializeToString(), _now_ms(), _KEPT, int(not alive))
            commands.append(("EVAL", _UPDATE, 2, FleetKeys.agent(agent.agent_id), FleetKeys.AGENTS, *row))
        if commands:
            await self._connection.calls(commands)

    async def current_sessions(
        self, agent_ids: Iterable[str], *, while_down: bool = False
    ) -> dict[str, tuple[int, str]]:
        """Return epoch and instance of each agent's newest session; 0 and empty for an agent without any.

        Args:
            agent_ids: The agents.
            while_down: Whether to ask even if the connection is down, as recovery checks do.

        Raises:
            StoreUnavailable: The store is down.
        """
        names = list(agent_ids)
        replies = await self._connection.calls(
            [("HMGET", FleetKeys.agent(name), "session_epoch", "instance_id") for name in names], while_down=while_down
        )
        return {
            name: (int(epoch or 0), (instance or b"").decode())
            for name, (epoch, instance) in zip(names, replies, strict=True)
        }

    async def agents(self) -> list[AgentContracts]:
        """Return the agents that sent a message within a day, by id.

        Raises:
            StoreUnavailable: The store is down.
        """
        oldest = _now_ms() - _KEPT * 1000
        _, names = await self._connection.calls(
            [("ZREMRANGEBYSCORE", FleetKeys.AGENTS, "-inf", oldest), ("ZRANGE", FleetKeys.AGENTS, 0, -1)]
        )
        if not names:
            return []
        commands = [("HMGET", FleetKeys.agent(name.decode()), "snapshot", "contracts") for name in sorted(names)]
        return [
            AgentContracts(
                AgentSnapshot.FromString(snapshot), dict(line.split(" ") for line in contracts.decode().splitlines())
            )
            for snapshot, contracts in await self._connection.calls(commands)
            if snapshot
        ]


async def count_connected(link: Connection) -> int | None:
    """Return the number of connected agents; None if the store is on another server. Raises as `Connection.execute`."""
    recent = _now_ms() - _RECENT * 1000
    names, layout = await link.pipeline(
        ("ZRANGEBYSCORE", FleetKeys.AGENTS, recent, "+inf"), ("EXISTS", FleetKeys.LAYOUT)
    )
    for reply in (names, layout):
        if isinstance(reply, OrkiError):
            raise reply
    if not layout:
        return None
    if not names:
        return 0
    snapshots = await link.pipeline(*(("HGET", FleetKeys.agent(name.decode()), "snapshot") for name in names))
    return sum(isinstance(each, bytes) and AgentSnapshot.FromString(each).connected for each in snapshots)


def read_pauses(values: Iterable[bytes]) -> list[Pause]:
    """Return the stored pauses, by target.

    Raises:
        DamagedRecord: One of them cannot be read.
    """
    try:
        return sorted((Pause.FromString(value) for value in values), key=lambda each: each.target)
    except DecodeError as error:
        raise DamagedRecord(f"the key {FleetKeys.PAUSES} cannot be read: {error}") from error


def _now_ms() -> int:
    return int(time.time() * 1000)


@asynccontextmanager
async def open_fleet(redis_url: str) -> AsyncIterator[tuple[Contracts, Fleet]]:
    """Open the contracts and agents of an existing store for a command.

    Raises:
        InvalidSetting: The URL is malformed, or the store has the layout of another version.
        StoreUnavailable: The store is down.
    """
    connection = StoreConnection(redis_url)
    try:
        yield Contracts(connection, await read_layout(connection)), Fleet(connection)
    finally:
        await connection.close()
