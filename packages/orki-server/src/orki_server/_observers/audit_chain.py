"""The hash chain of the audit log.

Each line ends with `,"number":N,"chain":"HEX"}`. `N` counts the lines from 1, over all files of the log. `HEX` is the
SHA-256 of the previous line's `HEX` (64 zeros for the first line), a newline, and this line without its member `chain`.
So a line that was changed, dropped, added or moved breaks the chain. Whoever can rewrite all later lines can build
another chain, and lines dropped from the end leave none: to find that too, keep the last number and hash elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

_TAIL: Final = re.compile(rb',"number":([1-9][0-9]{0,18}),"chain":"([0-9a-f]{64})"\}\Z')


@dataclass(frozen=True, slots=True)
class Link:
    """A position in the chain.

    Attributes:
        number: Number of the line; 0 before the first.
        digest: Its hash.
    """

    number: int = 0
    digest: str = "0" * 64

    def after(self, body: bytes) -> Link:
        """Return the position after a line, given without its chain."""
        return Link(self.number + 1, hashlib.sha256(b"%s\n%s" % (self.digest.encode(), body)).hexdigest())


START: Final = Link()


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that breaks the chain.

    Attributes:
        place: Position of the line in its file, from 1.
        text: What is wrong with it.
    """

    place: int
    text: str


def seal(previous: Link, line: str) -> tuple[Link, str]:
    """Return the position of a line, a JSON object, and the line with its number and its chain."""
    body = f'{line[:-1]},"number":{previous.number + 1}}}'
    link = previous.after(body.encode())
    return link, f'{body[:-1]},"chain":"{link.digest}"}}'


def link_of(line: bytes) -> Link | None:
    """Return the position that a line states; None for a line without a chain."""
    found = _TAIL.search(line)
    return Link(int(found[1]), found[2].decode()) if found else None


class Verifier:
    """Verifies the lines of a log, file after file.

    Attributes:
        last: The position that the last line states.
        lines: Number of lines so far.
    """

    def __init__(self, first: int = 1) -> None:
        """Create a verifier of a log whose first line has the number `first`; earlier files are not checked."""
        self.last = START
        self.lines = 0
        self._first = first

    def check(self, lines: Iterable[bytes]) -> Iterator[tuple[bytes, Problem | None]]:
        """Yield each line of the next file with its problem, if it has one."""
        for place, line in enumerate(lines, 1):
            text = self._problem(line.removesuffix(b"\n"))
            if not line.endswith(b"\n"):
                text = text or "is incomplete"
            yield line.removesuffix(b"\n"), Problem(place, text) if text else None

    def _problem(self, line: bytes) -> str:
        self.lines += 1
        link = link_of(line)
        if link is None:
            return "has no number and no chain, so it was added or changed"
        before, self.last = self.last, link
        expected = before.number + 1 if self.lines > 1 else self._first
        if link.number > expected:
            missing = f"{expected:,} to {link.number - 1:,}" if link.number - expected > 1 else f"{expected:,}"
            return f"has number {link.number:,}, but lines of number {missing} are missing"
        if link.number < expected:
            return f"has number {link.number:,} where {expected:,} is expected: it was moved, repeated or added"
        body = line[: -len(f',"chain":"{link.digest}"}}')] + b"}"
        if self.lines == 1 and self._first > 1:
            return ""  # its predecessor is in a file that is not checked
        if before.after(body).digest != link.digest:
            return "was changed, or the line before it was"
        return ""
