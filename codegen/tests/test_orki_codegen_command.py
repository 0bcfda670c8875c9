"""The command `orki-codegen`, in a repository of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from orki_codegen.cli import main

ROOT = Path(__file__).resolve().parents[2]

PROTO = """\
// A user's own.
syntax = "proto3";

package acme.v1;

import "orki/options/v1/options.proto";

// An event.
message Event {
  option (orki.options.v1.stream) = {
    name: "events"
    retention: {max_entries: 10}
  };
}
"""


@pytest.mark.parametrize(
    ("vendored", "source"),
    [
        ("buf.yaml", "buf.yaml"),
        ("buf.gen.yaml", "buf.gen.yaml"),
        ("options.proto", "proto/orki/options/v1/options.proto"),
    ],
)
def test_what_is_vendored_is_what_the_repository_uses(vendored: str, source: str) -> None:
    copy = ROOT / "codegen/src/orki_codegen/vendored" / vendored
    assert copy.read_bytes() == (ROOT / source).read_bytes()


def test_from_nothing_to_generated_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["vendor"]) == 0
    assert "buf.gen.yaml written" in capsys.readouterr().out
    (tmp_path / "proto/acme/v1").mkdir(parents=True)
    (tmp_path / "proto/acme/v1/events.proto").write_text(PROTO, encoding="utf-8")
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/pyproject.toml").write_text('[tool.orki]\ncontracts = ["acme.v1"]\n', encoding="utf-8")
    assert main(["generate"]) == 0
    assert '+ stream "events"' in capsys.readouterr().out
    assert (tmp_path / "acme/gen/acme/v1/events_orki.py").is_file()
    assert main(["generate", "--check"]) == 0
    assert main(["docs", "pages"]) == 0
    assert "# acme.v1" in (tmp_path / "pages/acme.v1.md").read_text(encoding="utf-8")


SHORT = """\
// Review.
syntax = "proto3";

package acme.v1;

import "orki/options/v1/options.proto";

// Work for agents.
service ReviewService {
  // Reviews one file.
  rpc ReviewFile(ReviewFileRequest) returns (ReviewFileResponse) {
    option (orki.options.v1.task) = {
      progress: "ReviewProgress"
      max_attempts: 5
    };
  }
  // Sums a review up.
  rpc SumUp(SumUpRequest) returns (SumUpResponse) {
    option (orki.options.v1.task) = {};
  }
}

message ReviewFileRequest {}
message ReviewFileResponse {}
message ReviewProgress {}
message SumUpRequest {}
message SumUpResponse {}

// A finding.
message FindingEvent {
  option (orki.options.v1.stream) = {
    name: "findings"
    retention: {max_entries: 1000000}
    groups: [
      {name: "triage"}
    ]
  };
  string path = 1;
}

// What a file weighs.
message Weight {
  option (orki.options.v1.frame) = {
    version: 1
    block_length: 16
  };
  // Bytes.
  uint64 size = 1 [(orki.options.v1.offset) = 0];
  // Lines.
  uint32 lines = 2 [(orki.options.v1.offset) = 8];
}
"""


def test_two_tasks_a_stream_and_a_frame_take_less_than_eighty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["vendor"]) == 0
    (tmp_path / "proto/acme/v1").mkdir(parents=True)
    (tmp_path / "proto/acme/v1/review.proto").write_text(SHORT, encoding="utf-8")
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/pyproject.toml").write_text('[tool.orki]\ncontracts = ["acme.v1"]\n', encoding="utf-8")
    assert main(["generate"]) == 0
    text = (tmp_path / "acme/gen/acme/v1/review_orki.py").read_text(encoding="utf-8")
    assert text.count("\n") < 80


def test_vendor_keeps_settings_and_renews_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = tmp_path / "proto/orki/options/v1/options.proto"
    options.parent.mkdir(parents=True)
    options.write_text("old", encoding="utf-8")
    (tmp_path / "buf.yaml").write_text("own", encoding="utf-8")
    assert main(["vendor"]) == 0
    said = capsys.readouterr().out
    assert "buf.yaml is there already" in said
    assert "options.proto brought up to date" in said
    assert (tmp_path / "buf.yaml").read_text(encoding="utf-8") == "own"
    assert options.read_text(encoding="utf-8") != "old"


def test_what_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proto").write_text("a file", encoding="utf-8")
    assert main(["vendor"]) == 1
    assert "options.proto cannot be written" in capsys.readouterr().err


def test_docs_outside_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["docs", "pages"]) == 1
    assert "has no buf.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [[], ["genrate"], ["docs"], ["init", "--force"], ["init", "a", "b"], ["vendor", "here"], ["generate", "--chek"]],
)
def test_unknown_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: orki-codegen" in capsys.readouterr().err
