"""The command `orki-contract dump`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_contract.__main__ import main
from orki_contract.images import image_of

IMAGE = image_of("orki.events.v1")


def dumped(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["dump", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_installed_package_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dumped(capsys, "orki.events.v1")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "orki.events.v1"
    assert "stream audit orki.events.v1.AuditEvent" in lines
    assert "sensitive orki.events.v1.AuditEvent.detail" in lines
    assert any(line.startswith("digest of usage sha256:") for line in lines)


def test_json_is_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dumped(capsys, "orki.events.v1", "--json")
    assert code == 0
    dump = json.loads(out)
    assert list(dump) == ["orki.events.v1"]
    assert "audit" in [stream["name"] for stream in dump["orki.events.v1"]["streams"]]
    assert set(dump["orki.events.v1"]["digests"]) == {stream["name"] for stream in dump["orki.events.v1"]["streams"]}


def test_images_wheels_and_folders_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = dumped(capsys, "orki.events.v1", "--json")
    home = tmp_path / "gen/orki/events/v1"
    home.mkdir(parents=True)
    (home / "contract.binpb").write_bytes(IMAGE)
    hidden = tmp_path / ".venv"
    hidden.mkdir()
    (hidden / "contract.binpb").write_bytes(b"not to be read")
    wheel = tmp_path / "acme-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("orki/events/v1/contract.binpb", IMAGE)
    whole = tmp_path / "image.binpb"
    whole.write_bytes(IMAGE)
    for source in (tmp_path, wheel, home / "contract.binpb", whole):
        assert dumped(capsys, str(source), "--json") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image.binpb", b"\xff", "image.binpb: the image is not a serialized FileDescriptorSet"),
        ("folder/readme", b"", "holds no contract.binpb, so no contract: was its code generated?"),
        ("acme.whl", b"PK\x03\x04 broken", "the image is not a serialized FileDescriptorSet"),
    ],
)
def test_sources_that_hold_no_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    code, out, err = dumped(capsys, str(path if path.parent == tmp_path else path.parent))
    assert (code, out) == (2, "")
    assert message in err


def test_a_missing_source_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert dumped(capsys, "nowhere-at-all")[0] == 2


def editable(site: Path, source: Path, *, pth: bool) -> None:
    """Lays out what an installer leaves of a distribution that stays in its source folder."""
    home = source / "gen/orki/events/v1"
    home.mkdir(parents=True)
    (home / "contract.binpb").write_bytes(IMAGE)
    listed = site / "acme_events-1.0.dist-info"
    listed.mkdir(parents=True)
    (listed / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-events\nVersion: 1.0\n")
    (listed / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}, "url": source.as_uri()}))
    record = "acme_events-1.0.dist-info/METADATA,,\n"
    if pth:
        (site / "_acme.pth").write_text(f"import sys\n{source / 'gen'}\n")
        (listed / "direct_url.json").unlink()
        record += "_acme.pth,,\n"
    (listed / "RECORD").write_text(record)


@pytest.mark.parametrize("pth", [True, False])
def test_a_distribution_that_stays_in_its_source_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pth: bool
) -> None:
    editable(tmp_path / "site", tmp_path / "a folder", pth=pth)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert dumped(capsys, "acme-events", "--json") == dumped(capsys, "orki.events.v1", "--json")


@pytest.mark.parametrize("command", [("dump",), ("dump", "--json"), ("diff", "orki.events.v1")])
def test_a_reader_that_goes_away(command: tuple[str, ...]) -> None:
    arguments = [sys.executable, "-m", "orki_contract", *command, "orki.events.v1"]
    reads, writes = os.pipe()
    os.close(reads)
    try:
        ended = subprocess.run(arguments, stdout=writes, stderr=subprocess.PIPE, check=False, timeout=50)
    finally:
        os.close(writes)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_an_unknown_source_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = dumped(capsys, "nowhere-at-all")
    assert '"nowhere-at-all" is no file or folder, no installed distribution and no installed proto package' in err


def test_a_contract_that_breaks_rules_is_shown_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = FileDescriptorSet.FromString(IMAGE)
    for file in files.file:
        if file.name == "orki/events/v1/usage.proto":
            content = file.SerializeToString().replace(b"\n\x05usage", b"\n\x05Usage")
            file.MergeFromString(b"")
            file.ParseFromString(content)
    path = tmp_path / "image.binpb"
    path.write_bytes(files.SerializeToString())
    code, out, err = dumped(capsys, str(path))
    assert code == 1
    assert "ORKI_STREAM_NAME" in err
    assert "stream Usage" in out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["dump", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("contract.binpb", "wheel", "Exit status", "--json"))


@pytest.mark.parametrize("arguments", [[], ["dmp"], ["dump", "--yaml"], ["dump", "a", "b"]])
def test_unknown_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: orki-contract" in capsys.readouterr().err
