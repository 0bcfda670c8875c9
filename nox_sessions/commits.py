"""Check commit messages: `area: imperative subject`, an empty line, and a body that says why.

    python -m nox_sessions.commits            every commit since START
    python -m nox_sessions.commits FILE       the message in a file, for a commit-msg hook

CONTRIBUTING.md lists the areas. Exit status: 0 all messages are right; 1 at least one is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Earlier messages follow no convention.
START = "4a45125"
LONGEST = 72
_SCISSORS = "# ------------------------ >8 ------------------------"
# Messages that git writes itself, or replaces in a rebase.
_UNCHECKED = ("Merge ", "fixup! ", "squash! ", "amend! ")
_AREAS = re.compile(r"(?im)^.*\bareas\b[^:\n]*:\s*((?:`[\w-]+`(?:,|\s|and|\.)*)+)")
_SUBJECT = re.compile(r"(?P<area>[\w-]+): (?P<subject>\S.*)")
# The endings of past tense and gerund; a few imperatives end alike.
_NOT_IMPERATIVE = re.compile(r"(?i)\w+(?:ed|ing)")
_IMPERATIVE = frozenset(
    ["bring", "embed", "exceed", "feed", "need", "ping", "proceed", "seed", "shed", "speed", "spread", "succeed"]
)


def areas(contributing: str) -> frozenset[str]:
    """Return the areas that CONTRIBUTING.md lists: the names in backticks after `areas …:`.

    Raises:
        LookupError: The text has no such list.
    """
    if (found := _AREAS.search(contributing)) is None:
        raise LookupError("CONTRIBUTING.md has no line with the areas of commit messages (areas: `contract`, …)")
    return frozenset(re.findall(r"`([\w-]+)`", found[1]))


def faults(message: str, known: frozenset[str]) -> Iterator[str]:
    """Yield the faults of a message; lines that start with `#` are ignored, as git does."""
    lines = [line.rstrip() for line in message.splitlines() if not line.startswith("#")]
    first = lines[0] if lines else ""
    if len(first) > LONGEST:
        yield f"the subject has {len(first)} characters, at most {LONGEST} are allowed"
    if first.endswith("."):
        yield "the subject ends with a full stop"
    match = _SUBJECT.fullmatch(first)
    if match is None:
        yield "the subject is not of the form `area: imperative`"
    else:
        if match["area"] not in known:
            yield f'unknown area "{match["area"]}"; the areas are {", ".join(sorted(known))}'
        word = match["subject"].partition(" ")[0]
        if _NOT_IMPERATIVE.fullmatch(word) and word.lower() not in _IMPERATIVE:
            yield f'"{word}" is not imperative: write "add", not "added" or "adding"'
    if len(lines) > 1 and lines[1]:
        yield "the second line is not empty"
    if not any(lines[2:]):
        yield "the body is missing: say why in one to three sentences"


def since(start: str) -> list[tuple[str, str]] | None:
    """Return the id and message of each commit after `start`, merges excluded; None if git does not know `start`."""
    if _git("merge-base", "--is-ancestor", start, "HEAD") is None:
        return None
    listed = _git("log", "--no-merges", "--format=%h%x00%B%x01", f"{start}..HEAD") or ""
    pairs = (each.strip("\n").partition("\0") for each in listed.split("\1") if each.strip())
    return [(commit, message) for commit, _, message in pairs]


def main(arguments: Sequence[str]) -> int:
    """Check a file or the history, print the faults and return the exit status."""
    known = areas(Path("CONTRIBUTING.md").read_text(encoding="utf-8"))
    if arguments:
        try:
            # `git commit --verbose` appends the change below a line of scissors.
            text = Path(arguments[0]).read_text(encoding="utf-8").partition(_SCISSORS)[0]
        except (OSError, UnicodeDecodeError) as error:
            print(f"{arguments[0]}: the message cannot be read: {error}", file=sys.stderr)
            return 1
        messages: list[tuple[str, str]] | None = [] if text.startswith(_UNCHECKED) else [("message", text)]
    else:
        messages = since(START)
    if messages is None:
        print(f"commit {START} is not in this clone (shallow, or a copy): no message was checked")
        return 0
    wrong = [(name, fault) for name, message in messages for fault in faults(message, known)]
    for name, fault in wrong:
        print(f"{name}: {fault}", file=sys.stderr)
    if not wrong:
        print(f"{len(messages)} commit messages are right")
    return 1 if wrong else 0


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
