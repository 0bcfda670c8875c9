"""A user's day in a copy of the workspace: a field, a package of their own with all four kinds, a reader elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path(__file__).with_name("scratch")
PLANES = ("orki-agent", "orki-contract", "orki-control", "orki-events")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace as far as generation needs it, with the user's files in it."""
    root = tmp_path_factory.mktemp("scratch") / "somewhere else"
    root.mkdir()
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "proto/orki", root / "proto/orki")
    for name in PLANES:
        shutil.copytree(ROOT / f"packages/{name}/gen", root / f"packages/{name}/gen")
        shutil.copy(ROOT / f"packages/{name}/pyproject.toml", root / f"packages/{name}")
    shutil.copytree(SCRATCH, root, dirs_exist_ok=True)
    agent = root / "proto/orki/events/v1/agent.proto"
    text = agent.read_text(encoding="utf-8")
    marker = "  // The event.\n  oneof event {"
    assert marker in text
    agent.write_text(text.replace(marker, f"  // Where it runs.\n  string region = 100;\n{marker}"), encoding="utf-8")
    return root


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the copy's generated code before the workspace's own."""
    roots = [*(root / f"packages/{name}/gen" for name in (*PLANES, "acme-ship", "acme-billing"))]
    roots.append(ROOT / "packages/orki-contract/src")
    path = os.pathsep.join(map(str, roots))
    environment = {**os.environ, "PYTHONPATH": path, "MYPYPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = (sys.executable, "-W", "error", *command)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_a_user_adds_all_kinds_and_uses_them_typed(copy: Path) -> None:
    done = run(copy, "-m", "orki_codegen.generate")
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.strip() for line in done.stdout.splitlines()]
    assert "+ field orki.events.v1.AgentEvent.region: number 100, type string" in said
    assert '+ group "billing" on stream "parcels"' in said
    assert [line for line in said if line.startswith("orki-") and "made" not in line] == [
        "orki-events: 4 changed files"
    ]

    done = run(copy, "-m", "orki_codegen.generate", "--check")
    assert done.returncode == 0, done.stdout + done.stderr

    command = ["-m", "mypy", "--strict", "--config-file=", "--namespace-packages", "--explicit-package-bases"]
    done = run(copy, *command, "user.py", "packages/acme-ship/gen", "packages/acme-billing/gen")
    assert done.returncode == 0, done.stdout + done.stderr

    done = run(copy, "user.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "used\n"


def test_the_generator_knows_none_of_our_own_messages() -> None:
    """The names of orki's own packages and streams appear nowhere in it, but for the options'.

    What `init` writes is a user's own repository, which reads one of orki's streams as any user may.
    """
    names = ("orki.events", "orki.control", "orki.hotpath", "orki.errors", "AgentEvent", "TaskEvent", "FrameHeader")
    sources = [*ROOT.glob("codegen/src/**/*.py"), *ROOT.glob("codegen/src/**/*.j2")]
    sources = [path for path in sources if path.parent.name != "repository"]
    assert sources
    found = [(path.name, name) for path in sources for name in names if name in path.read_text(encoding="utf-8")]
    assert found == []
