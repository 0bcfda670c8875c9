"""Which wheels or which commit is published; run by the environment that holds orki-codegen, whose gate asks the same.

    python -m nox_sessions.skew_release OUT NAME... [--index URL]

Without an index the commit of published.toml is meant: while that file is there, nothing is on an index. Where it is
gone, uv's or pip's own index is. What an index lacks is of that commit, too. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from orki_codegen.gate.index_settings import index_settings
from orki_codegen.gate.indexes import Index, Published
from orki_codegen.gate.published import FILE, read_stand_in
from orki_contract.errors import InvalidSetting, OrkiError


def last(wheels: list[Published]) -> Published:
    """The newest release; one that is none yet only where there is no other."""
    return ([each for each in wheels if not each.version.is_prerelease] or wheels)[-1]


def main() -> int:
    """Downloads and tells; 1 with a sentence where there is nothing to tell of."""
    parser = argparse.ArgumentParser(prog="skew_release", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--index")
    given = parser.parse_args()
    try:
        standing = read_stand_in(Path.cwd())
        found: dict[str, str] = {}
        label = ""
        if given.index or standing is None:
            with Index(index_settings(given.index)) as index:
                label = index.label
                index.check()
                listed = {name: wheels for name in given.names if (wheels := index.wheels(name))}
                given.out.mkdir(parents=True, exist_ok=True)
                found = {name: str(index.fetch(last(wheels), given.out)) for name, wheels in listed.items()}
        missing = [name for name in given.names if name not in found]
        if missing and standing is None:
            raise InvalidSetting(
                f"{label} has no wheel of {', '.join(missing)}, and no {FILE} names a commit that stands in; "
                "name a commit or another index with --published"
            )
    except OrkiError as error:
        print(error.message, file=sys.stderr)
        return 1
    commit = standing.commit if missing and standing else ""
    print(json.dumps({"wheels": found, "missing": missing, "commit": commit, "index": label}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
