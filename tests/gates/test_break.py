"""A planted break of a contract makes the gate fail, as in CI."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import tomllib
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from planting import ROOT, assert_green, assert_red, run

pytestmark = pytest.mark.timeout(600)

USAGE = "proto/orki/events/v1/usage.proto"


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without logging."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def empty_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an index without packages."""
    top = tmp_path_factory.mktemp("index")
    (top / "simple").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(top))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def variables(workspace: Path, empty_index: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Variables that give the gate an empty index and a repository whose only commit is published."""
    # What the tree changes is part of the published commit, so there is nothing to accept.
    accepted = workspace / "accepted-breaks.toml"
    accepted.write_text(accepted.read_text(encoding="utf-8").partition("\n[[break]]")[0] + "\n", encoding="utf-8")
    repository = {"GIT_DIR": str(tmp_path_factory.mktemp("git") / "repository"), "GIT_WORK_TREE": str(workspace)}
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "what users have"]):
        subprocess.run(["git", *identity, *command], cwd=workspace, env={**os.environ, **repository}, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=workspace, env={**os.environ, **repository}, check=True, capture_output=True
    )
    published = f'commit = "{head.stdout.decode().strip()}"\nreason = "the copy as it was"\n'
    (workspace / "published.toml").write_text(published, encoding="utf-8")
    # The environment is made with the usual index; only the gate uses the empty one.
    assert_green(run(workspace, "-s", "breaking", "--", "--help"))
    return {**repository, "UV_DEFAULT_INDEX": empty_index}


def test_ci_runs_the_gate() -> None:
    assert "step ./noxw\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    default = re.search(r"^nox\.options\.sessions = \[(.+?)\]", noxfile, re.MULTILINE | re.DOTALL)
    assert default is not None
    assert '"breaking"' in default[1]


def version_of(workspace: Path) -> str:
    """Return the version of orki-events."""
    project = tomllib.loads((workspace / "packages/orki-events/pyproject.toml").read_text(encoding="utf-8"))
    return str(project["project"]["version"])


def test_the_gate_is_green_without_a_break(workspace: Path, variables: Mapping[str, str]) -> None:
    done = run(workspace, "-s", "breaking", **variables)
    assert_green(done)
    assert f"compared with {version_of(workspace)} of published.toml" in done.stdout


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("    - ORKI_STREAM\n", "", "ORKI_STREAM_REMOVED"),
        ("plugin: orki-checks", 'plugin: "false"', "false"),
    ],
)
def test_a_missing_rule_or_plugin_fails_the_gate(
    workspace: Path, variables: Mapping[str, str], before: str, after: str, message: str
) -> None:
    config = workspace / "buf.yaml"
    text = config.read_text(encoding="utf-8")
    first, _, rest = text.partition("breaking:")
    assert before in rest
    config.write_text(f"{first}breaking:{rest.replace(before, after)}", encoding="utf-8")
    try:
        done = run(workspace, "-s", "breaking", **variables)
        assert_red(done, message)
        assert done.returncode == 2
    finally:
        config.write_text(text, encoding="utf-8")


def test_the_break_demo_runs(workspace: Path) -> None:
    done = run(workspace, "-s", "breaking", "--", "--show")
    assert_green(done)
    assert "5 published, old consumer read 5, new consumer read 0" in done.stdout
    assert "5 published, old consumer read 0, new consumer read 5" in done.stdout
    assert f"orki-events has version {version_of(workspace)} and needs at least 0.2.0" in done.stdout


def test_a_renamed_stream_is_refused_by_rule_and_version(workspace: Path, variables: Mapping[str, str]) -> None:
    proto = workspace / USAGE
    name = re.search(r'name: "([^"]+)"', proto.read_text(encoding="utf-8"))
    assert name is not None
    text = proto.read_text(encoding="utf-8").replace(name[0], f'name: "{name[1]}.renamed"')
    proto.write_text(text, encoding="utf-8")
    assert_green(run(workspace, "-s", "generate"))
    done = run(workspace, "-s", "breaking", **variables)
    too_low = f"orki-events has version {version_of(workspace)}"
    assert_red(done, "ORKI_STREAM_REMOVED", f'"{name[1]}"', "→ orki-events 0.2.0", too_low)
    assert done.returncode == 1
