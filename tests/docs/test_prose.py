"""The prose names only what exists: each path in backticks, each session of nox."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md")
    for path in ROOT.glob(pattern)
)

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"\.?[\w*-][\w.*-]*(/[\w.*-]+)*/?")
METHOD = re.compile(r"[\w.]+\.[A-Z]\w*/[A-Z]\w*")
"""A service and method, as they travel: no path."""
SUFFIXES = (".binpb", ".md", ".proto", ".py", ".toml", ".txt", ".yaml", ".yml")
NOT_WALKED = {".git", ".nox", ".noxw", ".venv", "__pycache__", "dist", "node_modules"}
SESSION = re.compile(r"nox(?:w)? (?:-s|--session) +([\w-]+(?: +(?!--)[\w-]+)*)")


@cache
def tree() -> frozenset[str]:
    """Every file and folder of the workspace by each tail of its path, since prose rarely gives the whole."""
    found: set[str] = set()
    folders = [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if path.name in NOT_WALKED:
                continue
            parts = path.relative_to(ROOT).parts
            found.update("/".join(parts[start:]) for start in range(len(parts)))
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
    return frozenset(found)


@cache
def sessions() -> frozenset[str]:
    """The names of the sessions, read from noxfile.py."""
    body = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return frozenset(
        node.name for node in functions if any("nox.session" in ast.unparse(each) for each in node.decorator_list)
    )


def named_paths(text: str) -> list[str]:
    """The paths that a page names in backticks, outside its fenced blocks: what has a slash, or ends like a file."""
    words = CODE.findall(FENCE.sub("", text))
    return [
        word
        for word in words
        if PATH.fullmatch(word)
        and not METHOD.fullmatch(word)
        and ("/" in word or word.endswith(SUFFIXES))
        and word not in SUFFIXES
    ]


def exists(word: str) -> bool:
    """Tell whether some file or folder goes by this name, or git ignores it by name; `*` stands for any part of one."""
    if word.lstrip("/") in {
        line.lstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    }:
        return True
    wanted = re.compile(re.escape(word.rstrip("/").removeprefix("./")).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
    return any(wanted.fullmatch(path) for path in tree())


@pytest.mark.parametrize("page", PAGES)
def test_each_path_named_exists(page: str) -> None:
    missing = [word for word in named_paths((ROOT / page).read_text(encoding="utf-8")) if not exists(word)]
    assert not missing, f"{page} names what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_each_session_named_exists(page: str) -> None:
    named = {name for names in SESSION.findall((ROOT / page).read_text(encoding="utf-8")) for name in names.split()}
    assert named <= sessions(), f"{page} names sessions that noxfile.py has not: {sorted(named - sessions())}"


def test_a_missing_path_is_noticed() -> None:
    assert named_paths("See `packages/orki-gone/src`, `gone.py` and `and so on`.\n```\n`not/this`\n```\n") == [
        "packages/orki-gone/src",
        "gone.py",
    ]
    assert not exists("packages/orki-gone/src")
    assert exists("nox_sessions/workspace.py")
    assert exists("packages/*/README.md")
    assert "lint" in sessions()
