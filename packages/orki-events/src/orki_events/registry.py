"""The registry of streams on the server: which contracts the fleet uses, and whether a new version fits them.

`orki:streams` stores for each stream its contract, its proto package, the package's version and the digest of its
image; `orki:images` stores the images (`contract.binpb`) by digest; `orki:subscriptions` stores, as `STREAM/GROUP`, the
groups that readers declare.

Each publisher and consumer brings its own version of the stream's contract, which is compared with the registered one.
A version that breaks on the wire is refused. Of two compatible versions, the newer one stays registered, in whatever
order their users start. A publisher's version replaces the registered one if it is a compatible evolution of it, or if
its version number is higher.
"""

from __future__ import annotations

__all__ = [
    "StreamRegistry",
    "StreamVersion",
    "compare_streams",
]

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final

from orki_contract import EventStream
from orki_contract.errors import ContractMismatch, EventsUnavailable, InvalidContract
from orki_contract.findings import Fit, stream_fit
from orki_contract.images import image_of, package_version
from orki_contract.model import AUDIT_GROUP, Durability, Group, Overflow, Retention, Start, Stream, dump, milliseconds
from orki_contract.read import ReadContract, read_image
from orki_events.connection import Connection, Script
from orki_events.groups import checked, pairs

_REGISTER: Final = Script("""\
-- KEYS: the table of streams.  ARGV: stream, the record that the caller read or "", the record to write.
-- Returns 1, or 0 if the record has changed meanwhile.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
""")
_STREAMS: Final = b"orki:streams"
_IMAGES: Final = b"orki:images"
_SUBSCRIPTIONS: Final = b"orki:subscriptions"
_DURATIONS: Final = frozenset({"ack_deadline", "least_age", "max_age", "max_dead_letter_age", "most_age"})
_MAX_TRIES: Final = 20
_MAX_REFUSALS: Final = 64
_log = logging.getLogger("orki.events")


