"""Does the work on a tree of protos grow with the tree, or faster: generating, checking, linting, comparing, the gate?

A generated tree has files of all four kinds in packages of ten, and a distribution for every 125 files. The rows give
the processor time for each file at 1,000 files over that at 250, measured in turns; and what orki's share is beside
protoc's and the stub plugin's, run by buf on the same tree without orki.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

BENCH: Final = "generate_tree"
SMALL: Final = 250
LARGE: Final = 1000
FILES_A_PACKAGE: Final = 10
FILES_AN_OWNER: Final = 125
GROWTH_REACH: Final = 1.25
SHARE_REACH: Final = 4.0
"""Validation, images, pages, orki's own modules, and a run of buf for each distribution come on top of the bare run."""

ROOT: Final = Path(__file__).resolve().parents[1]
VENDORED: Final = ROOT / "codegen/src/orki_codegen/vendored"

FILE: Final = """\
// File {number} of a tree.
syntax = "proto3";

package {package};

import "google/protobuf/duration.proto";
import "orki/options/v1/options.proto";
{imports}
// Work {number}.
service Work{number}Service {{
  // Does it.
  rpc Do{number}(Do{number}Request) returns (Do{number}Response) {{
    option (orki.options.v1.task) = {{
      progress: "Do{number}Progress"
      max_attempts: 4
    }};
  }}
}}

// Tools {number}.
service Tool{number}Service {{
  // Measures.
  rpc Measure{number}(Measure{number}Request) returns (Measure{number}Response) {{
    option (orki.options.v1.tool) = {{
      opcode: {opcode}
      idempotent: true
    }};
  }}
}}

// What to do.
message Do{number}Request {{
  // Which.
  string name = 1;
  // How long.
  google.protobuf.Duration patience = 2;
  // How.
  Mood{number} mood = 3;
  // Words by word.
  map<string, string> labels = 4;
}}

// What was done.
message Do{number}Response {{
  // One of two.
  oneof outcome {{
    // Good.
    string good = 1;
    // Bad.
    uint64 bad = 2;
  }}
{crossing}}}

// How far it is.
message Do{number}Progress {{
  // From 0 to 1.
  double fraction = 1;
}}

// In which mood.
enum Mood{number} {{
  // Nobody said.
  MOOD{number}_UNSPECIFIED = 0;
  // Well.
  MOOD{number}_WELL = 1;
}}

// What to measure, as a frame.
message Measure{number}Request {{
  option (orki.options.v1.frame) = {{
    version: 1
    block_length: 16
  }};
  // Where.
  uint64 place = 1 [(orki.options.v1.offset) = 0];
  // How much.
  uint32 size = 2 [(orki.options.v1.offset) = 8];
  // What.
  bytes content = 3;
}}

// What was measured, as a frame.
message Measure{number}Response {{
  option (orki.options.v1.frame) = {{
    version: 1
    block_length: 8
  }};
  // The measure.
  uint64 value = 1 [(orki.options.v1.offset) = 0];
}}

// It happened.
message Happened{number}Event {{
  option (orki.options.v1.stream) = {{
    name: "happened_{number}"
    retention: {{max_entries: 1000}}
    groups: [
      {{name: "readers"}}
    ]
  }};
  // What.
  string what = 1 [(orki.options.v1.sensitive) = true];
}}
"""


LATER: Final = "  // How long.\n  google.protobuf.Duration patience = 2;\n"
"""What the earlier tree lacks in each file."""


