"""The command `orki-codegen gate`, against a package index and against git."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from gate_index import LocalIndex
from gate_trees import Tree, generated

from orki_codegen import cli
from orki_codegen._gate.wheels import build_wheel

pytestmark = pytest.mark.timeout(300)

PROTO = "acme/review/v1/review.proto"
MODULE = "acme-review/src/acme_review/__init__.py"
FIRST = Tree(
    protos={
        PROTO: """
message Finding {
  option (orki.options.v1.stream) = {
    name: "findings"
    retention: {max_entries: 1000 max_age: {seconds: 86400}}
  };
  string path = 1;
}
"""
    },
    versions={"acme-review": "0.1.0"},
    sources={MODULE: '"""Reviews."""\n\n__all__ = ["review"]\n\n\ndef review():\n    return 1\n'},
)
RENAMED = FIRST.edited(PROTO, 'name: "findings"', 'name: "results"')
GREEN, RED, UNREADABLE = 0, 1, 2

Gate = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def index() -> Iterator[LocalIndex]:
    with LocalIndex() as open_index:
        yield open_index


@pytest.fixture
def empty(index: LocalIndex) -> LocalIndex:
    index.clear()
    return index


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the first version."""
    root = tmp_path_factory.mktemp("first")
    return build_wheel(generated(FIRST.lay_out(root / "tree")), "packages/acme-review", root)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Gate:
    """Run the command in a folder."""

    def run(root: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(root)
        status = cli.main(["gate", *arguments])
        output = capfd.readouterr()
        return status, output.out, output.err

    return run


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def committed(root: Path) -> str:
    """Commit everything and return the commit's id."""
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "as it is")
    return git(root, "rev-parse", "HEAD")


def test_a_first_release_is_reported(gate: Gate, empty: LocalIndex, tmp_path: Path) -> None:
    status, out, _ = gate(generated(FIRST.lay_out(tmp_path)), "--index", empty.url)
    assert status == GREEN
    assert f"acme-review 0.1.0, first release: nothing on {empty.url} yet; nothing to compare with" in out


def test_the_commit_of_published_toml_is_the_baseline(gate: Gate, empty: LocalIndex, tmp_path: Path) -> None:
    commit = committed(generated(FIRST.lay_out(tmp_path)))
    stand_in = tmp_path / "published.toml"
    stand_in.write_text(f'commit = "{commit}"\nreason = "the first users have it"\n', encoding="utf-8")
    assert gate(tmp_path, "--index", empty.url)[0] == GREEN
    generated(RENAMED.lay_out(tmp_path))
    for against in (("--index", empty.url), ("--against", "published")):
        status, out, _ = gate(tmp_path, *against)
        assert status == RED
        assert "ORKI_STREAM_REMOVED" in out
        assert "→ acme-review 0.2.0" in out
    assert f"published.toml ({commit[:10]})" in out
    stand_in.write_text(f'commit = "{commit}"\n', encoding="utf-8")
    assert gate(tmp_path, "--index", empty.url)[0] == UNREADABLE
    stand_in.unlink()
    assert gate(tmp_path, "--against", "published")[0] == UNREADABLE


def test_only_unreleased_distributions_use_published_toml(
    gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path
) -> None:
    both = Tree(
        protos={**FIRST.protos, "acme/desk/v1/desk.proto": "message Sheet { string text = 1; }\n"},
        versions={"acme-review": "0.1.0", "acme-desk": "0.3.0"},
        sources=FIRST.sources,
    )
    commit = committed(generated(both.lay_out(tmp_path)))
    (tmp_path / "published.toml").write_text(f'commit = "{commit}"\nreason = "as it was"\n', encoding="utf-8")
    empty.put(first)
    status, out, _ = gate(tmp_path, "--index", empty.url)
    assert status == GREEN
    assert f"acme-review 0.1.0, against 0.1.0 of {empty.url}: unchanged" in out
    assert f"acme-desk 0.3.0, first release: nothing on {empty.url} yet; compared with 0.3.0 of published.toml" in out
    generated(both.edited("acme/desk/v1/desk.proto", "string text = 1", "bytes text = 1").lay_out(tmp_path))
    status, out, _ = gate(tmp_path, "--index", empty.url)
    assert (status, "→ acme-desk 0.4.0" in out, "→ acme-review" in out) == (RED, True, False)