class StreamRegistry:
    """Registers the streams that this process uses, and lists those that the fleet uses.

    Methods raise an OrkiError if the server does not answer or refuses.
    """

    def __init__(self) -> None:
        self._images: dict[str, tuple[str, bytes] | None] = {}
        self._refused: dict[tuple[str, bytes], str] = {}

    async def register(self, connection: Connection, handle: EventStream[Any, Any], *, publishes: bool) -> None:
        """Register a stream before its first use.

        Raises:
            ContractMismatch: The contract is incompatible with the registered one.
        """
        package = handle.message.DESCRIPTOR.file.package
        digest, image = self._image(package) or ("", None)
        own = StreamVersion(
            contract=handle.contract,
            package=package,
            digest=digest,
            image=image,
            version=package_version(package) if image is not None else "",
        )
        who = "this publisher" if publishes else "this consumer"
        if AUDIT_GROUP.name in {group.name for group in handle.contract.groups}:
            await self.register_version(connection, own, who, replaces=publishes)
            return
        # A reader's group on another owner's stream; the owner registers the stream.
        await self._compare(connection, own, who)
        for group in handle.contract.groups:
            await self.declare_group(connection, handle.contract, group)

    async def register_version(
        self, connection: Connection, own: StreamVersion, who: str, *, replaces: bool
    ) -> StreamVersion:
        """Register a version of a stream, and return the version that is registered now.

        Args:
            connection: The server.
            own: The version.
            who: The publisher or consumer that uses the version, for messages.
            replaces: Whether it replaces an older registered version; if not, it is registered only if none is yet.

        Raises:
            ContractMismatch: The contract is incompatible with the registered one.
        """
        for _ in range(_MAX_TRIES):
            record, registered = await self._compare(connection, own, who)
            chosen = _choose(registered, own, replaces)
            if chosen.record().encode() == record:
                return chosen
            if own.image is not None:
                await connection.execute((b"HSETNX", _IMAGES, own.digest, own.image))
            if await connection.run_script(_REGISTER, (_STREAMS,), own.contract.name, record, chosen.record()):
                return chosen
        raise EventsUnavailable(f'other processes keep changing the registration of "{own.contract.name}"; try again')

    async def declare_group(self, connection: Connection, stream: Stream, group: Group) -> None:
        """Register a group that a reader declares."""
        text = json.dumps({"group": _stored(dump(group)), "message": stream.message})
        await connection.execute((b"HSET", _SUBSCRIPTIONS, f"{stream.name}/{group.name}", text))

    async def withdraw(self, connection: Connection, stream: str) -> bool:
        """Remove a stream's registration, but not its entries. Return whether it was registered."""
        return bool(await connection.execute((b"HDEL", _STREAMS, stream)))

    async def streams(self, connection: Connection) -> list[StreamVersion]:
        """Return all registered streams, by name."""
        replies = await connection.pipeline((b"HGETALL", _STREAMS), (b"HGETALL", _IMAGES), (b"HGETALL", _SUBSCRIPTIONS))
        records, images, subscriptions = (pairs(checked(reply)) for reply in replies)
        declared = _declared_groups(subscriptions)
        found = []
        for name, record in sorted(records.items()):
            registered = _parsed(name, record, images)
            if registered is None:
                continue
            contract = registered.contract
            own = {group.name for group in contract.groups}
            extra = (group for group in declared.get(name, ()) if group.name not in own)
            found.append(
                replace(registered, contract=replace(contract, groups=tuple(sorted((*contract.groups, *extra)))))
            )
        return found

    async def check(self, connection: Connection, own: StreamVersion, who: str) -> StreamVersion | None:
        """Compare a version with the registered one without writing, and return the registered one, if any.

        Raises:
            ContractMismatch: The contract is incompatible with the registered one.
            InvalidContract: The version's own image cannot be read.
        """
        return (await self._compare(connection, own, who))[1]

    async def _compare(
        self, connection: Connection, own: StreamVersion, who: str
    ) -> tuple[bytes, StreamVersion | None]:
        name = own.contract.name
        record = await connection.execute((b"HGET", _STREAMS, name)) or b""
        if not record:
            return b"", None
        if (why := self._refused.get((own.digest, record))) is not None:
            raise ContractMismatch(why)
        registered = _parsed(name, record, {})
        if registered is None:
            return record, None
        if registered.digest:
            image = own.image
            if registered.digest != own.digest:
                image = await connection.execute((b"HGET", _IMAGES, registered.digest))
            registered = replace(registered, image=image)
        _ = own.read
        try:
            _, why = compare_streams(registered, own)
        except InvalidContract as error:
            _log.warning('the registered image of "%s" cannot be read; it is not compared: %s', name, error.message)
            return record, registered
        if why:
            message = (
                f'{who} uses the stream "{name}" by {own}, which is incompatible with the registered {registered}: '
                f"{why}. Use a compatible version, or another name for the stream. If the registered version is not "
                f"used any more, withdraw it: orki contract withdraw {name}"
            )
            if own.digest:
                # Repeated attempts must not compare the same two images each time.
                if len(self._refused) >= _MAX_REFUSALS:
                    self._refused.clear()
                self._refused[own.digest, record] = message
            raise ContractMismatch(message)
        return record, registered

    def _image(self, package: str) -> tuple[str, bytes] | None:
        if package not in self._images:
            try:
                image = image_of(package)
            except InvalidContract as error:
                _log.info("%s; observers will count the entries of its streams without decoding them", error.message)
                self._images[package] = None
            else:
                self._images[package] = (f"sha256:{hashlib.sha256(image).hexdigest()}", image)
        return self._images[package]


def _choose(registered: StreamVersion | None, own: StreamVersion, replaces: bool) -> StreamVersion:
    if registered is None:
        return own
    if registered.digest == own.digest and own.ahead:
        return registered
    if replaces and _follows(registered, own):
        return own
    # A version that was applied ahead of its use is now used.
    return replace(registered, ahead=registered.ahead and registered.digest != own.digest)


def _follows(registered: StreamVersion, own: StreamVersion) -> bool:
    """Whether a compatible version replaces the registered one."""
    fit, _ = compare_streams(registered, own)
    if fit is None or not fit.forward:
        return True
    before, after = _release(registered.version), _release(own.version)
    return before is not None and after is not None and after > before


def _release(version: str) -> tuple[int, ...] | None:
    # Only release numbers are compared: a pre-release of a version must not replace it, nor be replaced by it. PEP 440
    # parsing (`packaging`) would be a run-time dependency for this one comparison.
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else None


def _parsed(name: str, record: bytes, images: dict[str, bytes]) -> StreamVersion | None:
    try:
        return StreamVersion.parse(record, images)
    except InvalidContract as error:
        _log.warning('the record of stream "%s" in orki:streams cannot be read and is left out: %s', name, error)
        return None


