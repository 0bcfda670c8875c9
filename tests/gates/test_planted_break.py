"""A break of a contract is planted, with its code generated again, and the step that CI runs turns red."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from planting import ROOT, assert_green, assert_red, run

pytestmark = pytest.mark.timeout(600)

USAGE = "proto/orki/events/v1/usage.proto"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def empty_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an index that knows no package."""
    top = tmp_path_factory.mktemp("index")
    (top / "simple").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(top))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def surroundings(workspace: Path, empty_index: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What the gate sees beside the copy: an index, and a repository whose one commit stands for published."""
    repository = {"GIT_DIR": str(tmp_path_factory.mktemp("git") / "repository"), "GIT_WORK_TREE": str(workspace)}
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "what users have"]):
        subprocess.run(["git", *identity, *command], cwd=workspace, env={**os.environ, **repository}, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=workspace, env={**os.environ, **repository}, check=True, capture_output=True
    )
    stand_in = f'commit = "{head.stdout.decode().strip()}"\nreason = "the copy as it was"\n'
    (workspace / "published.toml").write_text(stand_in, encoding="utf-8")
    # The environment is made with the index that this machine has; only the gate gets the other one.
    assert_green(run(workspace, "-s", "breaking", "--", "--help"))
    return {**repository, "UV_DEFAULT_INDEX": empty_index}


def test_the_gate_is_a_step_of_ci() -> None:
    assert "step ./noxw\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    default = re.search(r"^nox\.options\.sessions = \[(.+?)\]", noxfile, re.MULTILINE | re.DOTALL)
    assert default is not None
    assert '"breaking"' in default[1]


def test_without_a_break_it_is_green(workspace: Path, surroundings: Mapping[str, str]) -> None:
    done = run(workspace, "-s", "breaking", **surroundings)
    assert_green(done)
    assert "stands in for published" in done.stdout


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("    - ORKI_STREAM\n", "", "ORKI_STREAM_REMOVED"),
        ("plugin: orki-checks", 'plugin: "false"', "false"),
    ],
)
def test_a_gate_that_could_not_see_is_red(
    workspace: Path, surroundings: Mapping[str, str], before: str, after: str, said: str
) -> None:
    config = workspace / "buf.yaml"
    text = config.read_text(encoding="utf-8")
    first, _, rest = text.partition("breaking:")
    assert before in rest
    config.write_text(f"{first}breaking:{rest.replace(before, after)}", encoding="utf-8")
    try:
        done = run(workspace, "-s", "breaking", **surroundings)
        assert_red(done, said)
        assert done.returncode == 2
    finally:
        config.write_text(text, encoding="utf-8")


def test_the_break_that_is_played(workspace: Path) -> None:
    """Old and new wheels really run against a server there; the session fails if anything goes otherwise than told."""
    done = run(workspace, "-s", "breaking", "--", "--show")
    assert_green(done)
    assert "5 published, old consumer read 5, new consumer read 0" in done.stdout
    assert "5 published, old consumer read 0, new consumer read 5" in done.stdout
    assert "orki-events promises 0.1.0, and must promise 0.2.0" in done.stdout


def test_a_renamed_stream_is_refused_by_rule_and_version(workspace: Path, surroundings: Mapping[str, str]) -> None:
    proto = workspace / USAGE
    name = re.search(r'name: "([^"]+)"', proto.read_text(encoding="utf-8"))
    assert name is not None
    text = proto.read_text(encoding="utf-8").replace(name[0], f'name: "{name[1]}.renamed"')
    proto.write_text(text, encoding="utf-8")
    assert_green(run(workspace, "-s", "generate"))
    done = run(workspace, "-s", "breaking", **surroundings)
    assert_red(done, "ORKI_STREAM_REMOVED", f'"{name[1]}"', "→ orki-events 0.2.0", "orki-events promises 0.1.0")
    assert done.returncode == 1
