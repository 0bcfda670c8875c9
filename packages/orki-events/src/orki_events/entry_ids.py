"""Arithmetic on entry ids (`MILLISECONDS-SEQUENCE`), and the cursors of plain readers."""

from __future__ import annotations

__all__ = ["ZERO_ID", "EntryId", "format_cursor", "parse_cursor", "parse_id", "predecessor"]

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from orki_contract.errors import InvalidArgument

ZERO_ID: Final = "0-0"
"""Before every entry."""

_LARGEST: Final = 2**64 - 1
_ID: Final = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


class EntryId(NamedTuple):
    """An entry id, ordered as the server orders it."""

    milliseconds: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.sequence}"


def parse_id(value: str | bytes) -> EntryId:
    """The id in its parts.

    Raises:
        InvalidArgument: It is no entry id.
    """
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    match = _ID.fullmatch(text)
    if match is None:
        raise InvalidArgument(f'"{text}" is no entry id (expected MILLISECONDS-SEQUENCE)')
    found = EntryId(int(match[1]), int(match[2]))
    if max(found) > _LARGEST:
        raise InvalidArgument(f'"{text}" is no entry id: its parts have 64 bits')
    return found


def predecessor(value: EntryId) -> EntryId:
    """The largest id below this one; that of 0-0 is itself."""
    if value.sequence > 0:
        return EntryId(value.milliseconds, value.sequence - 1)
    if value.milliseconds > 0:
        return EntryId(value.milliseconds - 1, _LARGEST)
    return value


def format_cursor(positions: Iterable[str]) -> str:
    """A reader's place in a stream as one word: the last id read of each partition, in their order."""
    return "_".join(positions)


def parse_cursor(cursor: str, partitions: int) -> list[str]:
    """The last id read of each partition.

    Raises:
        InvalidArgument: It is no cursor, or one of a stream with another number of partitions.
    """
    positions = cursor.split("_")
    if len(positions) != partitions:
        raise InvalidArgument(f'"{cursor}" is a cursor over {len(positions)} partitions; the stream has {partitions}')
    return [str(parse_id(position)) for position in positions]
