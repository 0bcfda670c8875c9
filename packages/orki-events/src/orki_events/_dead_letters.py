"""Lists a group's dead letters and replays them to that group alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter
from orki_contract.errors import OrkiError
from orki_contract.model import Group, Stream, milliseconds
from orki_events._commands import HANDED_BACK
from orki_events.connection import Connection
from orki_events.entries import DATA_FIELD, ENVELOPE_FIELD, REASON_FIELD, tagged_key
from orki_events.groups import groups_key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DeadLetterEntry(Generic[T]):
    """One dead letter.

    Attributes:
        letter_id: Id of its entry in the dead letter stream.
        reason: The origin of the event and the reason for the dead letter.
        event: The event; None if it cannot be decoded.
        envelope_bytes: The field `e`; empty if the entry had none.
        event_bytes: The field `d`; empty if the entry had none.
    """

    letter_id: str
    reason: DeadLetter
    event: T | None
    envelope_bytes: bytes = field(repr=False)
    event_bytes: bytes = field(repr=False)


async def list_dead_letters(
    connection: Connection, stream: Stream, group: Group, decode: Callable[[bytes], T], count: int, after: str
) -> list[DeadLetterEntry[T]]:
    """Return at most `count` dead letters of a group, oldest first, after the letter id `after`."""
    found = []
    command = (b"XRANGE", _key(stream, group), f"({after}", b"+", b"COUNT", count)
    for letter_id, fields in await connection.execute(command):
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        reason = _reason(values.get(REASON_FIELD, b""))
        if reason.group != group.name or reason.stream != stream.name:
            # Several groups may share one dead letter stream.
            continue
        raw = values.get(DATA_FIELD)
        event: T | None = None
        if raw is not None:
            try:
                event = decode(raw)
            except DecodeError:
                event = None
        found.append(DeadLetterEntry(letter_id.decode(), reason, event, values.get(ENVELOPE_FIELD, b""), raw or b""))
    return found


async def replay_dead_letters(
    connection: Connection, stream: Stream, group: Group, letters: Iterable[DeadLetterEntry[Any]]
) -> list[str]:
    """Make the group process entries again, and return the ids of the replayed letters.

    The entry becomes pending and claimable at once, with its deliveries reset; then its letter is deleted. A crash
    between the two replays the entry and keeps the letter. If the entry was trimmed, the letter is kept too.
    """
    replayed = []
    for letter in letters:
        key = letter.reason.key
        claimed = await connection.execute(
            (
                *(b"XCLAIM", key, group.name, HANDED_BACK, 0, letter.reason.entry_id),
                *(b"IDLE", milliseconds(group.ack_deadline), b"RETRYCOUNT", 0, b"FORCE", b"JUSTID"),
            )
        )
        if claimed:
            for reply in await connection.pipeline(
                (b"HINCRBY", groups_key(key), f"dead_lettered:{group.name}", -1),
                (b"XDEL", _key(stream, group), letter.letter_id),
            ):
                if isinstance(reply, OrkiError):
                    raise reply
            replayed.append(letter.letter_id)
    return replayed


def _key(stream: Stream, group: Group) -> str:
    return tagged_key("ev", stream.dead_letter(group))


def _reason(raw: bytes) -> DeadLetter:
    try:
        return DeadLetter.FromString(raw)
    except DecodeError:
        return DeadLetter()
