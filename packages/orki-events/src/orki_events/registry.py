"""The streams that the fleet uses, kept on the server: by them contracts are judged, and observers know what to follow.

`orki:streams` holds for each stream its contract, its proto package, the package's version and the digest of its image;
`orki:images` holds the images (`contract.binpb`) by digest; `orki:subscriptions` holds, as `STREAM/GROUP`, groups that
readers declared.

Who publishes or consumes brings its own version of the stream's contract, and is judged by findings against the
registered one. What breaks on the wire is refused, whoever brings it. Of two versions that fit, the evolved one stays
registered, whether its publishers or those of the older one start first; where either may follow the other, or where
the package's version is higher, the newcomer's stands.
"""

from __future__ import annotations

__all__ = [
    "RegisteredStream",
    "StreamRegistry",
    "StreamVersion",
    "compare_streams",
    "stream_from_dump",
]

import hashlib
import json
import logging
import re
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final

from orki_contract.errors import ContractMismatch, EventsUnavailable, InvalidContract, OrkiError
from orki_contract.findings import Fit, stream_fit
from orki_contract.handles import EventStream
from orki_contract.images import image_of
from orki_contract.model import AUDIT_GROUP, Group, Overflow, Retention, Start, Stream, dump
from orki_contract.provenance import package_version
from orki_contract.read import ReadContract, read_image
from orki_events.connection import Connection, Script
from orki_events.groups import pairs

_REGISTER: Final = Script("""\
-- KEYS: the table of streams.  ARGV: stream, the record that the caller saw or "", the record to write.
-- 1, or 0 where the record is another one by now.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
""")
_STREAMS: Final = b"orki:streams"
_IMAGES: Final = b"orki:images"
_SUBSCRIPTIONS: Final = b"orki:subscriptions"
_TRIES: Final = 20
_REFUSALS: Final = 64
_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True)
class RegisteredStream:
    """A stream that somebody publishes or consumes.

    Attributes:
        contract: The stream, with the groups that its owner declares and those that readers declared.
        package: Proto package of its message.
        digest: Digest of the image; empty without one.
        image: The package's `contract.binpb`, or None: without it the entries can be counted, not decoded.
        version: Version of the distribution that holds the package; empty where nobody knows.
        ahead: Whether it was applied, and nobody has published or consumed by it yet.
    """

    contract: Stream
    package: str
    digest: str
    image: bytes | None = field(repr=False)
    version: str = ""
    ahead: bool = False


