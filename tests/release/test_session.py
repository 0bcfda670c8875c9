"""The session `publish` itself ends with the status of the step that ended it, and tells programs."""

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
    """Start the session as anyone would."""
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


def test_without_an_index_nothing_begins() -> None:
    status, output = publish("--dry-run")
    assert status == 2, output
    assert "--index URL is missing" in output
    assert "gate:" not in output


def test_an_index_that_is_down_ends_it_before_anything_is_built(tmp_path: Path) -> None:
    with answering(lambda _: None) as address:
        pass
    status, output = publish("--index", address, "--json", str(tmp_path / "outcome.json"))
    assert status == 2, output
    assert "nothing was built, and nothing uploaded" in output
    told = json.loads((tmp_path / "outcome.json").read_text(encoding="utf-8"))
    assert (told["outcome"], told["status"], told["files"]) == ("failed", 2, [])


def test_what_it_uploads_is_what_it_built(tmp_path: Path) -> None:
    status, output = publish("--index", "http://127.0.0.1:9", "--dist", str(tmp_path))
    assert status == 1, output
    assert "this session uploads what it has just built" in output
