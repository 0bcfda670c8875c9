"""Protos that nobody here wrote, out of packages that anybody can install: the generator and the rules survive them.

They are nobody's contract, so no rule of orki's may find anything; and what is generated of them can be imported. The
session `foreign` installs the packages, and says where they are in ORKI_FOREIGN.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from orki_contract.findings import Bump, findings
from orki_contract.read import ReadContract, read_image

ROOT = Path(__file__).resolve().parents[2]
VENDORED = ROOT / "codegen/src/orki_codegen/vendored"
SDK = "temporalio/bridge/sdk-core/crates/protos/protos"

# What to take: below the folder of installed packages, and below which root its files are imported.
TREES: Mapping[str, Mapping[str, str]] = {
    "ansys-api-edb": {"ansys": "ansys"},
    "googleapis": {f"google/{name}": f"google/{name}" for name in ("api", "cloud", "gapic", "logging", "longrunning")}
    | {f"google/{name}": f"google/{name}" for name in ("rpc", "type")},
    "onnx": {"onnx/onnx.proto": "onnx/onnx.proto", "onnx/onnx-operators.proto": "onnx/onnx-operators.proto"},
    "onnx-ml": {f"onnx/onnx-{name}.proto": f"onnx/onnx-{name}.proto" for name in ("data", "ml", "operators-ml")},
    "pyatv": {"pyatv": "pyatv"},
    "temporal": {
        f"{SDK}/api_upstream": "",
        f"{SDK}/api_cloud_upstream": "",
        f"{SDK}/local": "",
        f"{SDK}/testsrv_upstream": "",
        f"{SDK}/grpc": "grpc",
        f"{SDK}/protoc-gen-openapiv2": "protoc-gen-openapiv2",
    },
}
LEAST_FILES = 300

IMPORT = """
import importlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
names = [".".join(path.relative_to(root).with_suffix("").parts) for path in sorted(root.rglob("*.py"))]
for name in names:
    importlib.import_module(name)
print(len(names))
"""

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """A workspace that holds a foreign tree, and a distribution that carries all of it."""

    folder: Path
    files: int


def installed(which: str) -> Path:
    """Where the session put the packages."""
    place = os.environ.get("ORKI_FOREIGN")
    assert place, "these tests need packages that the session brings: ./noxw -s foreign"
    return Path(place) / which


def workspace(folder: Path, packages: Path, parts: Mapping[str, str]) -> Tree:
    """Lays a tree out as a user would, buf's own rules of style left out: those are not ours to keep."""
    for source, place in parts.items():
        path = packages / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.proto")):
            target = folder / "proto" / place / (file.relative_to(path) if file != path else "")
            # Copies of protobuf's own files would be files of the tree; everybody has these.
            if not target.is_relative_to(folder / "proto/google/protobuf"):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    files = sorted((folder / "proto").rglob("*.proto"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    declared = [re.search(r"^\s*package\s+([\w.]+)\s*;", text, re.MULTILINE) for text in texts]
    names = sorted({found[1] if found else "" for found in declared})
    settings = (VENDORED / "buf.yaml").read_text(encoding="utf-8")
    assert "    - STANDARD\n" in settings
    (folder / "buf.yaml").write_text(settings.replace("    - STANDARD\n", ""), encoding="utf-8")
    shutil.copy(VENDORED / "buf.gen.yaml", folder)
    (folder / "carrier").mkdir()
    contracts = ", ".join(f'"{name}"' for name in names)
    carrier = f'[project]\nname = "carrier"\n\n[tool.orki]\ncontracts = [{contracts}]\n'
    (folder / "carrier/pyproject.toml").write_text(carrier, encoding="utf-8")
    return Tree(folder=folder, files=len(files))


def run(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def read(tree: Tree) -> ReadContract:
    """The tree's contract, with places."""
    done = run(tree.folder, "buf", "build", "--as-file-descriptor-set", "--output", "image.binpb")
    assert done.returncode == 0, done.stderr
    return read_image((tree.folder / "image.binpb").read_bytes())


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line past pytest's capture: what was counted is worth reading."""

    def tell(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}", end=" ")

    return tell


@pytest.mark.parametrize("name", TREES)
def test_a_tree_builds_passes_generates_and_imports(name: str, tmp_path: Path, say: Callable[[str], None]) -> None:
    tree = workspace(tmp_path, installed("newest"), TREES[name])
    began = time.monotonic()
    done = run(tree.folder, sys.executable, "-W", "error", "-m", "orki_codegen.generate")
    generated = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(tree.folder, sys.executable, "-W", "error", "-m", "orki_codegen.generate", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(tree.folder, "buf", "lint")
    assert done.returncode == 0, done.stdout + done.stderr

    root = tree.folder / "carrier/gen"
    done = run(tree.folder, sys.executable, "-W", "error", "-c", IMPORT, str(root), PYTHONPATH=str(root))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= tree.files
    contract = read(tree)
    assert findings(read(tree), contract) == ()
    messages, enums = len(contract.schema.messages), len(contract.schema.enums)
    say(f"{name}: {tree.files} files, {messages} messages, {enums} enums, generated in {generated:.1f} s")


def test_years_between_two_versions_are_told(tmp_path: Path, say: Callable[[str], None]) -> None:
    """What a foreign tree became: each finding has a place and words, and what went was something that was there."""
    old = workspace(tmp_path / "old", installed("earlier"), TREES["googleapis"])
    new = workspace(tmp_path / "new", installed("newest"), TREES["googleapis"])
    before, after = read(old), read(new)
    found = findings(before, after)
    assert any(each.rule == "ORKI_FIELD_ADDED" for each in found)
    assert all(each.message and each.location.file for each in found)
    known = {file.path for file in (*before.files, *after.files)}
    assert {each.location.file for each in found} <= known
    breaking = sum(each.bump is Bump.MAJOR for each in found)
    say(f"googleapis, {old.files} to {new.files} files: {len(found)} findings, {breaking} of them break")


def test_that_is_hundreds_of_files() -> None:
    paths = {
        path
        for parts in TREES.values()
        for source in parts
        for path in [installed("newest") / source, *(installed("newest") / source).rglob("*")]
        if path.suffix == ".proto"
    }
    assert len(paths) >= LEAST_FILES