class StreamRegistry:
    """Judges and writes what this process uses, and reads what the fleet uses."""

    def __init__(self) -> None:
        self._images: dict[str, tuple[str, bytes] | None] = {}
        self._refused: dict[tuple[str, bytes], str] = {}

    async def register(self, link: Connection, handle: EventStream[Any, Any], *, publishes: bool) -> None:
        """Tells the fleet of a stream, if it fits what is registered; to be called before the stream is used.

        Raises:
            ContractMismatch: It breaks with the registered contract on the wire.
            OrkiError: The server does not answer or refuses.
        """
        package = handle.message.DESCRIPTOR.file.package
        digest, image = self._image(package) or ("", None)
        own = StreamVersion(
            stream=handle.contract,
            package=package,
            digest=digest,
            image=image,
            version=package_version(package) if image is not None else "",
        )
        who = "this publisher" if publishes else "this consumer"
        if AUDIT_GROUP.name in {group.name for group in handle.contract.groups}:
            await self.enter(link, own, who, replaces=publishes)
            return
        # A reader declares a group on a stream of somebody else's, who registers the stream.
        await self._judged(link, own, who)
        for group in handle.contract.groups:
            await self.subscribe(link, handle.contract, group)

    async def enter(self, link: Connection, own: StreamVersion, who: str, *, replaces: bool) -> StreamVersion:
        """Registers a version of a stream, if it fits.

        Args:
            link: The server.
            own: The version.
            who: Who brings it, for messages.
            replaces: Whether it takes the place of the registered one when it is the newer one; else it fills a gap.

        Returns:
            The version that is registered now.

        Raises:
            ContractMismatch: It breaks with the registered contract on the wire.
            OrkiError: The server does not answer or refuses.
        """
        for _ in range(_TRIES):
            record, standing = await self._judged(link, own, who)
            stands = _standing(standing, own, replaces)
            if stands.record().encode() == record:
                return stands
            if own.image is not None:
                await link.execute((b"HSETNX", _IMAGES, own.digest, own.image))
            if await link.run_script(_REGISTER, (_STREAMS,), own.stream.name, record, stands.record()):
                return stands
        raise EventsUnavailable(f'others register the stream "{own.stream.name}" all the time; try again')

    async def subscribe(self, link: Connection, stream: Stream, group: Group) -> None:
        """Registers a group that a reader declares.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        text = json.dumps({"group": dump(group), "message": stream.message})
        await link.execute((b"HSET", _SUBSCRIPTIONS, f"{stream.name}/{group.name}", text))

    async def forget(self, link: Connection, stream: str) -> bool:
        """Withdraws a stream's registration, and nothing of its entries; whether there was one.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        return bool(await link.execute((b"HDEL", _STREAMS, stream)))

    async def streams(self, link: Connection) -> list[RegisteredStream]:
        """All registered streams, by name.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        replies = await link.pipeline((b"HGETALL", _STREAMS), (b"HGETALL", _IMAGES), (b"HGETALL", _SUBSCRIPTIONS))
        for reply in replies:
            if isinstance(reply, OrkiError):
                raise reply
        records, images, subscriptions = map(pairs, replies)
        added = _subscribed(subscriptions)
        found = []
        for name, record in sorted(records.items()):
            version = _parsed(name, record, images)
            if version is None:
                continue
            stream = version.stream
            own = {group.name for group in stream.groups}
            extra = (group for group in added.get(name, ()) if group.name not in own)
            contract = replace(stream, groups=tuple(sorted((*stream.groups, *extra))))
            row = (contract, version.package, version.digest, version.image, version.version, version.ahead)
            found.append(RegisteredStream(*row))
        return found

    async def judge(self, link: Connection, own: StreamVersion, who: str) -> StreamVersion | None:
        """Judges a version of a stream against the registered one, and writes nothing.

        Returns:
            The registered version; None where there is none.

        Raises:
            ContractMismatch: They break with each other on the wire.
            InvalidContract: The version's own image cannot be read.
            OrkiError: The server does not answer or refuses.
        """
        return (await self._judged(link, own, who))[1]

    async def _judged(self, link: Connection, own: StreamVersion, who: str) -> tuple[bytes, StreamVersion | None]:
        name = own.stream.name
        record = await link.execute((b"HGET", _STREAMS, name)) or b""
        if not record:
            return b"", None
        if (why := self._refused.get((own.digest, record))) is not None:
            raise ContractMismatch(why)
        standing = _parsed(name, record, {})
        if standing is None:
            return record, None
        if standing.digest:
            image = own.image
            if standing.digest != own.digest:
                image = await link.execute((b"HGET", _IMAGES, standing.digest))
            standing = replace(standing, image=image)
        _ = own.read
        try:
            _, why = compare_streams(standing, own)
        except InvalidContract as error:
            _log.warning('the registered image of "%s" cannot be read, and is not judged: %s', name, error.message)
            return record, standing
        if why:
            said = (
                f'{who} has the stream "{name}" by {own}, which does not fit {standing}, and that is registered: '
                f"{why}. Use a version that fits, or another name for the stream; where nobody uses the registered "
                f"one any more, withdraw it: orki contract withdraw {name}"
            )
            if own.digest:
                # Who goes on trying does not have the same two images compared each time.
                if len(self._refused) >= _REFUSALS:
                    self._refused.clear()
                self._refused[own.digest, record] = said
            raise ContractMismatch(said)
        return record, standing

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


def _standing(standing: StreamVersion | None, own: StreamVersion, replaces: bool) -> StreamVersion:
    """Which of two versions that fit is to be registered."""
    if standing is None:
        return own
    if standing.digest == own.digest and own.ahead:
        return standing
    if replaces and _follows(standing, own):
        return own
    # Somebody uses now what was applied ahead.
    return replace(standing, ahead=standing.ahead and standing.digest != own.digest)


def _follows(standing: StreamVersion, own: StreamVersion) -> bool:
    """Whether a version that fits takes the place of the registered one."""
    fit, _ = compare_streams(standing, own)
    if fit is None or not fit.forward:
        return True
    before, after = _release(standing.version), _release(own.version)
    return before is not None and after is not None and after > before


def _release(version: str) -> tuple[int, ...] | None:
    """The numbers that a version begins with."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else None


def _parsed(name: str, record: bytes, images: dict[str, bytes]) -> StreamVersion | None:
    try:
        return StreamVersion.parse(record, images)
    except InvalidContract as error:
        _log.warning('the record of stream "%s" in orki:streams cannot be read and is left out: %s', name, error)
        return None


