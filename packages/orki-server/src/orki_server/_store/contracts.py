"""RegisteredContract task services, each under every contract that is in use, in Redis.

The hash of a service holds an image for each registered digest. One of them leads: it is a compatible evolution of all
others, and also stands under the plain names `digest`, `image` and `version`. What is registered changes by one script,
which does nothing unless the store still is as the caller saw it: so of two orchestrators that judge at once, one
judges again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orki.control.v1.task_pb2 import ServiceSnapshot
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store.connection import StoreConnection

# service, services, revisions | service, now (ms), leading digest; digest, image, version, "1" for ahead (or four times
# ""); number of digests that the caller saw, those; then each that goes, with its number of admissions
# -> 1, or 0 where the store is not as the caller saw it
_CHANGE: Final = """
local hash, name, now, leading = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local plain = redis.call('HGET', hash, 'digest')
if plain and plain ~= '' and redis.call('HEXISTS', hash, 'i:' .. plain) == 0 then
  -- Written by an orchestrator that knew one contract for each service.
  redis.call('HSET', hash, 'i:' .. plain, redis.call('HGET', hash, 'image') or '', 'w:' .. plain, now,
    'v:' .. plain, redis.call('HGET', hash, 'version') or '', 'n:' .. plain, 0)
end
local standing, count = {}, 0
for _, field in ipairs(redis.call('HKEYS', hash)) do
  if string.sub(field, 1, 2) == 'i:' then standing[string.sub(field, 3)], count = true, count + 1 end
end
local seen = tonumber(ARGV[8])
if seen ~= count then return 0 end
for at = 9, 8 + seen do
  if not standing[ARGV[at]] then return 0 end
end
for at = 9 + seen, #ARGV, 2 do
  if (redis.call('HGET', hash, 'n:' .. ARGV[at]) or '0') ~= ARGV[at + 1] then return 0 end
end
for at = 9 + seen, #ARGV, 2 do
  for _, kind in ipairs({ 'i:', 'v:', 'w:', 'n:', 'p:' }) do redis.call('HDEL', hash, kind .. ARGV[at]) end
end
if ARGV[4] ~= '' then
  redis.call('HSET', hash, 'i:' .. ARGV[4], ARGV[5], 'v:' .. ARGV[4], ARGV[6], 'w:' .. ARGV[4], now)
  redis.call('HSETNX', hash, 'n:' .. ARGV[4], 0)
  if ARGV[7] == '1' then redis.call('HSET', hash, 'p:' .. ARGV[4], '1') end
end
redis.call('HINCRBY', KEYS[3], name, 1)
local image = redis.call('HGET', hash, 'i:' .. leading)
if not image then
  redis.call('DEL', hash)
  redis.call('HDEL', KEYS[2], name)
  return 1
end
redis.call('HSET', hash, 'digest', leading, 'image', image, 'version', redis.call('HGET', hash, 'v:' .. leading))
redis.call('HSET', KEYS[2], name, leading)
return 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredContract:
    """One contract of a service.

    Attributes:
        service: Full name of the service.
        digest: Of the contract.
        image: The contract.
        version: Version of the package that holds it; empty where nobody knows.
        ahead: Whether it was applied and no agent has served it yet.
        since_ms: When it was registered, in milliseconds since the Unix epoch.
        admissions: Sessions that were ever admitted under it; a change of this number says that it is in use again.
    """

    service: str
    digest: str
    image: bytes
    version: str
    ahead: bool
    since_ms: int
    admissions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractChange:
    """What is to become of a service's registered contracts.

    Attributes:
        service: Full name.
        seen: Those that were registered when this was decided.
        gone: Those of them that go.
        added: One that comes; None for none.
        leading: Digest of the one that leads afterwards; empty when none is left.
    """

    service: str
    seen: Sequence[RegisteredContract]
    gone: Sequence[RegisteredContract]
    added: RegisteredContract | None
    leading: str


