"""The metadata of the distributions agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECTS = sorted(
    [*ROOT.glob("packages/*/pyproject.toml"), ROOT / "codegen/pyproject.toml", *ROOT.glob("examples/*/pyproject.toml")]
)
NAMES = [path.parent.name for path in PROJECTS]


def table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def minimum(project: dict[str, Any], name: str) -> tuple[int, ...]:
    """Return the lower bound of a dependency."""
    for requirement in project["dependencies"]:
        if match := re.match(rf"{re.escape(name)}(?![\w-])[^>]*>=([\d.]+)", requirement):
            return tuple(map(int, match[1].split(".")))
    raise LookupError(f"{project['name']} declares no lower bound of {name}")


def test_there_are_distributions() -> None:
    assert {"codegen", "orki-agent", "orki-contract", "orki-control", "orki-events", "orki-server"} <= set(NAMES)


@pytest.mark.parametrize("path", PROJECTS, ids=NAMES)
def test_each_distribution_has_license_python_and_readme(path: Path) -> None:
    project = table(path)["project"]
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert (path.parent / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (path.parent / project["readme"]).read_text(encoding="utf-8").startswith(f"# {project['name']}\n")


def test_each_contract_has_one_owner() -> None:
    owners: dict[str, str] = {}
    for path in PROJECTS:
        for contract in table(path).get("tool", {}).get("orki", {}).get("contracts", []):
            assert contract not in owners, f"{contract} is claimed by {owners[contract]} and by {path.parent.name}"
            owners[contract] = path.parent.name
    kept = {
        folder.parent.relative_to(ROOT / "proto").as_posix().replace("/", ".")
        for folder in ROOT.glob("proto/**/*.proto")
    }
    assert set(owners) == kept - {"orki.options.v1"}, "options are the one package that nobody generates"


def test_siblings_admit_the_version_in_the_tree() -> None:
    versions = {table(path)["project"]["name"]: table(path)["project"]["version"] for path in PROJECTS}
    ranges = [
        (path.parent.name, name, version)
        for path in PROJECTS
        for name, version in versions.items()
        for requirement in map(Requirement, table(path)["project"]["dependencies"])
        if requirement.name == name and version not in requirement.specifier
    ]
    assert not ranges


def test_lower_bounds_match_the_generated_code() -> None:
    """protobuf and grpcio refuse a runtime that is older than the generated code."""
    for path in PROJECTS:
        project = table(path)["project"]
        for module in path.parent.glob("gen/**/*_pb2.py"):
            gencode = re.search(
                r"^# Protobuf Python Version: ([\d.]+)", module.read_text(encoding="utf-8"), re.MULTILINE
            )
            assert gencode is not None
            assert minimum(project, "protobuf") == tuple(map(int, gencode[1].split("."))), module
        for module in path.parent.glob("gen/**/*_pb2_grpc.py"):
            stub = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", module.read_text(encoding="utf-8"))
            assert stub is not None
            assert minimum(project, "grpcio") == tuple(map(int, stub[1].split(".")))[:2], module


def test_mypy_lists_every_root() -> None:
    known = {
        place.removeprefix("$MYPY_CONFIG_FILE_DIR/")
        for place in table(ROOT / "pyproject.toml")["tool"]["mypy"]["mypy_path"]
    }
    roots = {
        (path.parent / name).relative_to(ROOT).as_posix()
        for path in PROJECTS
        for name in ("src", "gen")
        if (path.parent / name).is_dir()
    }
    assert known == roots


def test_each_source_folder_is_a_package() -> None:
    """Import-linter ignores folders without `__init__.py`."""
    folders = {module.parent for path in PROJECTS for module in path.parent.glob("src/**/*.py")}
    assert folders
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_constraints_pin_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    odd = [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line)]
    assert lines
    assert not odd
