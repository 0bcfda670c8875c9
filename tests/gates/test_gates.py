"""Each planted fault in a copy of the workspace makes the session that checks for it fail."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from planting import assert_green, assert_red, planted, run

pytestmark = pytest.mark.timeout(600)


def test_lint_detects_forbidden_imports(workspace: Path) -> None:
    """ruff would report the unused imports first, so they have a `noqa`."""
    agent = workspace / "packages/orki-agent/src/orki_agent/__init__.py"
    server = workspace / "packages/orki-server/src/orki_server/__init__.py"
    assert_green(run(workspace, "-s", "lint"))
    with planted(agent, "import redis  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "orki_agent imports redis")
    with planted(server, "import orki_agent  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "orki_server is not allowed to import orki_agent")
    with planted(agent, "import orki_server  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "orki_agent is not allowed to import orki_server")


def test_lint_detects_circles_internal_imports_and_unlisted_machines(workspace: Path) -> None:
    sources = workspace / "packages/orki-contract/src/orki_contract"
    within = "def _planted() -> None:\n    import orki_contract.model  # noqa"
    checking = "from typing import TYPE_CHECKING  # noqa\nif TYPE_CHECKING:\n    import orki_contract.model  # noqa"
    for line in (within, checking):
        with (
            planted(sources / "naming.py", line),
            planted(sources / "model.py", "import orki_contract.naming  # noqa"),
        ):
            assert_red(run(workspace, "-s", "lint"), "circular import", "orki_contract.naming")
    agent = workspace / "packages/orki-agent/src/orki_agent/__init__.py"
    internal = next((workspace / "packages/orki-events/src/orki_events").glob("_[a-z]*.py")).stem
    with planted(agent, f"import orki_events.{internal}  # noqa"):
        assert_red(run(workspace, "-s", "lint"), f"imports orki_events.{internal}, an internal module")
    with planted(agent, "import orki_contract.transitions  # noqa"):
        assert_red(run(workspace, "-s", "lint"), "is not listed as a machine")
    settings = workspace / "pyproject.toml"
    text = settings.read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    machine = next(each["modules"][0] for each in contracts if each["type"] == "machines")
    try:
        settings.write_text(text.replace(f'"{machine}"', '"orki_events.absent"'), encoding="utf-8")
        assert_red(run(workspace, "-s", "lint"), "orki_events.absent is listed as a machine and does not exist")
    finally:
        settings.write_text(text, encoding="utf-8")


def test_an_edit_of_generated_code_is_detected(workspace: Path) -> None:
    generated = sorted(workspace.glob("packages/*/gen/**/*_orki.py"))
    assert generated
    assert_green(run(workspace, "-s", "generate", "--", "--check"))
    with planted(generated[0], "# by hand"):
        assert_red(run(workspace, "-s", "generate", "--", "--check"), generated[0].name)


def test_a_generated_file_without_a_source_is_detected(workspace: Path) -> None:
    orphan = sorted(workspace.glob("packages/*/gen/**/*_orki.py"))[0].with_name("orphan_orki.py")
    orphan.write_text("", encoding="utf-8")
    try:
        assert_red(run(workspace, "-s", "generate", "--", "--check"), orphan.name)
    finally:
        orphan.unlink()


def test_the_packages_tests_need_no_toolchain(workspace: Path) -> None:
    """The environment of the packages' tests contains neither buf nor protoc."""
    assert_green(run(workspace, "-s", "tests", "--", "packages/orki-contract/tests", "--collect-only", "--quiet"))
    (environment,) = workspace.glob(f".nox/run-{sys.version_info.major}.{sys.version_info.minor}")
    installed = [path.name for path in environment.rglob("*") if path.parent.name in {"bin", "site-packages"}]
    assert "pytest" in installed
    assert not {"buf", "grpc_tools", "orki_codegen", "protoc-gen-mypy", "protoc-gen-orki"} & set(installed)


def test_a_type_error_is_detected(workspace: Path) -> None:
    module = workspace / "packages/orki-contract/src/orki_contract/__init__.py"
    assert_green(run(workspace, "-s", "types"))
    with planted(module, 'PLANTED: int = "a string"'):
        assert_red(run(workspace, "-s", "types"), "Incompatible types in assignment")
