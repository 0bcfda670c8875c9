"""Where a feed's client stands in all streams at once, as one word: the id of a server-sent event.

The word is `STREAM=CURSOR` for each stream, joined by `;`, in the order of the names. It names the last entry that was
sent of *every* stream, so that whoever comes back with it misses nothing and gets nothing twice, even when the feed was
killed in between: the feed keeps no state. A stream that the word does not name is read from its beginning: it was
registered after the word was made. Where there was none yet the word is `nowhere`: an empty id would not be sent back,
and whoever comes without one begins with the newest events.
"""

from __future__ import annotations

__all__ = ["LONGEST_CURSOR", "format_feed_cursor", "parse_feed_cursor"]

import re
from collections.abc import Mapping
from typing import Final

from orki_contract.errors import InvalidArgument, TooLarge

LONGEST_CURSOR: Final = 7_000
"""Bytes; browsers send it back in a header, and servers bound those at 8 KiB."""

_NOWHERE: Final = "nowhere"
_PART: Final = re.compile(r"([a-z][a-z0-9_.-]{0,63})=([0-9]+-[0-9]+(?:_[0-9]+-[0-9]+)*)")


def format_feed_cursor(cursors: Mapping[str, str]) -> str:
    """The word for these streams' cursors.

    Raises:
        TooLarge: There are more streams and partitions than fit into a header.
    """
    word = ";".join(f"{stream}={cursors[stream]}" for stream in sorted(cursors)) or _NOWHERE
    if len(word) > LONGEST_CURSOR:
        raise TooLarge(
            f"the places in {len(cursors)} streams take {len(word)} bytes, more than the {LONGEST_CURSOR} that a "
            "browser sends back: follow fewer streams, with ?stream=NAME"
        )
    return word


def parse_feed_cursor(word: str) -> dict[str, str]:
    """The cursors that a word names; an empty word names none.

    Raises:
        InvalidArgument: It was not made by `format_feed_cursor`.
    """
    cursors: dict[str, str] = {}
    for part in word.split(";") if word not in ("", _NOWHERE) else ():
        match = _PART.fullmatch(part)
        if match is None or match[1] in cursors or len(word) > LONGEST_CURSOR:
            raise InvalidArgument("Last-Event-ID is no id of this feed: leave it out to begin with the newest events")
        cursors[match[1]] = match[2]
    return cursors
