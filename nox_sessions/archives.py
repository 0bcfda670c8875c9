"""Build some distributions with hatchling, in one process; run by the environment that holds the pinned hatchling.

    python -m nox_sessions.archives OUT AGAIN FOLDER...

The wheel in OUT is built from the sdist beside it, so that one cannot lack what the other has; the wheel in AGAIN from
the tree. The two are to have the same bytes.
"""

from __future__ import annotations

import os
import sys
import tarfile
from contextlib import chdir
from pathlib import Path

from hatchling.build import build_sdist, build_wheel

# Archive members carry one fixed time (2020-01-01): the same sources give the same bytes, wherever they are built.
EPOCH = "1577836800"


def main(out: Path, again: Path, folders: list[Path]) -> None:
    """Build them one after another; hatchling takes the working directory for the distribution."""
    os.environ["SOURCE_DATE_EPOCH"] = EPOCH
    for folder in folders:
        with chdir(folder):
            build_wheel(str(again))
            sdist = build_sdist(str(out))
        with tarfile.open(out / sdist) as archive:
            archive.extractall(again, filter="data")
        with chdir(again / sdist.removesuffix(".tar.gz")):
            wheel = build_wheel(str(out))
        print(f"{folder}: {sdist}, {wheel}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute(), [Path(each) for each in sys.argv[3:]])