def test_the_last_wheel_is_the_baseline(gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path) -> None:
    empty.put(first)
    status, out, _ = gate(generated(FIRST.lay_out(tmp_path)), "--index", empty.url)
    assert (status, "unchanged, no release needed" in out) == (GREEN, True)

    found = tmp_path / "found.json"
    status, out, _ = gate(generated(RENAMED.lay_out(tmp_path)), "--index", empty.url, "--json", str(found))
    assert status == RED
    assert "packages/acme-review/pyproject.toml:3:1: acme-review has version 0.1.0 and needs at least 0.2.0" in out
    findings: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    keys = {"rule", "package", "subject", "file", "line", "message", "bump"}
    assert all(set(each) == keys for each in findings)
    (gone,) = [each for each in findings if each["rule"] == "ORKI_STREAM_REMOVED"]
    assert (gone["package"], gone["bump"]) == ("acme-review", "major")
    assert (gone["subject"], gone["file"]) == ('stream "findings"', f"proto/{PROTO}")

    _, out, _ = gate(tmp_path, "--index", empty.url, "--github")
    assert f"::error file=proto/{PROTO},line=" in out
    assert gate(generated(RENAMED.promising(acme_review="0.2.0").lay_out(tmp_path)), "--index", empty.url)[0] == GREEN


def test_different_contents_of_a_released_version_are_refused(
    gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path
) -> None:
    empty.put(first)
    other = FIRST.edited(MODULE, "return 1", "return 2")
    status, out, _ = gate(generated(other.lay_out(tmp_path)), "--index", empty.url)
    assert status == RED
    assert "CONTENT_CHANGED" in out
    assert "acme_review/__init__.py" in out
    assert "→ acme-review 0.1.1" in out
    assert gate(other.promising(acme_review="0.1.1").lay_out(tmp_path), "--index", empty.url)[0] == GREEN


def test_a_removed_command_is_major(gate: Gate, empty: LocalIndex, tmp_path: Path) -> None:
    table = generated(FIRST.lay_out(tmp_path / "tree")) / "packages/acme-review/pyproject.toml"
    text = table.read_text(encoding="utf-8")
    scripts = '[project.scripts]\nReview = "acme_review:review"\n'
    table.write_text(text.replace("[tool.orki]", f"{scripts}[tool.orki]"), encoding="utf-8")
    empty.put(build_wheel(tmp_path / "tree", "packages/acme-review", tmp_path))
    table.write_text(text.replace("[tool.orki]", f"{scripts.replace('Review', 'other')}[tool.orki]"), encoding="utf-8")
    status, out, _ = gate(tmp_path / "tree", "--index", empty.url)
    assert status == RED
    assert "API_COMMAND_REMOVED  the command Review was removed" in out
    assert "the command other is new" in out
    assert "needs at least 0.2.0" in out


def test_stale_generated_code_is_refused(gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path) -> None:
    empty.put(first)
    generated(FIRST.lay_out(tmp_path))
    status, out, _ = gate(RENAMED.promising(acme_review="0.2.0").lay_out(tmp_path), "--index", empty.url)
    assert (status, "GENERATED_CODE_STALE" in out) == (RED, True)


def test_a_private_distribution_is_never_requested(gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path) -> None:
    table = generated(FIRST.lay_out(tmp_path)) / "packages/acme-review/pyproject.toml"
    text = table.read_text(encoding="utf-8")
    table.write_text(
        text.replace("[tool.orki]", 'classifiers = ["Private :: Do Not Upload"]\n[tool.orki]'), encoding="utf-8"
    )
    status, out, _ = gate(tmp_path, "--index", empty.url)
    assert (status, "private: compared with git refs only" in out) == (GREEN, True)
    assert empty.requested == ["/simple/"]