class Contracts:
    """Contracts of services, in Redis."""

    def __init__(self, link: StoreConnection, shards: int) -> None:
        self._link = link
        self._shards = shards

    async def revisions(self) -> dict[str, str]:
        """What changes with each change of a service's contracts, for every registered service."""
        leading, revisions = await self._link.calls([("HGETALL", FleetKeys.SERVICES), ("HGETALL", FleetKeys.REVISIONS)])
        numbers = {name.decode(): number.decode() for name, number in _pairs(revisions)}
        return {
            name.decode(): f"{digest.decode()} {numbers.get(name.decode(), '')}" for name, digest in _pairs(leading)
        }

    async def registered(self, services: Sequence[str]) -> dict[str, list[RegisteredContract]]:
        """The contracts of these services, by digest; none for a service that is not registered."""
        if not services:
            return {}
        replies = await self._link.calls([("HGETALL", FleetKeys.service(name)) for name in services])
        return {name: _registered(name, dict(_pairs(reply))) for name, reply in zip(services, replies, strict=True)}

    async def leading(self, service: str = "") -> list[ServiceSnapshot]:
        """The leading contract of each service, or of this one, by name; without the agents."""
        found = await self._link.call("HGETALL", FleetKeys.SERVICES)
        names = sorted(name.decode() for name, _ in _pairs(found) if service in ("", name.decode()))
        if not names:
            return []
        replies = await self._link.calls([("HMGET", FleetKeys.service(name), "digest", "image") for name in names])
        return [
            ServiceSnapshot(service=name, digest=digest.decode(), image=image)
            for name, (digest, image) in zip(names, replies, strict=True)
            if digest is not None
        ]

    async def change(self, change: ContractChange) -> bool:
        """Makes a change; False, and nothing happened, where the store is not as it was seen."""
        added = change.added
        brought: list[Any] = ["", "", "", ""]
        if added is not None:
            brought = [added.digest, added.image, added.version, "1" if added.ahead else ""]
        arguments = [change.service, int(time.time() * 1000), change.leading, *brought, len(change.seen)]
        arguments += [each.digest for each in change.seen]
        for each in change.gone:
            arguments += [each.digest, each.admissions]
        keys = (FleetKeys.service(change.service), FleetKeys.SERVICES, FleetKeys.REVISIONS)
        return bool(await self._link.call("EVAL", _CHANGE, len(keys), *keys, *arguments))

    async def unfinished(self, service: str) -> Mapping[str, int]:
        """Number of the service's tasks that have not ended, by the digest under which they were submitted.

        Those of which the digest is not known stand under the empty one.
        """
        replies = await self._link.calls([("HGETALL", ShardKeys(shard).open) for shard in range(self._shards)])
        found: dict[str, int] = {}
        for reply in replies:
            counts = {name.decode(): int(count) for name, count in _pairs(reply)}
            rest = counts.get(service, 0)
            if not rest:
                # Contracts' counts that are left were not lowered by an orchestrator that knew of none.
                continue
            for name, count in counts.items():
                owner, _, digest = name.partition("@")
                if digest and owner == service:
                    found[digest] = found.get(digest, 0) + count
                    rest -= count
            found[""] = found.get("", 0) + max(rest, 0)
        return {digest: count for digest, count in found.items() if count > 0}


def _registered(service: str, fields: Mapping[bytes, bytes]) -> list[RegisteredContract]:
    plain = fields.get(b"digest", b"").decode()
    digests = {name[2:].decode() for name in fields if name.startswith(b"i:")} | {plain} - {""}

    def get(kind: str, digest: str, otherwise: bytes = b"") -> bytes:
        return fields.get(f"{kind}:{digest}".encode(), otherwise)

    return [
        RegisteredContract(
            service=service,
            digest=digest,
            image=get("i", digest, fields.get(b"image", b"")),
            version=get("v", digest, fields.get(b"version", b"") if digest == plain else b"").decode(),
            ahead=bool(get("p", digest)),
            since_ms=int(get("w", digest, b"0")),
            admissions=int(get("n", digest, b"0")),
        )
        for digest in sorted(digests)
    ]


def _pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """HGETALL's reply, which redis-py may have made a dict of."""
    return list(reply.items()) if isinstance(reply, dict) else list(zip(reply[::2], reply[1::2], strict=True))
