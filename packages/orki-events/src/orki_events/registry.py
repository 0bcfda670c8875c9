"""The streams that the fleet uses, kept on the server, so that an observer can follow those that it never heard of.

`orki:streams` holds for each stream its contract, its proto package and the digest of its image; `orki:images` holds
the images (`contract.binpb`) by digest; `orki:subscriptions` holds, as `STREAM/GROUP`, groups that readers declared.
"""

from __future__ import annotations

__all__ = ["RegisteredStream", "Registry", "stream_from_dump"]

import hashlib
import json
import logging
from dataclasses import dataclass, field, fields
from typing import Any, Final

from orki_contract.errors import InvalidContract, OrkiError
from orki_contract.handles import EventStream
from orki_contract.images import image_of
from orki_contract.model import AUDIT_GROUP, Group, Overflow, Retention, Start, Stream, dump
from orki_events.groups import pairs
from orki_events.redis_shell import Command, Link

_STREAMS: Final = b"orki:streams"
_IMAGES: Final = b"orki:images"
_SUBSCRIPTIONS: Final = b"orki:subscriptions"
_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True)
class RegisteredStream:
    """A stream that somebody publishes or consumes.

    Attributes:
        contract: The stream, with the groups that its owner declares and those that readers declared.
        package: Proto package of its message.
        digest: Digest of the image; empty without one.
        image: The package's `contract.binpb`, or None: without it the entries can be counted, not decoded.
    """

    contract: Stream
    package: str
    digest: str
    image: bytes | None = field(repr=False)


class Registry:
    """Writes what this process uses, and reads what the fleet uses."""

    def __init__(self) -> None:
        self._images: dict[str, tuple[str, bytes] | None] = {}

    async def register(self, link: Link, handle: EventStream[Any, Any], *, publishes: bool) -> None:
        """Tells the fleet of a stream.

        A publisher's contract replaces what was there; a consumer's fills a gap.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        stream = handle.contract
        package = handle.message.DESCRIPTOR.file.package
        commands: list[Command] = []
        if AUDIT_GROUP.name not in {group.name for group in stream.groups}:
            for group in stream.groups:
                text = json.dumps({"group": dump(group), "message": stream.message})
                commands.append((b"HSET", _SUBSCRIPTIONS, f"{stream.name}/{group.name}", text))
        else:
            image = self._image(package)
            if image is not None:
                commands.append((b"HSETNX", _IMAGES, *image))
            record = json.dumps({"contract": dump(stream), "package": package, "image": image[0] if image else ""})
            commands.append((b"HSET" if publishes else b"HSETNX", _STREAMS, stream.name, record))
        for reply in await link.ask(*commands):
            if isinstance(reply, OrkiError):
                raise reply

    async def streams(self, link: Link) -> list[RegisteredStream]:
        """All registered streams, by name.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        replies = await link.ask((b"HGETALL", _STREAMS), (b"HGETALL", _IMAGES), (b"HGETALL", _SUBSCRIPTIONS))
        for reply in replies:
            if isinstance(reply, OrkiError):
                raise reply
        records, images, subscriptions = map(pairs, replies)
        added = _subscribed(subscriptions)
        found = []
        for name, record in sorted(records.items()):
            try:
                parsed = json.loads(record)
                stream = stream_from_dump(parsed["contract"])
                digest = str(parsed["image"])
                package = str(parsed["package"])
            except (ValueError, KeyError, TypeError, InvalidContract) as error:
                _log.warning(
                    'the record of stream "%s" in orki:streams cannot be read and is left out: %s', name, error
                )
                continue
            own = {group.name for group in stream.groups}
            extra = (group for group in added.get(name, ()) if group.name not in own)
            merged = tuple(sorted((*stream.groups, *extra)))
            contract = Stream(**{**_shallow(stream), "groups": merged})
            found.append(RegisteredStream(contract, package, digest, images.get(digest)))
        return found

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


def stream_from_dump(dumped: Any) -> Stream:
    """The stream whose `dump` this is; members that a newer version added are left out.

    Raises:
        InvalidContract: It is no dump of a stream.
    """
    try:
        retention = _known(Retention, dumped["retention"])
        retention["overflow"] = Overflow(retention.get("overflow", Overflow.DROP_OLDEST))
        values = _known(Stream, dumped)
        values["retention"] = Retention(**retention)
        values["groups"] = tuple(map(_group, dumped["groups"]))
        return Stream(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidContract(f"this is no dump of a stream: {error!r}") from error


def _group(dumped: dict[str, Any]) -> Group:
    values = _known(Group, dumped)
    values["start"] = Start(values.get("start", Start.EARLIEST))
    return Group(**values)


def _known(kind: Any, dumped: dict[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in dumped.items() if name in names}


def _shallow(stream: Stream) -> dict[str, Any]:
    return {each.name: getattr(stream, each.name) for each in fields(stream)}


def _subscribed(records: dict[str, bytes]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for name, record in sorted(records.items()):
        stream = name.rpartition("/")[0]
        try:
            found.setdefault(stream, []).append(_group(json.loads(record)["group"]))
        except (ValueError, KeyError, TypeError) as error:
            _log.warning('the record "%s" in orki:subscriptions cannot be read and is left out: %s', name, error)
    return found
