"""The command `orki-contract diff`."""

from __future__ import annotations

__all__ = ["register", "run"]

import argparse
import sys
from typing import Any

from orki_contract.difference.show import as_github, as_json, as_table
from orki_contract.difference.versions import Version, version_at
from orki_contract.errors import OrkiError
from orki_contract.findings import Bump, Finding, findings
from orki_contract.printing import say

_DIFF = """\
Tells what changed between two contracts: in which plane, who is concerned, and which bump it asks for.

OLD and NEW are each one of:
  contract.binpb       an image: a serialized FileDescriptorSet with its imports (`buf build -o` writes one)
  acme-1.0-….whl       a wheel; every contract.binpb in it is read
  packages/acme        a folder; buf compiles it where it has a buf.yaml, else every contract.binpb in it is read
  main, v1.2.0, HEAD~3 a git ref of the repository around the working directory, read as a folder
  orki-events          an installed distribution
  orki.events.v1       an installed proto package

A wheel, or a folder of images, speaks for the packages that it owns, and only they are compared.
"""

_STATUS = """\
Exit status: 0, nothing breaks; 1, something asks for a major bump; 2, OLD or NEW cannot be read.
"""


def register(commands: Any) -> None:
    """Adds the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "diff",
        help="tell what changed between two contracts",
        description=_DIFF,
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD", help="the version that users have")
    parser.add_argument("new", metavar="NEW", help="the version to judge")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="as JSON: an object with bump, packages and findings")
    shape.add_argument("--github", action="store_true", help="as annotations of GitHub's workflows")


def run(given: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    try:
        old, new = version_at(given.old), version_at(given.new)
    except OrkiError as error:
        print(f"orki-contract: {error.message}", file=sys.stderr)
        return 2
    found = _of_packages(findings(old.read, new.read), old, new)
    show = as_json if given.json else as_github if given.github else as_table
    say(show(found, old, new))
    return 1 if any(finding.bump is Bump.MAJOR for finding in found) else 0


def _of_packages(found: tuple[Finding, ...], old: Version, new: Version) -> list[Finding]:
    """The findings of the packages that a side speaks for, where it speaks for some only."""
    sides = [side.packages for side in (old, new) if side.packages is not None]
    if not sides:
        return list(found)
    wanted = frozenset[str]().union(*sides)
    return [finding for finding in found if finding.package in wanted]
