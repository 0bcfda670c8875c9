"""The command `orki-contract diff`."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_contract.__main__ import main
from orki_contract.descriptors import Schema
from orki_contract.images import image_of

EVENTS = image_of("orki.events.v1")
HOTPATH = image_of("orki.hotpath.v1")


def lowered(image: bytes) -> bytes:
    """The events' image with a stream that keeps fewer entries, and another one that keeps more."""
    schema = Schema(image)
    stream = schema.pool.FindExtensionByName("orki.options.v1.stream")
    for name, factor in (("AuditEvent", 0.5), ("UsageEvent", 2)):
        retention = schema.messages[f"orki.events.v1.{name}"].proto.options.Extensions[stream].retention
        retention.max_entries = int(retention.max_entries * factor)
    whole = FileDescriptorSet()
    for file in schema.files.values():
        whole.file.add().ParseFromString(file.SerializeToString())
    return whole.SerializeToString()


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "old.binpb").write_bytes(EVENTS)
    (tmp_path / "new.binpb").write_bytes(lowered(EVENTS))
    return str(tmp_path / "old.binpb"), str(tmp_path / "new.binpb")


def diff(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["diff", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def wheel(path: Path, **packages: bytes) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in packages.items():
            archive.writestr(f"{name.replace('_', '/')}/contract.binpb", image)
    return str(path)


def test_a_table_for_people(images: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = diff(capsys, *images)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert (code, err) == (1, "")
    assert lines[0] == "bump plane what changed affects"
    assert lines[1] == 'major events stream "audit" keeps fewer entries: 1000000 → 500000 group "audit"'
    assert "[ORKI_STREAM_ENTRIES_LOWERED]" in lines[2]
    assert lines[-2] == "orki.events.v1: major (1 breaking, 1 compatible)"
    assert lines[-1].endswith(": at least a major bump")


def test_additions_are_compatible(images: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = diff(capsys, images[0], images[0])
    assert code == 0
    assert out.endswith(": the contracts are the same\n")
    code, out, _ = diff(capsys, "orki.errors.v1", images[0], "--json")
    assert code == 0


def test_json_for_programs(images: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = diff(capsys, *images, "--json")
    shown = json.loads(out)
    assert code == 1
    assert shown["bump"] == "major"
    assert shown["packages"] == {"orki.events.v1": "major"}
    assert [each["rule"] for each in shown["findings"]] == ["ORKI_STREAM_ENTRIES_LOWERED", "ORKI_STREAM_RELAXED"]
    assert shown["findings"][0]["affected"] == ['group "audit"']


def test_annotations_for_github(images: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = diff(capsys, *images, "--github")
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("::error file=orki/events/v1/audit.proto,title=ORKI_STREAM_ENTRIES_LOWERED::stream ")
    assert '%0Aaffects group "audit"' in lines[0]
    assert lines[1].startswith("::notice file=orki/events/v1/usage.proto,title=ORKI_STREAM_RELAXED::")
    code, out, _ = diff(capsys, images[0], "orki.errors.v1", "--github")
    gone = [line for line in out.splitlines() if "title=ORKI_STREAM_REMOVED" in line]
    assert gone == []  # an installed package speaks for itself alone
    (Path(images[0]).parent / "empty.binpb").write_bytes(image_of("orki.errors.v1"))
    code, out, _ = diff(capsys, images[0], str(Path(images[0]).parent / "empty.binpb"), "--github")
    gone = [line for line in out.splitlines() if "title=ORKI_STREAM_REMOVED" in line]
    assert len(gone) == 5
    assert all(line.startswith("::error title=") and "formerly at orki/events/v1/" in line for line in gone)


def test_a_wheel_speaks_for_its_own_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = wheel(tmp_path / "a-1.whl", orki_events_v1=EVENTS, orki_hotpath_v1=HOTPATH)
    new = wheel(tmp_path / "a-2.whl", orki_events_v1=lowered(EVENTS), orki_hotpath_v1=HOTPATH)
    code, out, _ = diff(capsys, old, new, "--json")
    assert code == 1
    assert json.loads(out)["packages"] == {"orki.events.v1": "major"}
    # What is only imported there, such as orki.errors.v1, is not its own: neither is it new, nor gone.
    (tmp_path / "all.binpb").write_bytes(HOTPATH)
    code, out, _ = diff(capsys, wheel(tmp_path / "b.whl", orki_errors_v1=image_of("orki.errors.v1")), old, "--json")
    assert (code, set(json.loads(out)["packages"])) == (0, {"orki.events.v1", "orki.hotpath.v1"})
    code, out, _ = diff(capsys, wheel(tmp_path / "c.whl", orki_hotpath_v1=HOTPATH), str(tmp_path / "all.binpb"))
    assert (code, out.splitlines()[-1].endswith("the same")) == (0, True)


def test_a_git_ref_is_read_without_touching_the_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "repo" / "gen/orki/events/v1"
    home.mkdir(parents=True)
    (home / "contract.binpb").write_bytes(EVENTS)
    (home / "other.py").write_text("x = 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "repo")
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q", "-b", "trunk"], ["add", "."], ["commit", "-q", "-m", "first"]):
        assert subprocess.run([*git, *command], capture_output=True, check=False).returncode == 0
    (home / "contract.binpb").write_bytes(lowered(EVENTS))
    code, out, _ = diff(capsys, "trunk", ".")
    assert code == 1
    assert out.splitlines()[-1].startswith("git trunk (")
    assert (home / "contract.binpb").read_bytes() == lowered(EVENTS)
    code, _, err = diff(capsys, "trunk~7", ".")
    assert code == 2
    assert "trunk~7" in err
    assert "no git ref" in err


def nothing(path: Path) -> str:
    return str(path / "absent.binpb")


def garbage(path: Path) -> str:
    (path / "garbage.binpb").write_bytes(b"\xff\xff\xff")
    return str(path / "garbage.binpb")


def empty(path: Path) -> str:
    (path / "empty").mkdir()
    return str(path / "empty")


def hollow(path: Path) -> str:
    return wheel(path / "hollow.whl")


@pytest.mark.parametrize(
    ("source", "said"),
    [(nothing, "no file or folder"), (garbage, "FileDescriptorSet"), (empty, "no contract"), (hollow, "no contract")],
)
def test_an_unreadable_source_exits_with_2(
    source: Callable[[Path], str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = source(tmp_path)
    for arguments in ((bad, "orki.events.v1"), ("orki.events.v1", bad)):
        code, out, err = diff(capsys, *arguments)
        assert (code, out) == (2, "")
        assert said in err


def test_protos_without_buf_and_without_images_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.proto").write_text('syntax = "proto3";\n', encoding="utf-8")
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = diff(capsys, str(tmp_path), "orki.events.v1")
    assert code == 2
    assert "buf is not installed" in err


def test_json_and_github_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["diff", "a", "b", "--json", "--github"])
    assert caught.value.code == 2
