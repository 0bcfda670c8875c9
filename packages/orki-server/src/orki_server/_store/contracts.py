"""Registered task services in Redis, each under all contracts that are in use.

One contract of a service leads: it is a compatible evolution of the others. The registered contracts change by one
script, which does nothing unless the store still is as the caller saw it. So if two orchestrators decide at the same
time, one of them decides again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from orki.control.v1.task_pb2 import ServiceSnapshot
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store.connection import StoreConnection

# KEYS: service, services, revisions. ARGV: service, now (ms), leading digest; of the added contract the digest, image,
# version and "1" for ahead (or four times ""); the number of digests that the caller saw, and these; then digest and
# number of admissions of each removed contract.
# -> 1, or 0 if the store is not as the caller saw it
_CHANGE: Final = """
local hash, name, now, leading = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local registered, count = {}, 0
for _, field in ipairs(redis.call('HKEYS', hash)) do
  local digest = string.match(field, '^image:(.*)$')
  if digest then registered[digest], count = true, count + 1 end
end
local seen = tonumber(ARGV[8])
if seen ~= count then return 0 end
for at = 9, 8 + seen do
  if not registered[ARGV[at]] then return 0 end
end
for at = 9 + seen, #ARGV, 2 do
  if redis.call('HGET', hash, 'admissions:' .. ARGV[at]) ~= ARGV[at + 1] then return 0 end
end
for at = 9 + seen, #ARGV, 2 do
  for _, kind in ipairs({ 'image:', 'version:', 'registered_ms:', 'admissions:', 'ahead:' }) do
    redis.call('HDEL', hash, kind .. ARGV[at])
  end
end
local added = ARGV[4]
if added ~= '' then
  redis.call('HSET', hash, 'image:' .. added, ARGV[5], 'version:' .. added, ARGV[6], 'registered_ms:' .. added, now)
  redis.call('HSETNX', hash, 'admissions:' .. added, 0)
  if ARGV[7] == '1' then redis.call('HSET', hash, 'ahead:' .. added, '1') end
end
redis.call('HINCRBY', KEYS[3], name, 1)
if redis.call('HEXISTS', hash, 'image:' .. leading) == 1 then
  redis.call('HSET', KEYS[2], name, leading)
else
  redis.call('DEL', hash)
  redis.call('HDEL', KEYS[2], name)
end
return 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredContract:
    """One registered contract of a service.

    Attributes:
        service: Full name of the service.
        digest: Digest of the contract.
        image: The contract.
        version: Version of its package; empty if unknown.
        ahead: Whether it was applied and no agent has served it yet.
        registered: Time of its registration, in seconds since the Unix epoch.
        admissions: Number of sessions that were admitted under it; it changes when the contract is used again.
    """

    service: str
    digest: str
    image: bytes
    version: str
    ahead: bool
    registered: float
    admissions: int


class Contracts:
    """Registered contracts in Redis. All methods raise StoreUnavailable while the store is down."""

    def __init__(self, connection: StoreConnection, shards: int) -> None:
        self._connection = connection
        self._shards = shards

    async def revisions(self) -> dict[str, str]:
        """Return a text for each registered service that differs after each change of its contracts."""
        leading, revisions = await self._connection.calls(
            [("HGETALL", FleetKeys.SERVICES), ("HGETALL", FleetKeys.REVISIONS)]
        )
        numbers = _pairs(revisions)
        return {
            name.decode(): f"{digest.decode()} {numbers.get(name, b'').decode()}"
            for name, digest in _pairs(leading).items()
        }

    async def registered(self, services: Sequence[str]) -> dict[str, list[RegisteredContract]]:
        """Return the contracts of these services, by digest; none for a service that is not registered."""
        if not services:
            return {}
        replies = await self._connection.calls([("HGETALL", FleetKeys.service(name)) for name in services])
        return {name: _registered(name, _pairs(reply)) for name, reply in zip(services, replies, strict=True)}

    async def leading(self, service: str = "") -> list[ServiceSnapshot]:
        """Return the leading contract of each service, or of this one, by name and without agents."""
        found = _pairs(await self._connection.call("HGETALL", FleetKeys.SERVICES))
        digests = sorted((name.decode(), digest.decode()) for name, digest in found.items())
        digests = [row for row in digests if service in ("", row[0])]
        if not digests:
            return []
        images = await self._connection.calls(
            [("HGET", FleetKeys.service(name), f"image:{digest}") for name, digest in digests]
        )
        return [
            ServiceSnapshot(service=name, digest=digest, image=image)
            for (name, digest), image in zip(digests, images, strict=True)
            if image is not None
        ]

    async def change(
        self,
        service: str,
        *,
        seen: Sequence[RegisteredContract],
        removed: Sequence[RegisteredContract],
        added: RegisteredContract | None,
        leading: str,
    ) -> bool:
        """Change a service's contracts. Returns False, and changes nothing, if the store is not as it was seen.

        Args:
            service: Full name of the service.
            seen: The contracts that were registered when the change was decided.
            removed: Those of them that are removed.
            added: The contract that is added; None for none.
            leading: Digest of the leading contract afterwards; empty if none is left.
        """
        brought: list[Any] = ["", "", "", ""]
        if added is not None:
            brought = [added.digest, added.image, added.version, "1" if added.ahead else ""]
        arguments = [service, int(time.time() * 1000), leading, *brought, len(seen)]
        arguments += [each.digest for each in seen]
        for each in removed:
            arguments += [each.digest, each.admissions]
        keys = (FleetKeys.service(service), FleetKeys.SERVICES, FleetKeys.REVISIONS)
        return bool(await self._connection.call("EVAL", _CHANGE, len(keys), *keys, *arguments))

    async def unfinished(self, service: str) -> Mapping[str, int]:
        """Return the number of the service's unfinished tasks by contract digest.

        Tasks without a digest are counted under the empty one.
        """
        replies = await self._connection.calls([("HGETALL", ShardKeys(shard).open) for shard in range(self._shards)])
        found: dict[str, int] = {}
        for reply in replies:
            counts = {name.decode(): int(count) for name, count in _pairs(reply).items()}
            rest = counts.pop(service, 0)
            for name, count in counts.items():
                owner, _, digest = name.partition("@")
                if digest and owner == service:
                    found[digest] = found.get(digest, 0) + count
                    rest -= count
            found[""] = found.get("", 0) + max(rest, 0)
        return {digest: count for digest, count in found.items() if count > 0}


def _registered(service: str, fields: Mapping[bytes, bytes]) -> list[RegisteredContract]:
    digests = sorted(name[len("image:") :].decode() for name in fields if name.startswith(b"image:"))

    def get(kind: str, digest: str) -> bytes:
        return fields.get(f"{kind}:{digest}".encode(), b"")

    return [
        RegisteredContract(
            service=service,
            digest=digest,
            image=get("image", digest),
            version=get("version", digest).decode(),
            ahead=bool(get("ahead", digest)),
            registered=int(get("registered_ms", digest)) / 1000,
            admissions=int(get("admissions", digest)),
        )
        for digest in digests
    ]


def _pairs(reply: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(reply[::2], reply[1::2], strict=True))
