"""The command `orki-codegen gate`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from orki_codegen._buf import Buf
from orki_codegen._gate.accepted import FILE as ACCEPTED
from orki_codegen._gate.accepted import parse_accepted, read_accepted
from orki_codegen._gate.baseline import (
    PUBLISHED_FILE,
    Baselines,
    from_commit,
    from_index,
    from_published,
    read_published,
    resolved,
    text_at,
)
from orki_codegen._gate.contracts import check_configuration, read_tree
from orki_codegen._gate.distributions import Member, find_members
from orki_codegen._gate.evaluate import Policy, evaluate
from orki_codegen._gate.findings import as_github, as_json, as_text
from orki_codegen._gate.index import Index, index_settings
from orki_contract.errors import InvalidSetting, OrkiError

_HELP: Final = """\
Compares every distribution of the workspace with its last release and checks that its version fits the changes:

  contract     orki's rules of change and buf's own
  Python API   of the hand-written packages: removals and changed signatures or annotations are major, additions minor
  metadata     a removed command, extra or Python version is major
  contents     other files under a released version need a patch
  siblings     the ranges in each pyproject.toml must contain the siblings' versions

Before 1.0 a major change raises the second number and every other change the third; from 1.0 on semantic versioning
applies.

--against names the baseline:
  index        the last wheel of each distribution on the index, and older ones whose entries may remain in streams;
               for distributions without a release, the commit that published.toml names (default)
  REF          a branch, tag or commit, for quick feedback during development
  published    the commit that published.toml names

A break that affects nobody can be accepted in accepted-breaks.toml; it then needs a minor version:

  [[break]]
  rule = "ORKI_STREAM_REMOVED"        # as the gate names it
  subject = 'stream "findings"'       # as the gate names it
  package = "acme-review"
  reason = "the stream never had a reader"
  until = 2027-01-31                  # or the version that ends it: "2.0.0"

An entry that has ended or matches no change makes the gate red.
"""

_STATUS: Final = """\
Exit status: 0 every version fits its changes; 1 a version, a range or an accepted break is wrong; 2 something cannot be
read.
"""

_RELEASED: Final = ("index", "published")


def register(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "gate",
        help="check that versions fit the changes",
        description=_HELP,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--against", metavar="index|REF|published", default="index", help="baseline (default: index)")
    parser.add_argument("--index", metavar="URL", help="URL of the index's simple API (default: that of uv or pip)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every finding to this file")
    parser.add_argument("--github", action="store_true", help="print annotations for GitHub workflows")


def run(given: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        if given.json is not None:
            # The findings of an earlier run must not be taken for those of this one.
            given.json.unlink(missing_ok=True)
        return _gate(Path.cwd(), given)
    except OrkiError as error:
        print(f"orki-codegen gate: {error.message}", file=sys.stderr)
        return 2


def _gate(root: Path, given: argparse.Namespace) -> int:
    if not (root / "buf.yaml").is_file():
        raise InvalidSetting(f"{root} has no buf.yaml: run this in the root of the repository")
    members = find_members(root)
    accepted = read_accepted(root)
    buf = Buf(root)
    check_configuration(buf)
    tree = read_tree(root, members, buf)
    quick = given.against not in _RELEASED
    with tempfile.TemporaryDirectory(prefix="orki-gate-") as folder:
        found = _baselines(root, given, members, Path(folder))
        policy = Policy(
            accepted=accepted,
            today=datetime.now(UTC).date(),
            settled=_accepted_before(given.against) if quick else frozenset(),
            lenient=quick,
        )
        evaluation = evaluate(found.baselines, tree, policy, buf)
    lines = as_github(evaluation) if given.github else as_text(evaluation, members, found.compared)
    print("\n".join(lines))
    if quick and tree.stale:
        print("The generated code is stale: run `nox -s generate`", file=sys.stderr)
    if given.json is not None:
        try:
            given.json.write_text(as_json(evaluation.findings), encoding="utf-8")
        except OSError as error:
            raise InvalidSetting(f"{given.json} cannot be written: {error.strerror}") from error
    return 1 if evaluation.red else 0


def _baselines(root: Path, given: argparse.Namespace, members: Mapping[str, Member], folder: Path) -> Baselines:
    if given.against == "index":
        with Index(index_settings(given.index)) as index:
            return from_index(index, members, read_published(root), folder, datetime.now(UTC))
    if given.index is not None:
        raise InvalidSetting("--index can only be used with --against index")
    if given.against == "published":
        baseline = from_published(read_published(root), members, folder)
        if baseline is None:
            raise InvalidSetting(f"there is no {PUBLISHED_FILE}, so there is no published commit")
        return Baselines.of(baseline, members)
    return from_commit(given.against, members, folder)


def _accepted_before(ref: str) -> frozenset[tuple[str, str, str]]:
    """Return the keys of the breaks that were accepted at a ref; they may concern breaks from before the ref."""
    text = text_at(resolved(ref), ACCEPTED)
    return frozenset(each.key for each in parse_accepted(text)) if text is not None else frozenset()
