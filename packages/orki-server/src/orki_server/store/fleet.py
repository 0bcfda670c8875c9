"""What the fleet's orchestrators know in common: agents, registered services, the layout of the store."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import Any, Final

from orki.control.v1.task_pb2 import AgentSnapshot, ServiceSnapshot
from orki_contract.errors import InvalidSetting
from orki_server.keys import LAYOUT_VERSION, FleetKeys, ShardKeys
from orki_server.store.link import Link

__all__ = ["Fleet", "Greeting"]

_AGENT_KEPT_S: Final = 86_400

# agent, agents | agent id, instance, snapshot, now (ms), kept (s) -> epoch, instance before
_GREET: Final = """
local before = redis.call('HGET', KEYS[1], 'i') or ''
local epoch = redis.call('HINCRBY', KEYS[1], 'e', 1)
redis.call('HSET', KEYS[1], 'i', ARGV[2], 's', ARGV[3])
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

# service, services | service, digest that it replaces ("" for none), digest, image, version -> digest that stands
_REGISTER: Final = """
local standing = redis.call('HGET', KEYS[2], ARGV[1]) or ''
if standing ~= ARGV[2] and standing ~= ARGV[3] then return standing end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('HSET', KEYS[1], 'digest', ARGV[3], 'image', ARGV[4], 'version', ARGV[5])
return ARGV[3]
"""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the store says to an agent's hello.

    Attributes:
        epoch: Number of the session among the agent's.
        before: The instance that had the session before; empty for none.
    """

    epoch: int
    before: str


class Fleet:
    """Agents and services, in Redis."""

    def __init__(self, link: Link, shards: int) -> None:
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

    async def greet(self, agent: AgentSnapshot) -> Greeting:
        """An agent's hello was accepted."""
        reply = await self._script(
            _GREET,
            (FleetKeys.agent(agent.agent_id), FleetKeys.AGENTS),
            (agent.agent_id, agent.instance_id, agent.SerializeToString(), _now_ms(), _AGENT_KEPT_S),
        )
        return Greeting(int(reply[0]), reply[1].decode())

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
        old = _now_ms() - _AGENT_KEPT_S * 1000
        _, names = await self._link.calls(
            [("ZREMRANGEBYSCORE", FleetKeys.AGENTS, "-inf", old), ("ZRANGE", FleetKeys.AGENTS, 0, -1)]
        )
        if not names:
            return []
        replies = await self._link.calls([("HGET", FleetKeys.agent(name.decode()), "s") for name in sorted(names)])
        return [AgentSnapshot.FromString(reply) for reply in replies if reply]

    async def digests(self) -> dict[str, str]:
        """Digest of each registered service."""
        reply = await self._link.call("HGETALL", FleetKeys.SERVICES)
        return {name.decode(): digest.decode() for name, digest in _pairs(reply)}

    async def services(self, names: list[str]) -> list[ServiceSnapshot]:
        """The registered ones among these services, with their images, in the same order."""
        if not names:
            return []
        replies = await self._link.calls([("HMGET", FleetKeys.service(name), "digest", "image") for name in names])
        return [
            ServiceSnapshot(service=name, digest=digest.decode(), image=image)
            for name, (digest, image) in zip(names, replies, strict=True)
            if digest is not None
        ]

    async def register(self, service: ServiceSnapshot, replaces: str, version: str) -> str:
        """Registers a service, if the digest that stands is `replaces` ("": none); the digest that stands then."""
        reply = await self._script(
            _REGISTER,
            (FleetKeys.service(service.service), FleetKeys.SERVICES),
            (service.service, replaces, service.digest, service.image, version),
        )
        return bytes(reply).decode()

    async def unfinished(self, service: str) -> int:
        """Number of the service's tasks that have not ended."""
        commands = [("HGET", ShardKeys(shard).open, service) for shard in range(self._shards)]
        return sum(int(reply or 0) for reply in await self._link.calls(commands))

    async def _script(self, text: str, keys: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        return await self._link.call("EVAL", text, len(keys), *keys, *arguments)


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """HGETALL's reply, which redis-py may have made a dict of."""
    return list(reply.items()) if isinstance(reply, dict) else list(zip(reply[::2], reply[1::2], strict=True))


def _now_ms() -> int:
    return int(time.time() * 1000)


def digest_of(method: str, request: bytes) -> str:
    """Digest of a submission, for comparing those with one idempotency key: 64 hex digits."""
    return hashlib.sha256(method.encode() + b"\0" + request).hexdigest()
