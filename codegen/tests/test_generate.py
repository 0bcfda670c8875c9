"""The generate command: what it writes, says, refuses, and leaves alone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orki_codegen._workspace import find_workspace
from orki_codegen.generate import main
from orki_contract.errors import InvalidSetting

GEN = Path("packages/acme-kitchen/gen")
SINK = Path("proto/kitchen/v1/sink.proto")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in a fresh workspace: takes arguments, gives exit code, output and errors."""
    monkeypatch.chdir(fresh)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.timeout(300)
def test_the_life_of_generated_code(command: Command) -> None:
    """One workspace through its days: first run, nothing to do, edits in words, drift, orphans."""
    code, out, _ = command("--check")
    assert code == 1

    code, out, _ = command()
    assert code == 0
    assert '+ stream "orders.placed-v2": message kitchen.v1.OrderEvent' in out
    assert "+ task kitchen.v1.KitchenService/Cook" in out
    assert '+ group "kitchen" on stream "other-events": start latest' in out
    assert "acme-kitchen: 30 new files" in out
    made = snapshot(Path())
    times = {path: os.stat(path).st_mtime_ns for path in made}

    assert command("--check")[0] == 0
    code, out, _ = command()
    assert code == 0
    assert "nothing changed" in out
    assert snapshot(Path()) == made
    assert {path: os.stat(path).st_mtime_ns for path in made} == times

    edit(SINK, "max_entries: 5000000", "max_entries: 10")
    edit(SINK, '      {name: "another-group-whose-name-is-quite-long-too"}\n', '      {name: "new"}\n')
    edit(SINK, "  // Labels.\n", "  // A place.\n  string region = 7;\n  // Labels.\n")
    edit(SINK, "opcode: 0x0100", "opcode: 0x0150")
    edit(SINK, "  // Well.\n", "  // Great.\n  MOOD_GREAT = 2;\n  // Well.\n")
    code, out, _ = command()
    assert code == 0
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == [
        "+ field kitchen.v1.OrderEvent.region: number 7, type string",
        '- group "another-group-whose-name-is-quite-long-too" of stream "orders.placed-v2"',
        '+ group "new" of stream "orders.placed-v2"',
        '~ stream "orders.placed-v2": retention.max_entries 5000000 → 10',
        "~ tool kitchen.v1.PantryToolService/Weigh: opcode 256 → 336",
        "+ value kitchen.v1.Mood.MOOD_GREAT: number 2",
    ]

    edit(SINK, "// Who ordered.", "// Who has ordered.")
    code, out, _ = command()
    assert "contract unchanged" in out

    module = GEN / "kitchen/v1/sink_orki.py"
    module.write_bytes(module.read_bytes() + b"# by hand\n")
    orphan = GEN / "kitchen/v1/gone_orki.py"
    orphan.write_bytes(b"")
    (GEN / "kitchen/v1/both_pb2.pyi").unlink()
    before = snapshot(Path())
    code, _, err = command("--check")
    assert code == 1
    assert err.splitlines()[:3] == [
        f"{GEN}/kitchen/v1/both_pb2.pyi is missing",
        f"{GEN}/kitchen/v1/gone_orki.py is an orphan",
        f"{GEN}/kitchen/v1/sink_orki.py differs",
    ]
    assert "nox -s generate" in err.splitlines()[3]
    assert snapshot(Path()) == before
    assert command()[0] == 0
    assert not orphan.exists()
    assert command("--check")[0] == 0


@pytest.mark.timeout(300)
def test_hand_written_files_beside_generated_ones_stay(command: Command, fresh: Path) -> None:
    hand = [fresh / "packages/acme-kitchen/src/acme.py", fresh / "docs/reference/by-hand.md", fresh / "docs/guide.md"]
    for path in hand:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("by hand", encoding="utf-8")
    assert command()[0] == 0
    assert [path.read_text(encoding="utf-8") for path in hand] == ["by hand"] * 3
    shutil.rmtree(fresh / "proto/kitchen/other")
    for name in ("sink", "my-dashed", "legacy", "modern", "both"):
        (fresh / f"proto/kitchen/v1/{name}.proto").unlink()
    edit(fresh / "packages/acme-kitchen/pyproject.toml", '"kitchen.other.v1", ', "")
    code, out, _ = command()
    assert code == 0
    assert "- stream" in out
    assert not (fresh / GEN / "kitchen/other").exists()
    assert not (fresh / "docs/reference/kitchen.other.v1.md").exists()
    assert [path.read_text(encoding="utf-8") for path in hand] == ["by hand"] * 3