def _declared_groups(records: dict[str, bytes]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for name, record in sorted(records.items()):
        stream = name.rpartition("/")[0]
        try:
            found.setdefault(stream, []).append(_group(json.loads(record)["group"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning('the record "%s" in orki:subscriptions cannot be read and is left out: %s', name, error)
    return found


_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class StreamVersion:
    """A stream in one version of its package.

    Attributes:
        contract: The stream with its owner's groups. In a registered version, also the groups that readers declared.
        package: Proto package of its message.
        digest: Digest of the image; empty without one.
        image: The package's `contract.binpb`; None if missing: then entries can be counted but not decoded.
        version: Version of the package's distribution; empty if unknown.
        ahead: Whether it was applied before any publisher or consumer used it.
    """

    contract: Stream
    package: str
    digest: str
    image: bytes | None = field(repr=False)
    version: str = ""
    ahead: bool = False

    @cached_property
    def read(self) -> ReadContract | None:
        """The image's contract, if it declares this stream; raises InvalidContract if the image is invalid."""
        if self.image is None:
            return None
        read = read_image(self.image)
        return read if any(each.name == self.contract.name for each in read.contract.streams) else None

    def __str__(self) -> str:
        """Return the version and the beginning of the image's digest, if known."""
        short = self.digest[: len("sha256:") + _DIGITS] or "a contract without an image"
        return f"{self.version} ({short})" if self.version else short

    def record(self) -> str:
        """Return the registry's record, which does not contain the image."""
        written: dict[str, Any] = {
            "contract": _stored(dump(self.contract)),
            "package": self.package,
            "image": self.digest,
        }
        if self.version:
            written["version"] = self.version
        if self.ahead:
            written["ahead"] = True
        return json.dumps(written)

    @classmethod
    def parse(cls, record: bytes | str, images: dict[str, bytes]) -> StreamVersion:
        """Read a record that this or another version of orki wrote.

        Raises:
            InvalidContract: The text is not a record of a stream.
        """
        try:
            parsed = json.loads(record)
            digest = str(parsed["image"])
            return cls(
                contract=_stream(parsed["contract"]),
                package=str(parsed["package"]),
                digest=digest,
                image=images.get(digest),
                version=str(parsed.get("version", "")),
                ahead=bool(parsed.get("ahead", False)),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidContract(f"this is not a record of a stream: {error!r}") from error


def compare_streams(registered: StreamVersion, own: StreamVersion) -> tuple[Fit | None, str]:
    """Compare a version with the registered one.

    Returns:
        The fit, and a description of the incompatibilities with their rules, empty if there are none. The fit is None
        if an image is missing or does not declare the stream; then only message and partitioning are compared.
    """
    if registered.digest and registered.digest == own.digest:
        return Fit((), ()), ""
    one, other = registered.read, own.read
    if one is not None and other is not None:
        fit = stream_fit(own.contract.name, one, other)
        return fit, "" if fit.compatible else str(fit)
    before, after = registered.contract, own.contract
    differences = [
        f'stream "{after.name}" has another {name}: {old or "none"} → {new or "none"} [{rule}]'
        for name, rule, old, new in (
            ("message", "ORKI_STREAM_MOVED", before.message, after.message),
            ("number of partitions", "ORKI_STREAM_PARTITIONS_CHANGED", before.partitions, after.partitions),
            ("partition key", "ORKI_STREAM_KEY_CHANGED", before.partition_key, after.partition_key),
        )
        if old != new
    ]
    return None, "; ".join(differences)


def _stream(dumped: Any) -> Stream:
    retention = _known(Retention, dumped["retention"])
    retention["overflow"] = Overflow(retention.get("overflow", Overflow.DROP_OLDEST))
    values = _known(Stream, dumped)
    values["retention"] = Retention(**retention)
    values["durability"] = Durability(values.get("durability", Durability.MEMORY))
    values["groups"] = tuple(map(_group, dumped["groups"]))
    return Stream(**values)


def _group(dumped: dict[str, Any]) -> Group:
    values = _known(Group, dumped)
    values["start"] = Start(values.get("start", Start.EARLIEST))
    return Group(**values)


def _known(kind: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the stored values of a class's fields; members that a newer version added are ignored."""
    values = {}
    for each in fields(kind):
        if each.name in _DURATIONS and f"{each.name}_ms" in stored:
            values[each.name] = stored[f"{each.name}_ms"] / 1_000
        elif each.name in stored:
            values[each.name] = stored[each.name]
    return values


def _stored(dumped: Any) -> Any:
    """Convert a dump for Redis, where durations are whole milliseconds."""
    if isinstance(dumped, list):
        return [_stored(each) for each in dumped]
    if not isinstance(dumped, dict):
        return dumped
    return {
        f"{name}_ms" if name in _DURATIONS else name: milliseconds(value) if name in _DURATIONS else _stored(value)
        for name, value in dumped.items()
    }
