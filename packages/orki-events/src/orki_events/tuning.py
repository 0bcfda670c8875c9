"""Retention settings of a deployment: how much of a stream the whole fleet keeps, within the contract's bounds.

The settings are stored in `orki:retention` on the server and not in each process: any process may trim, so one that was
started without the setting would trim all streams to the contract's retention. Publishers read the settings
before their first event and every few seconds afterwards. A setting is validated when it is made. A process whose own
contract has narrower bounds, as it may during a rolling upgrade, uses the nearest bound and logs a warning.
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
from dataclasses import dataclass, replace
from typing import Any, Final

from orki_contract.errors import EventsUnavailable, InvalidContract, InvalidSetting, OrkiError
from orki_contract.model import Retention, Stream, duration_text, milliseconds
from orki_contract.read import read_image
from orki_events._trimming import trim_stream
from orki_events.connection import Connection
from orki_events.groups import pairs
from orki_events.registry import StreamVersion

_REFRESH_INTERVAL: Final = 2.0
_KEY: Final = b"orki:retention"
_MAX: Final = (1 << 63) - 1
_MAX_AGE: Final = (1 << 53) // 1_000
_log = logging.getLogger("orki.events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A deployment's retention of one stream. It applies to each partition.

    Attributes:
        max_entries: Maximum number of entries; 0 for the contract's.
        max_age: Maximum age of an entry in seconds, to the millisecond; 0 for the contract's.

    Raises:
        InvalidSetting: A value is not a number, negative, or too large.
    """

    max_entries: int = 0
    max_age: float = 0.0

    def __post_init__(self) -> None:
        entries: Any = self.max_entries
        age: Any = self.max_age
        if isinstance(entries, bool) or not isinstance(entries, int) or not 0 <= entries <= _MAX:
            raise InvalidSetting(f"Tuning.max_entries is {entries!r}; it must be a whole number from 0 to 2^63-1")
        if isinstance(age, bool) or not isinstance(age, int | float) or not 0 <= age <= _MAX_AGE:
            raise InvalidSetting(f"Tuning.max_age is {age!r}; it must be a number of seconds from 0 to {_MAX_AGE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The result of setting a stream's retention.

    Attributes:
        retention: The retention from now on.
        trimmed: Number of entries that were trimmed at once, over all partitions.
    """

    retention: Retention
    trimmed: int


def effective_retention(retention: Retention, tuning: Tuning | None) -> Retention:
    """Return the retention under a setting; a value outside the contract's bounds is replaced by the nearest bound."""
    if tuning is None:
        return retention
    least, most = retention.entries_bounds
    shortest, longest = retention.age_bounds
    return replace(
        retention,
        max_entries=min(max(tuning.max_entries or retention.max_entries, least), most),
        max_age=min(max(tuning.max_age or retention.max_age, shortest), longest),
    )


async def read_tunings(connection: Connection) -> dict[str, Tuning]:
    """Return all settings by stream. Unreadable ones are logged and left out."""
    found = {}
    for name, record in pairs(await connection.execute((b"HGETALL", _KEY))).items():
        if (tuning := _parsed(name, record)) is not None:
            found[name] = tuning
    return found


async def read_retention(connection: Connection, stream: Stream) -> Retention:
    """Return the current retention of one stream."""
    record = await connection.execute((b"HGET", _KEY, stream.name))
    return effective_retention(stream.retention, _parsed(stream.name, record) if record else None)


async def tune(connection: Connection, registered: StreamVersion, tuning: Tuning | None) -> Tuned:
    """Set how much of a stream the fleet keeps, and trim the stream.

    Args:
        connection: The server.
        registered: The stream as its registered contract declares it.
        tuning: The setting, which replaces an earlier one; None restores the contract's retention.

    Raises:
        InvalidSetting: A value is outside the bounds that the contract declares, or the contract declares none.
    """
    stream = registered.contract
    if tuning is not None:
        _validate(registered, tuning)
    if tuning in (None, Tuning()):
        await connection.execute((b"HDEL", _KEY, stream.name))
        return Tuned(
            retention=stream.retention, trimmed=await trim_stream(connection, stream, stream.retention, stream.groups)
        )
    retention = effective_retention(stream.retention, tuning)
    # Trim first: a server that is out of memory may accept the setting once entries are trimmed.
    trimmed = await trim_stream(connection, stream, retention, stream.groups)
    record = {"max_entries": tuning.max_entries, "max_age_ms": milliseconds(tuning.max_age)}
    await connection.execute((b"HSET", _KEY, stream.name, json.dumps(record)))
    return Tuned(retention=retention, trimmed=trimmed)


async def trim(connection: Connection, stream: Stream) -> Retention:
    """Trim a stream to its current retention, which is returned."""
    retention = await read_retention(connection, stream)
    await trim_stream(connection, stream, retention, stream.groups)
    return retention


class TuningCache:
    """The settings, as one publisher last read them."""

    def __init__(self) -> None:
        self._found: Mapping[str, Tuning] = {}
        self._read_at: float | None = None
        self._warned: set[tuple[str, Tuning]] = set()

    async def refresh(self, connection: Connection, now: float) -> None:
        """Read the settings if they are older than two seconds. `now` is in seconds on a monotonic clock."""
        if self._read_at is None or now >= self._read_at + _REFRESH_INTERVAL:
            try:
                self._found = await read_tunings(connection)
            except EventsUnavailable:
                raise
            except OrkiError as error:
                # Such as a key of another type: it must not keep events from being published.
                _log.warning("the retention settings of deployments cannot be read: %s", error.message)
            self._read_at = now

    def retention(self, stream: Stream) -> Retention:
        """Return the retention of a stream."""
        tuning = self._found.get(stream.name)
        if tuning is None:
            return stream.retention
        found = effective_retention(stream.retention, tuning)
        wanted = (tuning.max_entries or found.max_entries, tuning.max_age or found.max_age)
        if wanted != (found.max_entries, found.max_age) and (stream.name, tuning) not in self._warned:
            self._warned.add((stream.name, tuning))
            _log.warning(
                'stream "%s" is set to keep %d entries, %s; this contract limits that to %d entries, %s',
                *(stream.name, wanted[0], duration_text(wanted[1])),
                *(found.max_entries, duration_text(found.max_age)),
            )
        return found


def _validate(registered: StreamVersion, tuning: Tuning) -> None:
    retention = registered.contract.retention
    ages = tuple(map(milliseconds, retention.age_bounds))
    for value, kind, (least, most), unit in (
        (tuning.max_entries, "entries", retention.entries_bounds, ""),
        (milliseconds(tuning.max_age), "age", ages, " ms"),
    ):
        if value and not least <= value <= most:
            allows = f"its contract allows {least}{unit} to {most}{unit}"
            if least == most:
                allows = f"its contract fixes it at {least}{unit}"
            if not most:
                allows = "its contract does not limit the age"
            raise InvalidSetting(
                f'stream "{registered.contract.name}" cannot be set to a max_{kind} of {value}{unit}: {allows} '
                f"(least_{kind} and most_{kind} of the retention {_declared(registered)}); choose an allowed value, or "
                "release a contract with wider bounds"
            )


def _declared(registered: StreamVersion) -> str:
    """Describe where the bounds are declared: the message, and if known the proto file and the package version."""
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


def _parsed(name: str, record: bytes) -> Tuning | None:
    try:
        written: Any = json.loads(record)
        return Tuning(max_entries=written.get("max_entries", 0), max_age=written.get("max_age_ms", 0) / 1_000)
    except (ValueError, TypeError, AttributeError, InvalidSetting) as error:
        _log.warning('the setting of stream "%s" in orki:retention cannot be read and is ignored: %s', name, error)
        return None
