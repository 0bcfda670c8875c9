"""Uploads to a real index: complete, partial, repeated, after a kill, and refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tests.release.conftest import ROOT, LocalIndex, build, serving
from tests.release.stub_index import Answer, Request, answering, forward

CLOSED = {"ORKI_INDEX", "ORKI_UPLOAD", "UV_PUBLISH_TOKEN", "UV_PUBLISH_USERNAME", "UV_PUBLISH_PASSWORD"}
COMMAND = [sys.executable, "-m", "nox_sessions.release.upload"]


def environment() -> dict[str, str]:
    """This process's variables, without credentials."""
    return {name: value for name, value in os.environ.items() if name not in CLOSED}


def upload(folder: Path, index: str, *arguments: str, status: int = 0) -> str:
    """Run an upload; its output, once the status was as expected."""
    command = [*COMMAND, "--index", index, "--dist", str(folder), "--settle", "20", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=150,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def public(built: Path) -> set[str]:
    """The names of the built files that are for an index."""
    return {path.name for path in built.iterdir() if not path.name.startswith("review_fleet")}


def document(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_files_are_uploaded_dependencies_first(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    outcome = tmp_path / "outcome.json"
    output = upload(built, index.url, "--json", str(outcome))
    assert index.files() == public(built)
    assert "review-fleet 0.1.0: private, not uploaded" in output
    told = document(outcome)
    assert (told["outcome"], told["status"]) == ("published", 0)
    names = [entry["distribution"] for entry in told["files"]]
    order = list(dict.fromkeys(names))
    assert names == [name for name in order for _ in range(2)], "the files of one come together"
    assert order.index("orki-contract") < order.index("orki-control") < order.index("orki-agent")
    assert order.index("orki-events") < order.index("orki-server")
    for entry in told["files"]:
        assert hashlib.sha256((index.folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


def test_a_repeated_upload_does_nothing(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    upload(built, index.url)
    before = {path: path.stat().st_mtime_ns for path in index.folder.iterdir()}
    output = upload(built, f"{index.url}simple", "--json", str(tmp_path / "outcome.json"))
    assert "byte for byte: nothing to do" in output
    assert {path: path.stat().st_mtime_ns for path in index.folder.iterdir()} == before
    assert document(tmp_path / "outcome.json")["outcome"] == "unchanged"


def test_missing_digests_are_computed_from_the_files(built: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "plain", "--hash-algo", "off") as plain:
        upload(built, plain.url, "--only", "orki-contract")
        assert "nothing to do" in upload(built, plain.url, "--only", "orki-contract")


def test_different_bytes_are_refused_before_any_upload(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    """Only the last file differs; the earlier ones are not uploaded either."""
    changed = tmp_path / "orki-server"
    shutil.copytree(ROOT / "packages/orki-server", changed)
    with (changed / "README.md").open("a", encoding="utf-8") as readme:
        readme.write("\nOne more sentence.\n")
    build([str(changed)], tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        shutil.copy(path, index.folder)
    there = index.files()
    output = upload(built, index.url, "--json", str(tmp_path / "outcome.json"), status=1)
    assert index.files() == there
    for name in there:
        for folder in (built, index.folder):
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in output
        assert f"{name}: the index has it with different bytes" in output
    assert "raise the version of orki-server" in output
    assert document(tmp_path / "outcome.json")["outcome"] == "refused"


def altered_contract(folder: Path, proto: str, out: Path) -> None:
    """Build orki-events with one more enum in a file of its contract, its own or one that it imports."""
    changed = folder / "orki-events"
    shutil.copytree(ROOT / "packages/orki-events", changed)
    shutil.copy(ROOT / ".gitignore", folder)  # an sdist brings along the one above it
    path = changed / "gen/orki/events/v1/contract.binpb"
    image = FileDescriptorSet.FromString(path.read_bytes())
    (file,) = (each for each in image.file if each.name == proto)
    file.enum_type.add(name="Altered").value.add(name="ALTERED", number=0)
    path.write_bytes(image.SerializeToString(deterministic=True))
    build([str(changed)], out)


def test_a_changed_copy_of_another_contract_needs_no_release(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    """Otherwise a change of one contract would require a release of every importer."""
    upload(built, index.url, "--only", "orki-contract", "orki-events")
    altered_contract(tmp_path, "orki/errors/v1/errors.proto", tmp_path / "other")
    there = {path: path.read_bytes() for path in index.folder.iterdir()}
    output = upload(tmp_path / "other", index.url, "--json", str(tmp_path / "outcome.json"))
    assert "except copies of other owners' contracts in orki-events: nothing to do" in output
    assert {path: path.read_bytes() for path in index.folder.iterdir()} == there
    assert [entry["now"] for entry in document(tmp_path / "outcome.json")["files"]] == ["copies", "copies"]
    (wheel,) = index.folder.glob("orki_events-*.whl")
    wheel.unlink()
    assert "there with different bytes" in upload(tmp_path / "other", index.url, status=1), (
        "an incomplete release needs its own bytes"
    )


def test_a_changed_own_contract_is_refused(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    upload(built, index.url, "--only", "orki-contract", "orki-events")
    altered_contract(tmp_path, "orki/events/v1/tool.proto", tmp_path / "other")
    assert "there with different bytes" in upload(tmp_path / "other", index.url, status=1)


@pytest.mark.parametrize("taken", [1, 4, 7])
def test_a_killed_upload_continues(built: Path, index: LocalIndex, taken: int) -> None:
    """The upload is killed between two files, also after a wheel without its sdist."""
    reached, leave = threading.Event(), threading.Event()
    posts: list[str] = []

    def door(request: Request) -> Answer | None:
        posts.append(request.path)
        if len(posts) <= taken:
            return forward(index.port, request)
        reached.set()
        leave.wait(120)
        return None

    with answering(door) as address:
        command = [*COMMAND, "--index", f"{index.url}simple/", "--upload", address, "--dist", str(built)]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                assert reached.wait(120)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
                leave.set()
    assert process.returncode == -signal.SIGKILL
    assert len(index.files()) == taken
    assert f"{len(public(built)) - taken} uploaded, {taken} already there" in upload(built, index.url)
    assert index.files() == public(built)


def test_a_lone_sdist_gets_its_wheel(built: Path, index: LocalIndex) -> None:
    (sdist,) = built.glob("orki_contract-*.tar.gz")
    shutil.copy(sdist, index.folder)
    assert "1 uploaded, 1 already there" in upload(built, index.url, "--only", "orki-contract")
    assert index.files() == {path.name for path in built.glob("orki_contract-*")}


def test_a_dry_run_uploads_nothing(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    output = upload(built, index.url, "--dry-run", "--json", str(tmp_path / "outcome.json"))
    assert f"dry run: {len(public(built))} to upload, 0 already there" in output
    assert not index.files()
    assert document(tmp_path / "outcome.json")["outcome"] == "planned"


def version_of(built: Path, name: str) -> str:
    (wheel,) = built.glob(f"{name}-*.whl")
    return wheel.name.split("-")[1]


def test_a_single_upload_needs_its_siblings_on_the_index(built: Path, index: LocalIndex) -> None:
    output = upload(built, index.url, "--only", "orki-agent", status=1)
    needs = (
        rf"orki-agent {version_of(built, 'orki_agent')} needs orki-contract<0.2.0,>=[0-9.]+, and the index has nothing"
    )
    assert re.search(needs, output), output
    assert not index.files()
    upload(built, index.url, "--only", "orki-contract", "orki-control", "--only", "orki-events")
    assert "2 uploaded" in upload(built, index.url, "--only", "orki-agent")


@pytest.mark.parametrize(("name", "why"), [("review-fleet", "is private"), ("orki-gone", "is not a distribution")])
def test_private_and_unknown_distributions_are_refused(built: Path, index: LocalIndex, name: str, why: str) -> None:
    assert why in upload(built, index.url, "--only", name, status=1)
    assert not index.files()


def test_a_tag_selects_a_distribution_and_its_version(built: Path, index: LocalIndex) -> None:
    output = upload(built, index.url, "--tag", "orki-contract-v9.9.9", status=1)
    version = version_of(built, "orki_contract")
    assert f"the tag has orki-contract 9.9.9, and its pyproject.toml {version}" in output
    assert not index.files()
    upload(built, index.url, "--tag", f"orki-contract-v{version}")
    assert index.files() == {path.name for path in built.glob("orki_contract-*")}


def test_a_wheel_without_its_sdist_is_refused(built: Path, index: LocalIndex, tmp_path: Path) -> None:
    (wheel,) = built.glob("orki_contract-*.whl")
    (tmp_path / "half").mkdir()
    shutil.copy(wheel, tmp_path / "half")
    assert "lacks its wheel or its sdist" in upload(tmp_path / "half", index.url, status=1)
    assert "has no wheel: build first" in upload(tmp_path / "nowhere", index.url, status=1)


def test_an_unreachable_index_is_an_error(built: Path) -> None:
    with answering(lambda _: None) as address:
        pass
    assert "cannot be read" in upload(built, address, status=2)


def test_an_index_that_lists_nothing_is_an_error(built: Path) -> None:
    def silent(request: Request) -> Answer:
        return (200, {}, b"") if request.method == "POST" else (404, {}, b"")

    with answering(silent) as address:
        output = upload(built, address, "--only", "orki-contract", "--settle", "0", status=2)
    assert "uploaded, but not listed by the index" in output


def test_refused_credentials_are_reported(built: Path) -> None:
    def closed(request: Request) -> Answer:
        return (403, {}, b"no") if request.method == "POST" else (404, {}, b"")

    with answering(closed) as address:
        output = upload(built, address, "--only", "orki-contract", status=2)
    assert "Set UV_PUBLISH_TOKEN" in output
    assert "the same command continues from here" in output
