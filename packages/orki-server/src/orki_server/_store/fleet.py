"""What the fleet's orchestrators know in common: agents, and the layout of the store."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from orki.control.v1.task_pb2 import AgentSnapshot
from orki_contract.errors import InvalidSetting
from orki_server._keys import LAYOUT_VERSION, FleetKeys
from orki_server._store.connection import StoreConnection

_AGENT_KEPT_S: Final = 86_400

# agent, agents, service… | agent id, instance, snapshot, now (ms), kept (s), what it serves, digest for each service
# -> epoch, instance before; or "" and the number (from 1) of a service whose digest is not registered
_GREET: Final = """
for at = 3, #KEYS do
  if redis.call('HEXISTS', KEYS[at], 'i:' .. ARGV[at + 4]) == 0 then return { '', tostring(at - 2) } end
end
for at = 3, #KEYS do
  redis.call('HINCRBY', KEYS[at], 'n:' .. ARGV[at + 4], 1)
  redis.call('HDEL', KEYS[at], 'p:' .. ARGV[at + 4])
end
local before = redis.call('HGET', KEYS[1], 'i') or ''
local epoch = redis.call('HINCRBY', KEYS[1], 'e', 1)
redis.call('HSET', KEYS[1], 'i', ARGV[2], 's', ARGV[3], 'c', ARGV[6])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
return { tostring(epoch), before }
"""

# agent, agents | agent id, epoch, snapshot, now (ms), kept (s), "1" to leave the time as it is -> 1 if it was ours
_TELL: Final = """
if redis.call('HGET', KEYS[1], 'e') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 's', ARGV[3])
if ARGV[6] ~= '1' then
  redis.call('EXPIRE', KEYS[1], ARGV[5])
  redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
end
return 1
"""


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """What the store says to an agent's hello.

    Attributes:
        epoch: Number of the session among the agent's; 0 where it has none, as a contract of it is not registered.
        before: The instance that had the session before; empty for none.
        missing: The service whose contract is not registered, or not any more.
    """

    epoch: int
    before: str
    missing: str = ""


@dataclass(frozen=True, slots=True)
class AgentContracts:
    """An agent, and the contracts under which it serves.

    Attributes:
        agent: As the store last heard of it.
        digests: Digest of each service; empty where an orchestrator wrote it that did not note them.
    """

    agent: AgentSnapshot
    digests: Mapping[str, str]

    def serves(self, service: str, digest: str) -> bool:
        """Whether it serves the service under this contract; where nobody noted the contract, it may."""
        return service in self.agent.services and self.digests.get(service, digest) == digest


class Fleet:
    """Agents, in Redis."""

    def __init__(self, link: StoreConnection, shards: int) -> None:
        self._link = link
        self._shards = shards
        self._generation = b""

    async def claim_layout(self) -> bool:
        """Notes the store's layout, or compares it with ours.

        Returns:
            Whether the store is another than at the call before: it was emptied, or exchanged.

        Raises:
            InvalidSetting: The store was laid out otherwise.
            StoreUnavailable: The store is away.
        """
        await self._link.direct("HSETNX", FleetKeys.LAYOUT, "shards", self._shards)
        await self._link.direct("HSETNX", FleetKeys.LAYOUT, "version", LAYOUT_VERSION)
        await self._link.direct("HSETNX", FleetKeys.LAYOUT, "generation", os.urandom(8).hex())
        reply = await self._link.direct("HMGET", FleetKeys.LAYOUT, "shards", "version", "generation")
        shards, version, generation = reply
        if int(version) != LAYOUT_VERSION:
            raise InvalidSetting(
                f"the store at {self._link.address} has layout {int(version)}, this orchestrator writes "
                f"{LAYOUT_VERSION}; use orchestrators of one version, or another Redis database"
            )
        if int(shards) != self._shards:
            raise InvalidSetting(
                f"the store at {self._link.address} has {int(shards)} shards, this orchestrator is set to "
                f"{self._shards}; set shards to {int(shards)}, or use another Redis database"
            )
        exchanged = self._generation not in (b"", generation)
        self._generation = generation
        return exchanged

    async def laid_out(self) -> int:
        """Number of the store's shards, for who only looks at it; 0 where no orchestrator has used it yet.

        Raises:
            InvalidSetting: The store was laid out by another version.
            StoreUnavailable: The store is away.
        """
        shards, version = await self._link.call("HMGET", FleetKeys.LAYOUT, "shards", "version")
        if version is not None and int(version) != LAYOUT_VERSION:
            raise InvalidSetting(
                f"the store at {self._link.address} has layout {int(version)}, this command knows {LAYOUT_VERSION}; "
                "use the command of the orchestrator's version"
            )
        return int(shards or 0)

    async def greet(self, agent: AgentSnapshot, digests: Mapping[str, str]) -> SessionGrant:
        """An agent's hello was accepted: it serves from now on, if its contracts (digest by service) are registered."""
        served = sorted(digests.items())
        reply = await self._script(
            _GREET,
            (FleetKeys.agent(agent.agent_id), FleetKeys.AGENTS, *(FleetKeys.service(name) for name, _ in served)),
            (
                agent.agent_id,
                agent.instance_id,
                agent.SerializeToString(),
                _now_ms(),
                _AGENT_KEPT_S,
                "\n".join(f"{name} {digest}" for name, digest in served),
                *(digest for _, digest in served),
            ),
        )
        if not reply[0]:
            return SessionGrant(0, "", served[int(reply[1]) - 1][0])
        return SessionGrant(int(reply[0]), reply[1].decode())

    async def tell(self, agents: list[tuple[AgentSnapshot, int]], *, alive: bool = True) -> None:
        """Updates agents, each with the number of its session, unless a newer session has begun."""
        commands = []
        for agent, epoch in agents:
            row = (agent.agent_id, epoch, agent.SerializeToString(), _now_ms(), _AGENT_KEPT_S, int(not alive))
            commands.append(("EVAL", _TELL, 2, FleetKeys.agent(agent.agent_id), FleetKeys.AGENTS, *row))
        if commands:
            await self._link.calls(commands)

    async def agents(self) -> list[AgentSnapshot]:
        """All agents that were heard of within a day, by id."""
        return [each.agent for each in await self.serving()]

    async def serving(self) -> list[AgentContracts]:
        """All agents that were heard of within a day, by id, with their contracts."""
        old = _now_ms() - _AGENT_KEPT_S * 1000
        _, names = await self._link.calls(
            [("ZREMRANGEBYSCORE", FleetKeys.AGENTS, "-inf", old), ("ZRANGE", FleetKeys.AGENTS, 0, -1)]
        )
        if not names:
            return []
        commands = [("HMGET", FleetKeys.agent(name.decode()), "s", "c") for name in sorted(names)]
        return [
            AgentContracts(AgentSnapshot.FromString(snapshot), _digests(served or b""))
            for snapshot, served in await self._link.calls(commands)
            if snapshot
        ]

    async def _script(self, text: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        return await self._link.call("EVAL", text, len(keys), *keys, *arguments)


def _digests(text: bytes) -> dict[str, str]:
    """As `greet` writes them: a line for each service."""
    return dict(line.split(" ") for line in text.decode().splitlines())


def _now_ms() -> int:
    return int(time.time() * 1000)


def submission_digest(method: str, request: bytes) -> str:
    """Digest of a submission, for comparing those with one idempotency key: 64 hex digits."""
    return hashlib.sha256(method.encode() + b"\0" + request).hexdigest()
