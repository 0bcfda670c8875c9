"""Changes of signatures, annotations and metadata, and harmless changes beside them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from gate_trees import Tree
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from orki_codegen._gate.distributions import Member, Release, find_members
from orki_codegen._gate.findings import Finding
from orki_codegen._gate.python_api import api_findings
from orki_codegen._gate.signatures import normalised
from orki_codegen._gate.wheels import build_wheel, metadata_findings, release_of
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.findings import Bump

INIT = "acme-review/src/acme_review/__init__.py"
MODULE = "acme-review/src/acme_review/reviews.py"
NAMES = '''"""Reviews."""

from acme_review.reviews import Reviewer, connect, review

__all__ = ["Reviewer", "connect", "review"]
'''
SOURCE = '''"""Reviews."""
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Iterator, Optional, TypeAlias, Union

class _Base:
    def close(self) -> None: ...

class Reviewer(_Base):
    limit: int = 5
    Path: TypeAlias = str

    async def look(self, path: str) -> Optional[str]: ...

    def walk(self) -> "Iterator[str]":
        yield self.name

    @property
    def name(self) -> str: ...

    @name.setter
    def name(self, to: str) -> None: ...

    @classmethod
    def made(cls): ...

    async def _inner(self) -> int: ...

@dataclass
class _Hidden:
    size: int

@asynccontextmanager
async def connect(url: Union[str, None] = None):
    yield url

def review(path, deep=False):
    return path

async def hidden() -> int: ...
'''
TREE = Tree(versions={"acme-review": "1.4.0"}, sources={INIT: NAMES, MODULE: SOURCE})
CALLED, RETURNS, TAKES, IS = (
    "API_FUNCTION_CHANGED_KIND",
    "API_RETURN_CHANGED_TYPE",
    "API_PARAMETER_CHANGED_TYPE",
    "API_ATTRIBUTE_CHANGED_TYPE",
)


def member_of(root: Path) -> Member:
    return find_members(root)["acme-review"]


def as_users_have_it(root: Path) -> Release:
    member = member_of(root)
    return Release(
        name=member.name,
        version=member.version,
        origin="the baseline",
        packages=member.contracts,
        imports=(root / member.folder / "src",),
        extras=frozenset(member.extras),
        python=member.python,
    )


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return as_users_have_it(TREE.lay_out(tmp_path_factory.mktemp("gate") / "old"))


def changes(old: Release, root: Path, before: str, after: str) -> list[Finding]:
    TREE.edited(MODULE, before, after).lay_out(root)
    return api_findings(root, member_of(root), old, frozenset({"acme_review"}))


def first_line(text: str) -> int:
    return SOURCE[: SOURCE.index(text)].count("\n") + 1


@pytest.mark.parametrize(
    ("before", "after", "rule", "subject"),
    [
        ("async def look", "def look", CALLED, "acme_review.Reviewer.look"),
        ("def close", "async def close", CALLED, "acme_review.Reviewer.close"),
        ("def review(", "async def review(", CALLED, "acme_review.review"),
        ("@classmethod\n", "@staticmethod\n", CALLED, "acme_review.Reviewer.made"),
        ("@asynccontextmanager\n", "\n", CALLED, "acme_review.connect"),
        ("    return path\n", "    yield path\n", CALLED, "acme_review.review"),
        ("        yield self.name\n", "        return iter(self.name)\n", CALLED, "acme_review.Reviewer.walk"),
        ("Optional[str]:", "str:", RETURNS, "acme_review.Reviewer.look"),
        ('-> "Iterator[str]":', ":", RETURNS, "acme_review.Reviewer.walk"),
        ("name(self) -> str", "name(self) -> int", IS, "acme_review.Reviewer.name"),
        ("@property\n", "@classmethod\n", "API_OBJECT_CHANGED_KIND", ".Reviewer.name"),
        (
            "    @name.setter\n    def name(self, to: str) -> None: ...\n",
            "",
            "API_ATTRIBUTE_READ_ONLY",
            ".Reviewer.name",
        ),
        ("limit: int", "limit: float", IS, "acme_review.Reviewer.limit"),
        ("TypeAlias = str", "TypeAlias = bytes", IS, "acme_review.Reviewer.Path"),
        ("path: str)", "path: bytes)", TAKES, "acme_review.Reviewer.look"),
        ("Union[str, None] =", "Union[bytes, None] =", TAKES, "acme_review.connect"),
    ],
)
def test_a_changed_signature_is_major(
    old: Release, tmp_path: Path, before: str, after: str, rule: str, subject: str
) -> None:
    (finding,) = changes(old, tmp_path, before, after)
    assert (finding.rule, finding.bump) == (rule, Bump.MAJOR)
    assert finding.subject.endswith(subject)
    assert finding.location.file == f"packages/{MODULE}"
    named = subject.rpartition(".")[2]
    text = (tmp_path / finding.location.file).read_text(encoding="utf-8").splitlines()
    # A decorator's line counts as the first one.
    assert any(named in line for line in text[finding.location.line - 1 : finding.location.line + 1])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def review(path,", "def review(path: str,"),
        ("deep=False):", "deep=False) -> str:"),
        ("def made(cls):", "def made(cls) -> 'Reviewer':"),
        ("Optional[str]:", '"None | str":'),
        ('"Iterator[str]"', "Iterator[ str ]"),
        ("Union[str, None] =", "str | None ="),
        ("async def hidden() -> int", "def hidden() -> str"),
        ("async def _inner(self) -> int", "def _inner(self) -> str"),
        ("size: int", "size: str"),
        ("    return path\n", "    def inner():\n        yield path\n    return path\n"),
    ],
)
def test_an_equal_or_new_annotation_is_no_break(old: Release, tmp_path: Path, before: str, after: str) -> None:
    assert changes(old, tmp_path, before, after) == []


def test_a_finding_has_the_current_location(old: Release, tmp_path: Path) -> None:
    (finding,) = changes(old, tmp_path, "def review(", "# One.\n# Two.\nasync def review(")
    assert (finding.location.line, finding.location.column) == (first_line("def review(") + 2, 1)
    assert finding.message == "acme_review.review is called differently: def → async def"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Union[int, str]", "str | int", True),
        ("typing.List[typing.Optional[int]]", "list[None|int]", True),
        ("collections.abc.Callable[[int, 'str'], None]", "Callable[[int,str], None]", True),
        ("Literal['a', 'b']", "Literal['b'] | Literal['a']", True),
        ("Literal['a']", "Literal[a]", False),
        ("dict[str, int]", "dict[int, str]", False),
        ("tuple[int, ...]", "tuple[int]", False),
        ("Annotated[int, 'a']", "Annotated[int, 'b']", False),
        ("Annotated['int', 1]", "typing.Annotated[int, 1]", True),
    ],
)
def test_equivalent_annotations_are_equal(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) is same


TABLE = 'requires-python = ">=3.11"\n[project.optional-dependencies]\nfast_path = ["packaging"]\n[tool.orki]'


def with_table(root: Path, text: str) -> Path:
    file = TREE.lay_out(root) / "packages/acme-review/pyproject.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("[tool.orki]", text), encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        ("fast_path", "Fast-Path", []),
        ("fast_path", "quick", [("API_EXTRA_REMOVED", "fast-path", 7), ("API_EXTRA_ADDED", "quick", 8)]),
        ('fast_path = ["packaging"]\n', "", [("API_EXTRA_REMOVED", "fast-path", 7)]),
        (">=3.11", ">=3.12", [("API_PYTHON_REFUSED", "requires-python", 6)]),
        (">=3.11", ">=3.11,<3.14", [("API_PYTHON_REFUSED", "requires-python", 6)]),
        (">=3.11", ">=3.11.1", [("API_PYTHON_REFUSED", "requires-python", 6)]),
        (">=3.11", ">=3.10", []),
        ('requires-python = ">=3.11"\n', "", []),
    ],
)
def test_changes_of_metadata(tmp_path: Path, before: str, after: str, finding: list[tuple[str, str, int]]) -> None:
    former = with_table(tmp_path / "old", TABLE)
    member = member_of(with_table(tmp_path / "new", TABLE.replace(before, after)))
    found = list(metadata_findings(member, as_users_have_it(former)))
    assert [(each.rule, each.subject, each.location.line) for each in found] == finding
    for each in found:
        assert each.bump is (Bump.MINOR if each.rule == "API_EXTRA_ADDED" else Bump.MAJOR)


def test_a_wheel_and_its_sources_have_the_same_metadata(tmp_path: Path) -> None:
    tree = with_table(tmp_path / "tree", TABLE)
    wheel = build_wheel(tree, "packages/acme-review", tmp_path)
    release = release_of(wheel, tmp_path / "there", "acme-review", Version("1.4.0"), "the index")
    assert release.extras == frozenset({"fast-path"})
    assert release.python == SpecifierSet(">=3.11")
    assert list(metadata_findings(member_of(tree), release)) == []
    bad = tmp_path / f"bad-{wheel.name}"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"Requires-Python: >=", b"Requires-Python: no "))
    with pytest.raises(InvalidContract, match="metadata"):
        release_of(bad, tmp_path / "elsewhere", "acme-review", Version("1.4.0"), "the index")


def test_an_invalid_python_range_is_refused(tmp_path: Path) -> None:
    root = with_table(tmp_path, TABLE.replace(">=3.11", "three"))
    with pytest.raises(InvalidSetting, match=r"packages/acme-review/pyproject.toml.*three"):
        find_members(root)
