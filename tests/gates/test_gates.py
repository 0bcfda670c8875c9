"""What must not pass is planted into a copy of the workspace, and the very session that guards it turns red.

The copy lies beside nox's environments and stays, so that its own environment and caches serve the next run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / ".nox" / "gates" / "a copy"  # the space is meant: a path may have one
LEFT_OUT = {
    ".git",
    ".hypothesis",
    ".mypy_cache",
    ".nox",
    ".noxw",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "dist",
}

pytestmark = pytest.mark.timeout(600)


def contents(top: Path) -> dict[Path, Path]:
    """Every file of a workspace that is not made by a session, by its path below the top."""
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found.update({(Path(folder) / name).relative_to(top): Path(folder) / name for name in files})
    return found


@pytest.fixture(scope="module")
def workspace() -> Path:
    """A copy that equals the workspace; what did not change keeps its times, so caches stay good."""
    COPY.mkdir(parents=True, exist_ok=True)
    wanted = contents(ROOT)
    for name, path in contents(COPY).items():
        if name not in wanted:
            path.unlink()
    for name, path in wanted.items():
        target = COPY / name
        if (
            not target.is_file()
            or target.read_bytes() != path.read_bytes()
            or target.stat().st_mode != path.stat().st_mode
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    return COPY


def run(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start sessions in the copy, as a contributor would; only the launcher's environment is the original's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NOX", "PYTEST", "COV"))}
    environment["NOXW_HOME"] = str(ROOT / ".noxw")
    command = [sys.executable, str(workspace / "noxw"), *arguments]
    return subprocess.run(
        command,
        cwd=workspace,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


@contextmanager
def planted(path: Path, line: str) -> Iterator[None]:
    """Add a line at the end of a file, and take it away again."""
    before = path.read_bytes()
    path.write_bytes(before + f"\n{line}\n".encode())
    try:
        yield
    finally:
        path.write_bytes(before)


def assert_red(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0, done.stdout
    for word in words:
        assert word in done.stdout, done.stdout


def assert_green(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout


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