def plant(folder: Path, files: int) -> None:
    """Lays a workspace of so many proto files out; each file imports the one before it in its package."""
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(VENDORED / name, folder)
    options = folder / "proto/orki/options/v1"
    options.mkdir(parents=True)
    shutil.copy(VENDORED / "options.proto", options)
    owned: dict[int, set[str]] = {}
    for number in range(files):
        index, place = divmod(number, FILES_A_PACKAGE)
        package = f"tree.part{index}.v1"
        home = package.replace(".", "/")
        imports, crossing = "", ""
        if place:
            imports = f'import "{home}/file{number - 1}.proto";\n'
            crossing = f"  // What came before.\n  Do{number - 1}Progress before = 3;\n"
        path = folder / "proto" / home / f"file{number}.proto"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = FILE.format(number=number, package=package, opcode=0x0100 + number, imports=imports, crossing=crossing)
        path.write_text(text, encoding="utf-8")
        owned.setdefault(index * FILES_A_PACKAGE // FILES_AN_OWNER, set()).add(package)
    for owner, packages in owned.items():
        carrier = folder / "packages" / f"owner{owner}"
        carrier.mkdir(parents=True)
        contracts = ", ".join(f'"{package}"' for package in sorted(packages))
        text = f'[project]\nname = "owner{owner}"\nversion = "0.1.0"\n\n[tool.orki]\ncontracts = [{contracts}]\n'
        (carrier / "pyproject.toml").write_text(text, encoding="utf-8")


def run(folder: Path, *command: str, status: int = 0) -> None:
    """Runs a program of this environment, to the exit status that it must have."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command[0], path=path) or command[0]
    environment = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([program, *command[1:]], cwd=folder, env=environment, capture_output=True, check=False)
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr).decode()[-2_000:]}")


def generate(folder: Path) -> None:
    """From nothing: what was generated before is thrown away."""
    for made in [*folder.glob("packages/*/gen"), *folder.glob("docs")]:
        shutil.rmtree(made)
    run(folder, sys.executable, "-m", "orki_codegen.generate")


def check(folder: Path) -> None:
    run(folder, sys.executable, "-m", "orki_codegen.generate", "--check")


def lint(folder: Path) -> None:
    run(folder, "buf", "lint")


def bare(folder: Path) -> None:
    """buf with protoc and the stub plugin alone, all files in one run."""
    with tempfile.TemporaryDirectory() as out:
        run(folder, "buf", "generate", "--template", "bare.gen.yaml", "--output", out)


def compare(folder: Path) -> None:
    """The tree against one that lacks a field in each file."""
    run(folder, sys.executable, "-m", "orki_contract.cli", "diff", "before.binpb", "after.binpb", "--json")


def gate(folder: Path) -> None:
    """Likewise, against the commit of that moment: the new fields ask for versions that the tree does not promise."""
    run(folder, sys.executable, "-m", "orki_codegen.cli", "gate", "--against", "HEAD", status=1)


def prepare(folder: Path) -> None:
    """What `bare`, `compare` and `gate` need beside the tree."""
    template = (folder / "buf.gen.yaml").read_text(encoding="utf-8")
    kept, found, _ = template.partition("  # x_orki.py")
    if not found:
        raise RuntimeError("buf.gen.yaml no longer ends with orki's plugin")
    (folder / "bare.gen.yaml").write_text(kept, encoding="utf-8")
    texts = {path: path.read_text(encoding="utf-8") for path in (folder / "proto/tree").rglob("*.proto")}
    for path, text in texts.items():
        path.write_text(text.replace(LATER, "", 1), encoding="utf-8")
    run(folder, "buf", "build", "--as-file-descriptor-set", "--output", "before.binpb")
    git = ("git", "-c", "user.name=A", "-c", "user.email=a@example.invalid", "-c", "commit.gpgsign=false")
    run(folder, *git, "init", "--quiet")
    run(folder, *git, "add", "proto", "packages", "buf.yaml")
    run(folder, *git, "commit", "--quiet", "--message", "before")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    run(folder, "buf", "build", "--as-file-descriptor-set", "--output", "after.binpb")


WORK: Final[dict[str, Callable[[Path], None]]] = {
    "generate": generate,
    "generate --check": check,
    "buf lint with orki-checks": lint,
    "orki-contract diff": compare,
    "orki-codegen gate": gate,
}


def used() -> float:
    """Processor seconds of all programs that have been run: what else the machine does weighs little in them."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@contextlib.contextmanager
def trees() -> Iterator[dict[int, Path]]:
    """The trees of both sizes."""
    with tempfile.TemporaryDirectory(prefix="orki-tree-") as top:
        found = {}
        for files in (SMALL, LARGE):
            found[files] = Path(top) / str(files)
            found[files].mkdir()
            plant(found[files], files)
            prepare(found[files])
        yield found


def measure(rounds: int) -> dict[tuple[str, int], list[float]]:
    """Processor seconds of each work, and of the baseline, on each tree; in turns."""
    taken: dict[tuple[str, int], list[float]] = {}
    with trees() as planted:
        for number in range(rounds):
            sizes = (SMALL, LARGE) if number % 2 else (LARGE, SMALL)
            for name, work in {**WORK, "bare": bare}.items():
                for files in sizes:
                    begun = used()
                    work(planted[files])
                    taken.setdefault((name, files), []).append(used() - begun)
    return taken


def rows(taken: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    """The figures in the form that all benchmarks share."""
    middle = {key: statistics.median(values) for key, values in taken.items()}
    found = []
    for name in WORK:
        small, large = middle[name, SMALL] / SMALL * 1000, middle[name, LARGE] / LARGE * 1000
        ratio = large / small
        found.append(
            {
                "bench": BENCH,
                "row": f"{name}: time a file in a tree of {LARGE}",
                "unit": "CPU ms",
                "median": round(large, 3),
                "p99": round(max(taken[name, LARGE]) / LARGE * 1000, 3),
                "baseline": f"a file in a tree of {SMALL}",
                "baseline_median": round(small, 3),
                "ratio": round(ratio, 3),
                "reach": {"op": "<=", "value": GROWTH_REACH},
                "met": ratio <= GROWTH_REACH,
            }
        )
    whole, alone = middle["generate", LARGE], middle["bare", LARGE]
    found.append(
        {
            "bench": BENCH,
            "row": f"generate: {LARGE} files",
            "unit": "CPU s",
            "median": round(whole, 3),
            "p99": round(max(taken["generate", LARGE]), 3),
            "baseline": "buf generate without orki",
            "baseline_median": round(alone, 3),
            "ratio": round(whole / alone, 3),
            "reach": {"op": "<=", "value": SHARE_REACH},
            "met": whole / alone <= SHARE_REACH,
        }
    )
    return found


def main() -> None:
    """`--quick`, `--json FILE`."""
    parser = argparse.ArgumentParser(description=BENCH)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    found = rows(measure(1 if arguments.quick else 3))
    for row in found:
        met = "met" if row["met"] else "NOT met"
        print(
            f"{row['row']}: {row['median']:g} {row['unit']} beside {row['baseline_median']:g} "
            f"({row['baseline']}), ratio {row['ratio']:.2f}: {met}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