def _subscribed(records: dict[str, bytes]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for name, record in sorted(records.items()):
        stream = name.rpartition("/")[0]
        try:
            found.setdefault(stream, []).append(group_from_dump(json.loads(record)["group"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning('the record "%s" in orki:subscriptions cannot be read and is left out: %s', name, error)
    return found


_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class StreamVersion:
    """One version of a stream.

    Attributes:
        stream: The stream, with its owner's groups.
        package: Proto package of its message.
        digest: Digest of the image; empty without one.
        image: The package's `contract.binpb`; None where nobody has it.
        version: Version of the distribution that holds the package; empty where nobody knows.
        ahead: Whether it was applied, and nobody has published or consumed by it yet.
    """

    stream: Stream
    package: str
    digest: str
    image: bytes | None = field(repr=False)
    version: str = ""
    ahead: bool = False

    @cached_property
    def read(self) -> ReadContract | None:
        """The image's contract, if it declares this stream; raises InvalidContract where the image is none."""
        if self.image is None:
            return None
        read = read_image(self.image)
        return read if any(each.name == self.stream.name for each in read.contract.streams) else None

    def __str__(self) -> str:
        """Version and the beginning of the image's digest, as far as they are known."""
        short = self.digest[: len("sha256:") + _DIGITS] or "a contract without an image"
        return f"{self.version} ({short})" if self.version else short

    def record(self) -> str:
        """As it lies in the registry; the image lies beside it."""
        written: dict[str, Any] = {"contract": dump(self.stream), "package": self.package, "image": self.digest}
        if self.version:
            written["version"] = self.version
        if self.ahead:
            written["ahead"] = True
        return json.dumps(written)

    @classmethod
    def parse(cls, record: bytes | str, images: dict[str, bytes]) -> StreamVersion:
        """Reads what `record` wrote, by this version or another.

        Raises:
            InvalidContract: It is no record of a stream.
        """
        try:
            parsed = json.loads(record)
            digest = str(parsed["image"])
            return cls(
                stream=_stream(parsed["contract"]),
                package=str(parsed["package"]),
                digest=digest,
                image=images.get(digest),
                version=str(parsed.get("version", "")),
                ahead=bool(parsed.get("ahead", False)),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidContract(f"this is no record of a stream: {error!r}") from error


def compare_streams(standing: StreamVersion, newcomer: StreamVersion) -> tuple[Fit | None, str]:
    """How a newcomer stands to what is registered.

    Returns:
        The fit, or None where an image is missing, or does not declare the stream: then only what decides where
        entries lie is compared. And why they do not fit, in words with the rules; empty where they fit.
    """
    if standing.digest and standing.digest == newcomer.digest:
        return Fit((), ()), ""
    one, other = standing.read, newcomer.read
    if one is not None and other is not None:
        fit = stream_fit(newcomer.stream.name, one, other)
        return fit, "" if fit.compatible else str(fit)
    before, after = standing.stream, newcomer.stream
    told = [
        f'stream "{after.name}" has another {name}: {old or "none"} → {new or "none"} [{rule}]'
        for name, rule, old, new in (
            ("message", "ORKI_STREAM_MOVED", before.message, after.message),
            ("number of partitions", "ORKI_STREAM_PARTITIONS_CHANGED", before.partitions, after.partitions),
            ("partition key", "ORKI_STREAM_KEY_CHANGED", before.partition_key, after.partition_key),
        )
        if old != new
    ]
    return None, "; ".join(told)


def _stream(dumped: Any) -> Stream:
    retention = _known(Retention, dumped["retention"])
    retention["overflow"] = Overflow(retention.get("overflow", Overflow.DROP_OLDEST))
    values = _known(Stream, dumped)
    values["retention"] = Retention(**retention)
    values["groups"] = tuple(map(group_from_dump, dumped["groups"]))
    return Stream(**values)


def group_from_dump(dumped: dict[str, Any]) -> Group:
    """The group whose `dump` this is; raises what a wrong shape raises."""
    values = _known(Group, dumped)
    values["start"] = Start(values.get("start", Start.EARLIEST))
    return Group(**values)


def stream_from_dump(dumped: Any) -> Stream:
    """The stream whose `dump` this is; members that a newer version added are left out.

    Raises:
        InvalidContract: It is no dump of a stream.
    """
    try:
        return _stream(dumped)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidContract(f"this is no dump of a stream: {error!r}") from error


def _known(kind: Any, dumped: dict[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in dumped.items() if name in names}
