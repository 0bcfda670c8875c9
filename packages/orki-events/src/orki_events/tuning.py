"""How much of a stream a deployment keeps: a setting within the contract's bounds, for the whole fleet.

The setting lies beside the registry, in `orki:retention`, and not with each process: whoever publishes trims, so one
publisher that was started without the setting would trim everybody's entries to the contract's own number. Publishers
read it before their first event and every few seconds from then on. It is judged when it is set. A process whose own
contract has narrower bounds, as it may during a rolling upgrade, keeps to the nearest of them and says so.
"""

from __future__ import annotations

__all__ = [
    "Tuned",
    "Tuning",
    "TuningCache",
    "effective_retention",
    "read_retention",
    "read_tunings",
    "tune",
]

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from orki_contract.errors import InvalidContract, InvalidSetting, OrkiError
from orki_contract.model import Retention, Stream
from orki_contract.read import read_image
from orki_events.connection import Command, Connection
from orki_events.entries import stream_keys
from orki_events.groups import pairs
from orki_events.registry import RegisteredStream

REFRESH_S: Final = 2.0
"""Longest time that a publisher goes by settings that it has read, in seconds."""

_KEY: Final = b"orki:retention"
_MOST: Final = (1 << 63) - 1
_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A deployment's setting for one stream; it applies to each partition, and to dead letters likewise.

    Attributes:
        max_entries: Most entries kept; 0 for as many as the contract says.
        max_age_ms: Longest time in milliseconds that an entry is kept; 0 for as long as the contract says.
    """

    max_entries: int = 0
    max_age_ms: int = 0

    def __post_init__(self) -> None:
        """Validates what can be judged without a stream.

        Raises:
            InvalidSetting: A value is no whole number from 0 to 2^63-1.
        """
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
                raise InvalidSetting(f"Tuning.{name} is {value!r}; it must be a whole number from 0 to 2^63-1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a setting did.

    Attributes:
        retention: What is kept from now on.
        trimmed: Entries that went at once, over all partitions.
    """

    retention: Retention
    trimmed: int


def effective_retention(retention: Retention, tuning: Tuning | None) -> Retention:
    """What is kept under a setting; where the setting lies outside the contract's bounds, the nearest of them."""
    if tuning is None:
        return retention
    least, most = retention.entries_bounds
    shortest, longest = retention.age_bounds_ms
    return replace(
        retention,
        max_entries=min(max(tuning.max_entries or retention.max_entries, least), most),
        max_age_ms=min(max(tuning.max_age_ms or retention.max_age_ms, shortest), longest),
    )


async def read_tunings(link: Connection) -> dict[str, Tuning]:
    """All settings by stream; what cannot be read is told and left out.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    found = {}
    for name, record in pairs(await link.execute((b"HGETALL", _KEY))).items():
        if (tuning := _parsed(name, record)) is not None:
            found[name] = tuning
    return found


async def read_retention(link: Connection, stream: Stream) -> Retention:
    """What is kept of one stream at this moment.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    record = await link.execute((b"HGET", _KEY, stream.name))
    return effective_retention(stream.retention, _parsed(stream.name, record) if record else None)


async def tune(link: Connection, registered: RegisteredStream, tuning: Tuning | None) -> Tuned:
    """Sets how much of a stream the fleet keeps, and trims what is too much at once.

    Args:
        link: The event server.
        registered: The stream, as its registered contract has it.
        tuning: The setting; it replaces an earlier one. None takes it back: then the contract's own values stand.

    Raises:
        InvalidSetting: A value lies outside the bounds that the contract declares, or it declares none.
        OrkiError: The server does not answer or refuses.
    """
    stream = registered.contract
    if tuning is not None:
        _judge(registered, tuning)
    if tuning in (None, Tuning()):
        await link.execute((b"HDEL", _KEY, stream.name))
        return Tuned(retention=stream.retention, trimmed=await _trim(link, stream, stream.retention))
    retention = effective_retention(stream.retention, tuning)
    # Trimmed first: a server without memory refuses the setting, and may take it once there is room.
    trimmed = await _trim(link, stream, retention)
    await link.execute((b"HSET", _KEY, stream.name, json.dumps(asdict(tuning))))
    return Tuned(retention=retention, trimmed=trimmed)


