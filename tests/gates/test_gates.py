"""What must not pass is planted into a copy of the workspace, and the very session that guards it turns red."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from planting import assert_green, assert_red, planted, run

pytestmark = pytest.mark.timeout(600)


def test_layers(workspace: Path) -> None:
    """The planted imports are not in use, so ruff would refuse them first: `noqa` leaves them to the layers' gate."""
    agent = workspace / "packages/orki-agent/src/orki_agent/__init__.py"
    server = workspace / "packages/orki-server/src/orki_server/__init__.py"
    assert_green(run(workspace, "-s", "lint"))
    with planted(agent, "import redis  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "orki_agent imports redis")
    with planted(server, "import orki_agent  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "orki_server is not allowed to import orki_agent")
    with planted(agent, "import orki_server  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "orki_agent is not allowed to import orki_server")


def test_a_hand_edit_of_generated_code(workspace: Path) -> None:
    generated = sorted(workspace.glob("packages/*/gen/**/*_orki.py"))
    assert generated
    assert_green(run(workspace, "-s", "generate", "--", "--check"))
    with planted(generated[0], "# by hand"):
        assert_red(run(workspace, "-s", "generate", "--", "--check"), generated[0].name)


def test_a_generated_file_without_a_source(workspace: Path) -> None:
    orphan = sorted(workspace.glob("packages/*/gen/**/*_orki.py"))[0].with_name("orphan_orki.py")
    orphan.write_text("", encoding="utf-8")
    try:
        assert_red(run(workspace, "-s", "generate", "--", "--check"), orphan.name)
    finally:
        orphan.unlink()


def test_editing_a_handler_needs_no_toolchain(workspace: Path) -> None:
    """The packages' tests have an environment of their own, and it holds neither buf nor protoc."""
    assert_green(run(workspace, "-s", "tests", "--", "packages/orki-contract/tests", "--collect-only", "--quiet"))
    (environment,) = workspace.glob(f".nox/run-{sys.version_info.major}.{sys.version_info.minor}")
    installed = [path.name for path in environment.rglob("*") if path.parent.name in {"bin", "site-packages"}]
    assert "pytest" in installed
    assert not {"buf", "grpc_tools", "orki_codegen", "protoc-gen-mypy", "protoc-gen-orki"} & set(installed)


def test_a_type_error(workspace: Path) -> None:
    module = workspace / "packages/orki-contract/src/orki_contract/__init__.py"
    assert_green(run(workspace, "-s", "types"))
    with planted(module, 'PLANTED: int = "a string"'):
        assert_red(run(workspace, "-s", "types"), "Incompatible types in assignment")