@pytest.mark.parametrize(("days", "red"), [(None, True), (0.5, True), (2.0, False)])
def test_older_versions_count_while_their_entries_may_remain(
    gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path, days: float | None, red: bool
) -> None:
    """0.1.0 wrote `findings`, 0.2.0 removed it some days ago, and 0.3.0 uses the name for another message."""
    uploaded = None if days is None else datetime.now(UTC) - timedelta(days=days)
    empty.put(first, uploaded - timedelta(days=9) if uploaded else None)
    middle = generated(RENAMED.promising(acme_review="0.2.0").lay_out(tmp_path / "middle"))
    empty.put(build_wheel(middle, "packages/acme-review", tmp_path), uploaded)
    text = RENAMED.protos[PROTO]
    note = 'message Note { option (orki.options.v1.stream) = {name: "findings" retention: {max_entries: 1}}; }\n'
    back = Tree(protos={PROTO: text + note}, versions={"acme-review": "0.2.1"}, sources=FIRST.sources)
    status, out, _ = gate(generated(back.lay_out(tmp_path / "new")), "--index", empty.url)
    told = [line for line in out.splitlines() if "ORKI_STREAM_MOVED" in line]
    # The move since 0.1.0 needs 0.2.0, and the version is 0.2.1, so the finding does not fail.
    assert (status, bool(told)) == (GREEN, red)
    assert all("since acme-review 0.1.0" in line for line in told)


def test_older_versions_count_for_the_longest_age_of_a_deployment(
    gate: Gate, empty: LocalIndex, tmp_path: Path
) -> None:
    """The default age is one day and the upper bound ten; the last version was uploaded five days ago."""
    tunable = FIRST.edited(PROTO, "{seconds: 86400}", "{seconds: 86400} most_age: {seconds: 864000}")
    uploaded = datetime.now(UTC) - timedelta(days=5)
    empty.put(
        build_wheel(generated(tunable.lay_out(tmp_path / "first")), "packages/acme-review", tmp_path / "one"), uploaded
    )
    renamed = tunable.edited(PROTO, 'name: "findings"', 'name: "results"').promising(acme_review="0.2.0")
    empty.put(
        build_wheel(generated(renamed.lay_out(tmp_path / "middle")), "packages/acme-review", tmp_path / "two"), uploaded
    )
    note = 'message Note { option (orki.options.v1.stream) = {name: "findings" retention: {max_entries: 1}}; }\n'
    back = replace(renamed, protos={PROTO: renamed.protos[PROTO] + note}).promising(acme_review="0.2.1")
    status, out, _ = gate(generated(back.lay_out(tmp_path / "new")), "--index", empty.url)
    told = [line for line in out.splitlines() if "ORKI_STREAM_MOVED" in line]
    assert (status, len(told)) == (GREEN, 1)
    assert "since acme-review 0.1.0" in told[0]


def test_unreadable_inputs_exit_with_two(gate: Gate, empty: LocalIndex, first: Path, tmp_path: Path) -> None:
    root = generated(FIRST.lay_out(tmp_path / "tree"))
    status, _, output = gate(root, "--index", "http://127.0.0.1:9/simple/")
    assert (status, "cannot be read" in output) == (UNREADABLE, True)
    status, _, output = gate(root, "--index", empty.url.replace("simple", "elsewhere"))
    assert (status, "there is no package index at" in output) == (UNREADABLE, True)
    status, _, output = gate(root, "--index", "http://me:secret@127.0.0.1:9/simple/")
    assert (status, "secret" in output) == (UNREADABLE, False)
    empty.put(first, content=b"no wheel")
    status, _, output = gate(root, "--index", empty.url)
    assert (status, "acme_review-0.1.0" in output) == (UNREADABLE, True)
    empty.clear()
    empty.put(first.with_name("acme_review-0.1.0.tar.gz"), content=b"an sdist")
    found = tmp_path / "found.json"
    found.write_text("[]", encoding="utf-8")
    status, _, output = gate(root, "--index", empty.url, "--json", str(found))
    assert "no wheel that is not yanked" in output, output
    assert (status, found.exists()) == (UNREADABLE, False)
    broken = tmp_path / first.name
    with zipfile.ZipFile(first) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"\xff" if name.endswith("contract.binpb") else source.read(name))
    empty.put(broken)
    status, _, output = gate(root, "--index", empty.url)
    assert status == UNREADABLE, output
    assert "image" in output, output


