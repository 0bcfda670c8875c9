"""The inputs of the version gate other than contracts: its two files, projects, versions and index settings."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from packaging.version import Version

from orki_codegen._gate.accepted import parse_accepted
from orki_codegen._gate.baseline import read_published
from orki_codegen._gate.distributions import find_members
from orki_codegen._gate.evaluate import heaviest, is_sufficient, least
from orki_codegen._gate.index import index_settings
from orki_contract.errors import InvalidSetting
from orki_contract.findings import Bump

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("base", "bump", "wanted"),
    [
        ("1.4.2", Bump.MAJOR, "2.0.0"),
        ("1.4.2", Bump.MINOR, "1.5.0"),
        ("1.4.2", Bump.PATCH, "1.4.3"),
        ("0.4.2", Bump.MAJOR, "0.5.0"),
        ("0.4.2", Bump.MINOR, "0.4.3"),
        ("0.4.2", Bump.PATCH, "0.4.3"),
        ("1.5.0rc1", Bump.PATCH, "1.5.0"),
    ],
)
def test_the_least_version(base: str, bump: Bump, wanted: str) -> None:
    assert least(Version(base), bump) == Version(wanted)
    assert is_sufficient(Version(wanted), Version(base), bump)
    assert not is_sufficient(Version(base), Version(base), bump)


def test_a_pre_release_counts_as_its_final_release() -> None:
    assert is_sufficient(Version("2.0.0rc1"), Version("1.4.2"), Bump.MAJOR)
    assert not is_sufficient(Version("1.5.0rc1"), Version("1.4.2"), Bump.MAJOR)
    assert not is_sufficient(Version("0.9.0"), Version("1.4.2"), Bump.PATCH)


def test_the_heaviest_bump_counts() -> None:
    assert heaviest([]) is Bump.PATCH
    assert heaviest([Bump.PATCH, Bump.MAJOR, Bump.MINOR]) is Bump.MAJOR


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("commit = ", "published.toml: "),
        (f'commit = "{COMMIT}"\nreason = "x"\nbranch = "main"\n', 'unknown key "branch"'),
        (f'commit = "{COMMIT}"\n', '"reason" is missing'),
        ('reason = "x"\n', '"commit" is missing'),
        ('commit = "main"\nreason = "x"\n', "the full id of a commit"),
        (f'commit = "{COMMIT}"\nreason = 3\n', '"reason" is missing or not a text'),
    ],
)
def test_a_wrong_published_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "published.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidSetting, match=message):
        read_published(tmp_path)


ENTRY = '[[break]]\nrule = "R"\nsubject = "s"\npackage = "Acme_Review"\nreason = "why"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[break]", "accepted-breaks.toml: "),
        ("[accept]\n", "only \\[\\[break\\]\\] tables are allowed"),
        ("break = [1]\n", "only \\[\\[break\\]\\] tables are allowed"),
        (f"{ENTRY}until = 2027-01-01\nwho = 'me'\n", 'accepted-breaks.toml:1:1: unknown key "who"'),
        (f"\n{ENTRY}", 'accepted-breaks.toml:2:1: "until" must be a date'),
        (f"{ENTRY}until = 'soon'\n", '"until" must be a date'),
        (f"{ENTRY}until = 2027-01-01T00:00:00\n", '"until" must be a date'),
        (ENTRY.replace('"why"', '" "') + "until = 2027-01-01\n", '"reason" is missing or not a text'),
        (f"{ENTRY}until = 2027-01-01\n" * 2, "R of s is accepted twice"),
    ],
)
def test_a_wrong_accepted_break_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        parse_accepted(text)


def test_accepted_breaks_are_read() -> None:
    (dated,) = parse_accepted(f"{ENTRY}until = 2027-01-01\n")
    assert (dated.key, dated.until) == (("R", "acme-review", "s"), date(2027, 1, 1))
    (versioned,) = parse_accepted(f'{ENTRY}until = "2.0.0"\n')
    assert versioned.until == Version("2.0.0")
    assert parse_accepted("# nothing\n") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[project", "packages/acme/pyproject.toml: "),
        ('[project]\nname = "acme"\ndynamic = ["version"]\n', "a static version"),
        ('[project]\nname = "acme"\nversion = "one"\n', "packages/acme/pyproject.toml: "),
        ('[project]\nname = "acme"\nversion = "1"\ndependencies = ["a b"]\n', '"a b" is not a valid requirement'),
    ],
)
def test_an_invalid_project_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "packages/acme/pyproject.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidSetting, match=message):
        find_members(tmp_path)


def test_projects_are_read(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one/pyproject.toml").write_text("[tool.x]\n", encoding="utf-8")
    text = '[project]\nname = "Acme.Two"\nversion = "1.2"\ndependencies = [\n  "acme_one>=1",\n]\n'
    (tmp_path / "two/pyproject.toml").write_text(text, encoding="utf-8")
    (member,) = find_members(tmp_path).values()
    assert (member.name, str(member.version), str(member.location)) == ("acme-two", "1.2", "two/pyproject.toml:3:1")
    assert [(each.name, str(each.location)) for each in member.dependencies] == [("acme-one", "two/pyproject.toml:5:4")]
    (tmp_path / "one/pyproject.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidSetting, match="are both called acme-two"):
        find_members(tmp_path)


def test_the_index_comes_from_the_settings_of_uv_and_pip(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "none")}
    assert index_settings(None, home).url.endswith("/simple/")
    assert index_settings("http://given/simple", {**home, "PIP_INDEX_URL": "http://pip/"}).url == "http://given/simple/"
    assert index_settings(None, {**home, "PIP_INDEX_URL": "http://pip"}).url == "http://pip/"
    both = {**home, "PIP_INDEX_URL": "http://pip/", "UV_DEFAULT_INDEX": "http://uv/"}
    assert index_settings(None, both).url == "http://uv/"
    (tmp_path / ".config/uv").mkdir(parents=True)
    (tmp_path / ".config/uv/uv.toml").write_text('[[index]]\nurl = "http://file"\ndefault = true\n', encoding="utf-8")
    assert index_settings(None, home).url == "http://file/"
    (tmp_path / ".config/uv/uv.toml").write_text("", encoding="utf-8")
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = http://conf/\ncert = /a.pem\n", encoding="utf-8")
    found = index_settings(None, {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")})
    assert (found.url, found.certificates) == ("http://conf/", "/a.pem")
    (tmp_path / "pip.conf").write_text("index-url\n", encoding="utf-8")
    with pytest.raises(InvalidSetting, match="pip's settings cannot be read"):
        index_settings(None, {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")})
