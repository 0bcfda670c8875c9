"""Every rule of contracts has a fragment that breaks it, and the error stands where the fragment says.

A fragment is a proto file with one quirk, named after the rule that it breaks. Comments in it steer the test:

    // file: acme/v1/x.proto             what follows is a file of its own, up to the next such line
    // error 5                           the violation is reported for the next line, at this column
    // error packages/x/pyproject.toml:5:14    or at this place
    // owner packages/x: acme.v1         a distribution and what it owns; else one owns all
    // newer NAME = 7 in Enum            the options are newer than the generator: an enum has one more value
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from orki_codegen._workspace import find_workspace
from orki_codegen.generate import generate, main
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract
from orki_contract.validate import RULES, Violation

ROOT = Path(__file__).resolve().parents[2]
FRAGMENTS = sorted(Path(__file__).with_name("fragments").glob("*.proto"))
OPTIONS = ROOT / "proto/orki/options/v1/options.proto"

LINE = re.compile(r"(?P<place>\S+?:\d+:\d+): (?P<message>.+) \[(?P<rule>[A-Z0-9_]+)\]")


def plant(root: Path, *fragments: Path) -> list[str]:
    """Lays a workspace out that holds the fragments, and returns the places where errors are expected."""
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, root)
    options = OPTIONS.read_text(encoding="utf-8")
    owners: dict[str, list[str]] = {}
    expected: list[str] = []
    packages: set[str] = set()
    for fragment in fragments:
        text = fragment.read_text(encoding="utf-8")
        for value, enum in re.findall(r"^// newer (.+) in (\w+)$", text, re.MULTILINE):
            options = re.sub(rf"(enum {enum} {{.*?)\n}}", rf"\1\n  {value};\n}}", options, flags=re.DOTALL)
        for folder, owned in re.findall(r"^// owner (\S+?):(.*)$", text, re.MULTILINE):
            owners[folder] = [each.strip() for each in owned.split(",") if each.strip()]
        expected += re.findall(r"^// error (\S+:\d+:\d+)$", text, re.MULTILINE)
        for path, content in sections(fragment.stem, text):
            place = root / "proto" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8")
            packages.add(re.findall(r"^package (.+);$", content, re.MULTILINE)[0])
            for number, line in enumerate(content.splitlines(), 1):
                if marker := re.fullmatch(r"\s*// error (\d+)", line):
                    expected.append(f"proto/{path}:{number + 1}:{marker[1]}")
    home = root / "proto/orki/options/v1"
    home.mkdir(parents=True)
    (home / "options.proto").write_text(options, encoding="utf-8")
    for folder, owned in (owners or {"packages/acme": sorted(packages)}).items():
        (root / folder).mkdir(parents=True)
        contracts = ", ".join(f'"{each}"' for each in owned)
        project = f'[project]\nname = "{Path(folder).name}"\n\n[tool.orki]\ncontracts = [{contracts}]\n'
        (root / folder / "pyproject.toml").write_text(project, encoding="utf-8")
    return expected


def sections(stem: str, text: str) -> list[tuple[str, str]]:
    """Path and text of each file in a fragment."""
    parts = re.split(r"^// file: (\S+)\n", text, flags=re.MULTILINE)
    if len(parts) == 1:
        package = re.findall(r"^package (.+);$", text, re.MULTILINE)[0]
        return [(f"{package.replace('.', '/')}/{stem.lower()}.proto", text)]
    return list(zip(parts[1::2], parts[2::2], strict=True))


def refused(root: Path) -> list[tuple[str, str]]:
    """Rule and place of every violation that the generator reports for a workspace, in its order."""
    with pytest.raises(InvalidContract) as caught:
        generate(find_workspace(root), lambda line: None)
    found = [LINE.fullmatch(line) for line in caught.value.message.splitlines()]
    return [(line["rule"], line["place"]) for line in found if line]


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.stem)
def test_a_fragment_breaks_its_rule_where_it_says(fragment: Path, tmp_path: Path) -> None:
    expected = plant(tmp_path, fragment)
    rule = re.sub(r"_\d+$", "", fragment.stem)
    assert refused(tmp_path) == [(rule, place) for place in expected]


def test_each_rule_has_a_fragment_and_each_fragment_a_rule() -> None:
    assert {re.sub(r"_\d+$", "", fragment.stem) for fragment in FRAGMENTS} == set(RULES)


def test_rule_ids_and_purposes_have_the_shape_that_buf_asks_for() -> None:
    for rule, purpose in RULES.items():
        assert re.fullmatch(r"[A-Z0-9][A-Z0-9_]*[A-Z0-9]", rule)
        assert 3 <= len(rule) <= 64
        assert re.fullmatch(r"[A-Z].*[.]", purpose)


def test_several_errors_are_shown_at_once_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = {fragment.stem: fragment for fragment in FRAGMENTS}
    names = ["ORKI_GROUP_UNIQUE_3", "ORKI_FRAME_FIELD_OVERLAP", "ORKI_TOOL_OPCODE", "ORKI_NAME_MODULE"]
    expected = plant(tmp_path, *(by_name[name] for name in names))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 1
    said = capsys.readouterr().err
    found = [LINE.fullmatch(line) for line in said.splitlines()]
    assert sorted(line["place"] for line in found if line) == sorted(expected)
    assert f"{len(expected)} violations: nothing was written" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_twice_is_told_at_each_place_with_the_other(tmp_path: Path) -> None:
    by_name = {fragment.stem: fragment for fragment in FRAGMENTS}
    first, second = plant(tmp_path, by_name["ORKI_STREAM_NAME_UNIQUE_2"])
    with pytest.raises(InvalidContract) as caught:
        generate(find_workspace(tmp_path), lambda line: None)
    one, other, _ = caught.value.message.splitlines()
    assert one.startswith(f'{first}: stream "events" is also declared at {second}')
    assert other.startswith(f'{second}: stream "events" is also declared at {first}')


def test_a_violation_names_its_place_and_says_what_to_do() -> None:
    place = Location("proto/acme/x.proto", 12, 3)
    violation = Violation(place, "ORKI_FRAME_FIELD_OVERLAP", 'frame field "flags" overlaps "kind" (bytes 2..3)')
    assert str(violation) == (
        'proto/acme/x.proto:12:3: frame field "flags" overlaps "kind" (bytes 2..3) [ORKI_FRAME_FIELD_OVERLAP]'
    )