def test_missing_refs_exit_with_two(gate: Gate, empty: LocalIndex, tmp_path: Path) -> None:
    root = generated(FIRST.lay_out(tmp_path / "tree"))
    status, _, output = gate(root, "--against", "main")
    assert (status, "no git repository" in output) == (UNREADABLE, True)
    committed(root)
    status, _, output = gate(root, "--against", "release")
    assert (status, 'no commit "release"' in output) == (UNREADABLE, True)
    (root / "more").touch()
    committed(root)
    git(tmp_path, "clone", "--quiet", "--depth", "1", root.as_uri(), "shallow")
    status, _, output = gate(tmp_path / "shallow", "--against", "HEAD~1")
    assert (status, "git fetch --unshallow" in output) == (UNREADABLE, True)
    assert gate(tmp_path / "shallow", "--against", "HEAD")[0] == GREEN
    assert gate(root, "--against", "HEAD", "--index", empty.url)[0] == UNREADABLE


def test_no_folder_name_hides_a_contract(gate: Gate, tmp_path: Path) -> None:
    """Folders such as tests and docs are left out only beside sources and protos."""
    odd = Tree(
        protos={"acme/docs/v1/page.proto": "message Page { string text = 1; }\n"},
        versions={"acme-docs": "1.0.0"},
        sources={"acme-docs/src/acme_docs/tests/__init__.py": "def check():\n    pass\n"},
    )
    odd = replace(odd, sources={**odd.sources, "acme-docs/src/acme_docs/__init__.py": ""})
    committed(generated(odd.lay_out(tmp_path)))
    assert gate(tmp_path, "--against", "HEAD")[0] == GREEN
    odd.edited("acme/docs/v1/page.proto", "string text = 1", "bytes text = 1").lay_out(tmp_path)
    status, out, _ = gate(tmp_path, "--against", "HEAD")
    assert (status, "ORKI_FIELD_RETYPED" in out, "API_ADDED" in out) == (RED, True, False)


def test_buf_must_use_every_rule(gate: Gate, tmp_path: Path) -> None:
    config = generated(FIRST.lay_out(tmp_path)) / "buf.yaml"
    committed(tmp_path)
    text = config.read_text(encoding="utf-8")
    assert gate(tmp_path, "--against", "HEAD")[0] == GREEN
    for before, after, word in (
        ("    - ORKI_STREAM\n", "", "ORKI_STREAM_REMOVED"),
        ("    - FILE\n", "", "FILE"),
        ("plugin: orki-checks", 'plugin: "false"', ""),
    ):
        config.write_text(text.replace(before, after), encoding="utf-8")
        status, _, output = gate(tmp_path, "--against", "HEAD")
        assert (status, word in output) == (UNREADABLE, True)


def test_an_accepted_break_of_the_ref_may_match_nothing(gate: Gate, tmp_path: Path) -> None:
    entry = (
        '[[break]]\nrule = "ORKI_STREAM_REMOVED"\nsubject = "stream \\"findings\\""\npackage = "acme-review"\n'
        'reason = "nobody reads it"\nuntil = 2999-01-01\n'
    )
    file = generated(FIRST.lay_out(tmp_path)) / "accepted-breaks.toml"
    committed(tmp_path)
    generated(RENAMED.promising(acme_review="0.1.1").lay_out(tmp_path))
    assert gate(tmp_path, "--against", "HEAD")[0] == RED
    file.write_text(entry, encoding="utf-8")
    assert gate(tmp_path, "--against", "HEAD")[0] == GREEN
    committed(tmp_path)
    assert gate(tmp_path, "--against", "HEAD")[0] == GREEN
    assert gate(tmp_path, "--against", "HEAD~1")[0] == GREEN
    file.write_text(entry.replace("findings", "others"), encoding="utf-8")
    status, out, _ = gate(tmp_path, "--against", "HEAD")
    assert (status, "is stale, because no change matches it: remove it" in out) == (RED, True)
