"""A workspace made of the kitchen-sink protos, generated once for all tests of a process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orki_codegen._tree import compare, install
from orki_codegen._workspace import find_workspace
from orki_codegen.generate import Generated, generate

ROOT = Path(__file__).resolve().parents[2]
KITCHEN = Path(__file__).with_name("kitchen")


def lay_out(root: Path) -> None:
    """Makes a workspace of its own: buf's configuration, the options, the kitchen's protos, and their owner."""
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, root)
    options = Path("orki/options/v1/options.proto")
    (root / "proto" / options.parent).mkdir(parents=True)
    shutil.copy(ROOT / "proto" / options, root / "proto" / options)
    shutil.copytree(KITCHEN, root / "proto/kitchen", ignore=shutil.ignore_patterns("*.json", "*.py"))
    owner = root / "packages/acme-kitchen"
    owner.mkdir(parents=True)
    (owner / "pyproject.toml").write_text(
        '[project]\nname = "acme-kitchen"\n\n[tool.orki]\ncontracts = ["kitchen.other.v1", "kitchen.v1"]\n',
        encoding="utf-8",
    )


def produce(root: Path) -> Generated:
    """Generates a workspace and writes what comes out."""
    generated = generate(find_workspace(root), lambda line: None)
    for tree in generated.trees:
        install(root, tree, compare(root, tree))
    return generated


@pytest.fixture(scope="session")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated kitchen workspace; tests only read it."""
    root = tmp_path_factory.mktemp("kitchen")
    lay_out(root)
    produce(root)
    return root


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A kitchen workspace without generated code, for tests that change it."""
    lay_out(tmp_path)
    return tmp_path
