"""Does the CPU time of generating, checking, linting, comparing and gating grow linearly with the tree of protos?

A generated tree has files of all four kinds in packages of ten, and a distribution for every 125 files. Each row gives
the CPU time of a file in a large tree over that in a tree of a quarter of its size, measured in turns. The last row
gives the CPU time of `generate` over that of buf with protoc and the stub plugin alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks.report import Report

FILES_A_PACKAGE: Final = 10
FILES_AN_OWNER: Final = 125
GROWTH_REACH: Final = 1.25
SHARE_REACH: Final = 4.0
"""The bare run lacks validation, images, pages, orki's own modules, and a run of buf for each distribution."""

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
"""The part of each file that the earlier tree lacks."""


def plant(folder: Path, files: int) -> None:
    """Write a workspace of proto files; each file imports the one before it in its package."""
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
    """Run a program of this environment and check its exit status."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command[0], path=path) or command[0]
    environment = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([program, *command[1:]], cwd=folder, env=environment, capture_output=True, check=False)
    if done.returncode != status:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr).decode()[-2_000:]}")


def generate(folder: Path) -> None:
    """Generate everything anew."""
    for made in [*folder.glob("packages/*/gen"), *folder.glob("docs")]:
        shutil.rmtree(made)
    run(folder, sys.executable, "-m", "orki_codegen.generate")


def check(folder: Path) -> None:
    run(folder, sys.executable, "-m", "orki_codegen.generate", "--check")


def lint(folder: Path) -> None:
    run(folder, "buf", "lint")


def bare(folder: Path) -> None:
    """Run buf with protoc and the stub plugin alone, all files in one run."""
    with tempfile.TemporaryDirectory() as out:
        run(folder, "buf", "generate", "--template", "bare.gen.yaml", "--output", out)


def compare(folder: Path) -> None:
    """Compare the tree with one that lacks a field in each file."""
    run(folder, sys.executable, "-m", "orki_contract", "diff", "before.binpb", "after.binpb", "--json")


def gate(folder: Path) -> None:
    """Run the gate against the commit without those fields; the versions do not promise them, so it exits with 1."""
    run(folder, sys.executable, "-m", "orki_codegen.cli", "gate", "--against", "HEAD", status=1)


def prepare(folder: Path) -> None:
    """Write what `bare`, `compare` and `gate` need beside the tree."""
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
    """Return the CPU seconds of all programs run so far; other load on the machine hardly changes them."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@contextlib.contextmanager
def trees(small: int, large: int) -> Iterator[dict[int, Path]]:
    """Write the trees of both sizes."""
    with tempfile.TemporaryDirectory(prefix="orki-tree-") as top:
        found = {}
        for files in (small, large):
            found[files] = Path(top) / str(files)
            found[files].mkdir()
            plant(found[files], files)
            prepare(found[files])
        yield found


def _taken(rounds: int, small: int, large: int) -> dict[tuple[str, int], list[float]]:
    """Return the CPU seconds of each work, and of the baseline, on each tree; in turns."""
    taken: dict[tuple[str, int], list[float]] = {}
    with trees(small, large) as planted:
        for number in range(rounds):
            sizes = (small, large) if number % 2 else (large, small)
            for name, work in {**WORK, "bare": bare}.items():
                for files in sizes:
                    begun = used()
                    work(planted[files])
                    taken.setdefault((name, files), []).append(used() - begun)
    return taken


async def measure(report: Report) -> None:
    """Measure all rows."""
    small, large = (60, 240) if report.quick else (250, 1_000)
    taken = await asyncio.to_thread(_taken, 1 if report.quick else 3, small, large)
    for name in WORK:
        each = {files: [1000 * seconds / files for seconds in taken[name, files]] for files in (small, large)}
        report.add(
            f"{name}: a file in a tree of {large}",
            "CPU ms",
            each[large],
            baseline=f"a file in a tree of {small}",
            against=each[small],
            reach=("<=", GROWTH_REACH),
        )
    report.add(
        f"generate: {large} files",
        "CPU s",
        taken["generate", large],
        baseline="buf generate without orki",
        against=taken["bare", large],
        reach=("<=", SHARE_REACH),
    )
