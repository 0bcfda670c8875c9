"""Versions of one stream's contract: what stands in the registry, and whether another one fits it. No I/O."""

from __future__ import annotations

__all__ = ["StreamVersion", "group_from_dump", "judge_streams", "stream_from_dump"]

import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Final

from orki_contract.errors import InvalidContract
from orki_contract.findings import Fit, stream_fit
from orki_contract.model import Group, Overflow, Retention, Start, Stream, dump
from orki_contract.read import ReadContract, read_image

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


def judge_streams(standing: StreamVersion, newcomer: StreamVersion) -> tuple[Fit | None, str]:
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
