"""Dead letters: what a group could not process, to be listed, looked at, and replayed to that group alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from orki.events.v1.envelope_pb2 import DeadLetter
from orki_contract.errors import OrkiError
from orki_contract.model import Group, Stream
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
        reason: Where it came from, and why it is here.
        event: The event, or None where that cannot be decoded.
        envelope_bytes: The field `e`; empty where the entry had none.
        event_bytes: The field `d`; empty where the entry had none.
    """

    letter_id: str
    reason: DeadLetter
    event: T | None
    envelope_bytes: bytes = field(repr=False)
    event_bytes: bytes = field(repr=False)


def _key(stream: Stream, group: Group) -> str:
    return tagged_key("ev", stream.dead_letter(group))


async def list_dead_letters(
    link: Connection, stream: Stream, group: Group, decode: Callable[[bytes], T], count: int, after: str
) -> list[DeadLetterEntry[T]]:
    """A group's dead letters, oldest first.

    Args:
        link: To the server.
        stream: The stream that they came from.
        group: The group.
        decode: For the field `d`.
        count: Most letters.
        after: Letter id to begin behind.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    found = []
    for letter_id, fields in await link.execute((b"XRANGE", _key(stream, group), f"({after}", b"+", b"COUNT", count)):
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
    link: Connection, stream: Stream, group: Group, letters: Iterable[DeadLetterEntry[Any]]
) -> list[str]:
    """Makes the group take entries once more, from its own stream; other groups see nothing of it.

    The entry becomes pending again and claimable at once, with its deliveries forgotten; then its letter is deleted. A
    crash between the two replays it and leaves the letter.

    Returns:
        Letter ids that were replayed: those whose entry was trimmed meanwhile are not among them, and stay.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    replayed = []
    for letter in letters:
        key = letter.reason.key
        claimed = await link.execute(
            (
                *(b"XCLAIM", key, group.name, HANDED_BACK, 0, letter.reason.entry_id),
                *(b"IDLE", group.ack_deadline_ms, b"RETRYCOUNT", 0, b"FORCE", b"JUSTID"),
            )
        )
        if claimed:
            for reply in await link.pipeline(
                (b"HINCRBY", groups_key(key), f"dead_lettered:{group.name}", -1),
                (b"XDEL", _key(stream, group), letter.letter_id),
            ):
                if isinstance(reply, OrkiError):
                    raise reply
            replayed.append(letter.letter_id)
    return replayed


def _reason(raw: bytes) -> DeadLetter:
    try:
        return DeadLetter.FromString(raw)
    except DecodeError:
        return DeadLetter()