@pytest.mark.timeout(300)
def test_who_owns_nothing_any_more_loses_its_generated_code(command: Command, fresh: Path) -> None:
    assert command()[0] == 0
    heir = fresh / "packages/heir/pyproject.toml"
    heir.parent.mkdir()
    owner = fresh / "packages/acme-kitchen/pyproject.toml"
    heir.write_text(owner.read_text(encoding="utf-8").replace("acme-kitchen", "heir"), encoding="utf-8")
    owner.write_text('[project]\nname = "acme-kitchen"\n', encoding="utf-8")
    code, _, err = command("--check")
    assert code == 1
    assert f"{GEN}/kitchen/v1/sink_orki.py is an orphan" in err
    assert command()[0] == 0
    assert not [path for path in (fresh / GEN).rglob("*") if path.is_file()]
    assert (fresh / "packages/heir/gen/kitchen/v1/sink_orki.py").is_file()


def test_what_buf_refuses_is_shown_and_nothing_is_written(command: Command, fresh: Path) -> None:
    edit(fresh / SINK, "string customer = 1;", "strin customer = 1;")
    before = snapshot(fresh)
    code, _, err = command()
    assert code == 1
    assert re.search(r"^proto/kitchen/v1/sink.proto:\d+:\d+: cannot find `strin` in this scope \[COMPILE\]$", err, re.M)
    assert snapshot(fresh) == before


def test_a_syntax_error_has_the_form_of_all_errors(command: Command, fresh: Path) -> None:
    edit(fresh / SINK, "package kitchen.v1;", "package kitchen.v1")
    code, _, err = command()
    assert code == 1
    assert err.startswith("proto/kitchen/v1/sink.proto:")
    assert re.fullmatch(r"(proto/kitchen/v1/sink\.proto:\d+:\d+: [^ ].* \[COMPILE\]\n)+", err)


def test_a_plugin_that_fails_leaves_everything(command: Command, fresh: Path) -> None:
    edit(fresh / "buf.gen.yaml", '"python", "grpc_python", "mypy_grpc"', '"python", "cobol"')
    before = snapshot(fresh)
    code, _, err = command()
    assert code == 1
    assert 'unknown generator "cobol"' in err
    assert snapshot(fresh) == before


def test_without_buf_the_error_says_where_it_comes_from(
    command: Command, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(fresh / "bin/python"))
    monkeypatch.setenv("PATH", str(fresh))
    code, _, err = command()
    assert code == 1
    assert "buf is not installed" in err


@pytest.mark.parametrize("missing", ["buf.yaml", "buf.gen.yaml"])
def test_outside_a_workspace_the_error_says_so(command: Command, fresh: Path, missing: str) -> None:
    (fresh / missing).unlink()
    code, _, err = command()
    assert code == 1
    assert f"has no {missing}: start from the root of the repository" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.orki]\ncontracts = [", "packages/acme-kitchen/pyproject.toml: "),
        ('[tool.orki]\ncontract = ["a.v1"]\n', 'has no key "contract", only "api" and "contracts"'),
        ('[tool.orki]\ncontracts = "a.v1"\n', '"contracts" of [tool.orki] must be a list of proto packages'),
        ("[tool.orki]\ncontracts = [1]\n", '"contracts" of [tool.orki] must be a list of proto packages'),
    ],
)
def test_settings_that_cannot_be_read_are_refused(fresh: Path, text: str, message: str) -> None:
    (fresh / "packages/acme-kitchen/pyproject.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidSetting) as caught:
        find_workspace(fresh)
    assert message in caught.value.message


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--check" in said
    assert "nothing is written if there is an error" in " ".join(said.split())


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--chek"])
    assert caught.value.code == 2
    assert "--chek" in capsys.readouterr().err
