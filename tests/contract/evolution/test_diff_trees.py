"""`orki-contract diff` on folders and git refs that buf compiles: places are exact, and those of the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from evolution_pairs import OPTIONS, ROOT

from orki_contract.__main__ import main

pytestmark = pytest.mark.timeout(120)

PROTO = """\
syntax = "proto3";

package acme.v1;

import "orki/options/v1/options.proto";

message Finding {
  option (orki.options.v1.stream) = {
    name: "findings"
    retention: {max_entries: 1000}
    groups: [
      {name: "index"},
      {name: "notify", max_deliveries: 9}
    ]
  };
  string path = 1;
}
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, whose working tree has gone on."""
    home = tmp_path / "proto/orki/options/v1"
    home.mkdir(parents=True)
    shutil.copy(OPTIONS, home)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    proto = tmp_path / "proto/acme/v1/finding.proto"
    proto.parent.mkdir(parents=True)
    proto.write_text(PROTO, encoding="utf-8")
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q", "-b", "trunk"], ["add", "."], ["commit", "-q", "-m", "first"]):
        assert subprocess.run([*git, *command], cwd=tmp_path, capture_output=True, check=False).returncode == 0
    text = PROTO.replace("max_deliveries: 9", "max_deliveries: 3").replace('      {name: "index"},\n', "")
    proto.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_ref_against_the_working_tree(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "trunk", ".", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    places = {each["rule"]: each["location"] for each in told["findings"]}
    file = "proto/acme/v1/finding.proto"
    # Inside of a list, to the character: the text is at hand here, as it is not in buf.
    assert places["ORKI_GROUP_DELIVERIES_LOWERED"] == {"file": file, "line": 12, "column": 24}
    assert places["ORKI_GROUP_REMOVED"] == {"file": file, "line": 12, "column": 7}
    before = {each["rule"]: each["before"] for each in told["findings"]}
    assert before["ORKI_GROUP_REMOVED"] == {"file": file, "line": 12, "column": 7}
    assert main(["diff", str(repository), str(repository)]) == 0


def test_annotations_stand_on_the_line_of_the_repository(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "HEAD", ".", "--github"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("::error file=proto/acme/v1/finding.proto,line=12,col=7,title=ORKI_GROUP_REMOVED::")


def test_what_does_not_compile_is_no_verdict(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "proto/acme/v1/finding.proto").write_text("syntax = 3;\n", encoding="utf-8")
    assert main(["diff", "trunk", "."]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "buf cannot compile .:" in said.err
    assert "finding.proto:1:10" in said.err