class TuningCache:
    """The settings as one publisher knows them."""

    def __init__(self) -> None:
        self._found: Mapping[str, Tuning] = {}
        self._read_at: float | None = None
        self._told: set[tuple[str, Tuning]] = set()

    async def refresh(self, link: Connection, now: float) -> None:
        """Reads the settings where they were not read lately. `now` is monotonic, in seconds.

        Raises:
            OrkiError: The server does not answer or refuses.
        """
        if self._read_at is None or now >= self._read_at + REFRESH_S:
            self._found = await read_tunings(link)
            self._read_at = now

    def retention(self, stream: Stream) -> Retention:
        """What is kept of a stream."""
        tuning = self._found.get(stream.name)
        if tuning is None:
            return stream.retention
        found = effective_retention(stream.retention, tuning)
        wanted = (tuning.max_entries or found.max_entries, tuning.max_age_ms or found.max_age_ms)
        if wanted != (found.max_entries, found.max_age_ms) and (stream.name, tuning) not in self._told:
            self._told.add((stream.name, tuning))
            _log.warning(
                'stream "%s" is set to keep %d entries, %d ms; this contract bounds that to %d entries, %d ms',
                *(stream.name, *wanted, found.max_entries, found.max_age_ms),
            )
        return found


def _judge(registered: RegisteredStream, tuning: Tuning) -> None:
    retention = registered.contract.retention
    for value, kind, (least, most), unit in (
        (tuning.max_entries, "entries", retention.entries_bounds, ""),
        (tuning.max_age_ms, "age", retention.age_bounds_ms, " ms"),
    ):
        if value and not least <= value <= most:
            allows = f"its contract allows {least}{unit} to {most}{unit}"
            if least == most:
                allows = f"its contract keeps {least}{unit} and lets no deployment change it"
            if not most:
                allows = "its contract limits no age"
            raise InvalidSetting(
                f'stream "{registered.contract.name}" cannot be set to a max_{kind} of {value}{unit}: {allows} '
                f"(least_{kind} and most_{kind} of the retention {_declared(registered)}); choose what it allows, or "
                "release a contract with wider bounds"
            )


def _declared(registered: RegisteredStream) -> str:
    """Where the bounds are declared, as far as the registered contract tells."""
    message = registered.contract.message
    where = f"on {message}"
    if registered.image is not None:
        try:
            node = read_image(registered.image).schema.messages.get(message)
        except InvalidContract:
            node = None
        if node is not None:
            where += f" in {node.file.name}"
    return f"{where}, version {registered.version}" if registered.version else where


async def _trim(link: Connection, stream: Stream, retention: Retention) -> int:
    (clock,) = await link.pipeline((b"TIME",))
    if isinstance(clock, OrkiError):
        raise clock
    oldest = int(clock[0]) * 1_000 + int(clock[1]) // 1_000 - retention.max_age_ms
    commands: list[Command] = []
    for key in stream_keys(stream):
        commands.append((b"XTRIM", key, b"MAXLEN", b"~", retention.max_entries))
        if retention.max_age_ms:
            commands.append((b"XTRIM", key, b"MINID", b"~", max(oldest, 0)))
    trimmed = 0
    for reply in await link.pipeline(*commands):
        if isinstance(reply, OrkiError):
            raise reply
        trimmed += reply
    return trimmed


def _parsed(name: str, record: bytes) -> Tuning | None:
    try:
        written: Any = json.loads(record)
        return Tuning(max_entries=written.get("max_entries", 0), max_age_ms=written.get("max_age_ms", 0))
    except (ValueError, AttributeError, InvalidSetting) as error:
        _log.warning('the setting of stream "%s" in orki:retention cannot be read and is left out: %s', name, error)
        return None
