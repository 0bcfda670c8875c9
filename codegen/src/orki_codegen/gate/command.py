"""The command `orki-codegen gate`."""

from __future__ import annotations

__all__ = ["register", "run"]

import argparse
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from orki_codegen.buf import Buf
from orki_codegen.gate.accepted import FILE as ACCEPTED
from orki_codegen.gate.accepted import parse_accepted, read_accepted
from orki_codegen.gate.commits import resolved, text_at
from orki_codegen.gate.configured import check_configuration
from orki_codegen.gate.contracts import present
from orki_codegen.gate.gather import Gathered, from_commit, from_index, stand_in
from orki_codegen.gate.index_settings import index_settings
from orki_codegen.gate.indexes import Index
from orki_codegen.gate.judge import Terms, judge
from orki_codegen.gate.members import Member, find_members
from orki_codegen.gate.published import FILE as PUBLISHED
from orki_codegen.gate.published import read_stand_in
from orki_codegen.gate.remarks import as_json
from orki_codegen.gate.report import as_github, as_text
from orki_contract.errors import InvalidSetting, OrkiError

_HELP: Final = """\
Holds every distribution of the workspace against what users have, and asks whether its version promises what changed:

  its contract     by orki's rules of change and by buf's own, image against image
  its Python API   of the hand-written packages: gone, called or annotated otherwise is major, new is minor
  its metadata     a command, an extra or a Python that is admitted no more is major
  everything else  a patch, where other files would come under a version that users have
  its siblings     whether the ranges in each pyproject.toml admit what the siblings promise

Before 1.0 a major change raises the second number, and everything else the third; from 1.0 on it is as everywhere.

--against says what users have:
  index        the last wheel of each distribution on the index, and older ones whose entries may still lie in streams;
               where nothing is published yet, the commit of published.toml stands in (the default)
  REF          a branch, tag or commit: quick feedback while you work
  published    the commit of published.toml

A break that hurts nobody goes into accepted-breaks.toml, and then asks for a minor version:

  [[break]]
  rule = "ORKI_STREAM_REMOVED"        # as the gate names it
  subject = 'stream "findings"'       # likewise
  package = "acme-review"
  reason = "the stream never had a reader"
  until = 2027-01-31                  # or the version with which it ends: "2.0.0"

An entry that came to its end, or that nothing needs, makes the gate red.
"""

_STATUS: Final = """\
Exit status: 0, every version promises what changed; 1, one does not, or a range or an accepted break is wrong;
2, something cannot be read.
"""

_RELEASED: Final = ("index", "published")


def register(commands: Any) -> None:
    """Adds the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "gate",
        help="refuse versions that promise too little",
        description=_HELP,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", metavar="index|REF|published", default="index", help="what users have (index)")
    parser.add_argument(
        "--index", metavar="URL", help="the index's simple API, instead of the one that uv or pip is told to use"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every remark into a file")
    parser.add_argument("--github", action="store_true", help="print annotations of GitHub's workflows")


def run(given: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    try:
        if given.json is not None:
            # What an earlier run wrote must not pass for what this one finds.
            given.json.unlink(missing_ok=True)
        return _gate(Path.cwd(), given)
    except OrkiError as error:
        print(f"orki-codegen gate: {error.message}", file=sys.stderr)
        return 2


def _gate(root: Path, given: argparse.Namespace) -> int:
    if not (root / "buf.yaml").is_file():
        raise InvalidSetting(f"{root} holds no buf.yaml: start from the root of the repository")
    members = find_members(root)
    accepted = read_accepted(root)
    buf = Buf(root)
    check_configuration(root, buf)
    now = present(root, members, buf)
    quick = given.against not in _RELEASED
    with tempfile.TemporaryDirectory(prefix="orki-gate-") as folder:
        gathered = _gathered(root, given, members, Path(folder))
        terms = Terms(
            accepted=accepted,
            today=datetime.now(UTC).date(),
            settled=_accepted_before(given.against) if quick else frozenset(),
            lenient=quick,
        )
        verdict = judge(gathered.pasts, now, terms, buf)
    shown = as_github(verdict) if given.github else as_text(verdict, now, gathered.states)
    print("\n".join(shown))
    if quick and now.drifted:
        print("The wheels would ship what was generated before: run `nox -s generate`", file=sys.stderr)
    if given.json is not None:
        try:
            given.json.write_text(as_json(verdict.remarks), encoding="utf-8")
        except OSError as error:
            raise InvalidSetting(f"{given.json} cannot be written: {error.strerror}") from error
    return 1 if verdict.red else 0


def _gathered(root: Path, given: argparse.Namespace, members: Mapping[str, Member], folder: Path) -> Gathered:
    """What the tree is held against."""
    if given.against == "index":
        with Index(index_settings(given.index)) as index:
            return from_index(index, members, read_stand_in(root), folder, datetime.now(UTC))
    if given.index is not None:
        raise InvalidSetting("--index goes with --against index alone")
    if given.against == "published":
        standing = stand_in(read_stand_in(root), members, folder)
        if standing is None:
            raise InvalidSetting(f"there is no {PUBLISHED}, so no commit stands for published")
        return Gathered.of(standing, members)
    return from_commit(given.against, members, folder)


def _accepted_before(ref: str) -> frozenset[tuple[str, str, str]]:
    """What was accepted at a ref already: it may speak of a break before it."""
    text = text_at(resolved(ref), ACCEPTED)
    return frozenset(each.key for each in parse_accepted(text)) if text is not None else frozenset()
