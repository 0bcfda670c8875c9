"""The session `publish` exits with the status of the step that failed, and writes the outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.release.conftest import ROOT
from tests.release.stub_index import answering

pytestmark = pytest.mark.timeout(300)


def publish(*arguments: str) -> tuple[int, str]:
    """Run the session."""
    spoken = ("NOX", "PYTEST", "COV", "UV_PUBLISH_", "ORKI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(spoken)}
    environment["NOXW_HOME"] = os.environ.get("NOXW_HOME") or str(ROOT / ".noxw")
    done = subprocess.run(
        [sys.executable, str(ROOT / "noxw"), "-s", "publish", "--", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=280,
    )
    return done.returncode, done.stdout


def test_a_missing_index_is_wrong_usage() -> None:
    status, output = publish("--dry-run")
    assert status == 2, output
    assert "--index URL is missing" in output
    assert "gate:" not in output


def test_an_unreachable_index_fails_before_the_build(tmp_path: Path) -> None:
    with answering(lambda _: None) as address:
        pass
    status, output = publish("--index", address, "--json", str(tmp_path / "outcome.json"))
    assert status == 2, output
    assert "nothing was built or uploaded" in output
    told = json.loads((tmp_path / "outcome.json").read_text(encoding="utf-8"))
    assert (told["outcome"], told["status"], told["files"]) == ("failed", 2, [])


def test_the_folder_option_is_refused(tmp_path: Path) -> None:
    status, output = publish("--index", "http://127.0.0.1:9", "--dist", str(tmp_path))
    assert status == 1, output
    assert "this session uploads the files that it builds" in output
