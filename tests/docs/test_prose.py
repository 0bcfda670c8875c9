"""The docs name only existing files, modules, sessions and commands, and define their terms in the glossary."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "packages/*/*.md", "codegen/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
)

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"\.?[\w*-][\w.*-]*(/[\w.*-]+)*/?")
# A service and method, as in `greenhouse.v1.WateringService/WaterBed`.
METHOD = re.compile(r"[\w.]+\.[A-Z]\w*/[A-Z]\w*")
SUFFIXES = (".binpb", ".c", ".j2", ".lua", ".md", ".proto", ".py", ".toml", ".txt", ".yaml", ".yml")
NOT_WALKED = {".git", ".nox", ".noxw", ".venv", "__pycache__", "dist", "node_modules"}
SESSION = re.compile(r"nox(?:w)? (?:-s|--session) +([\w-]+(?: +(?!--)[\w-]+)*)")
RUN_MODULE = re.compile(r"\bpython -m ([\w.]+)")
NAME = re.compile(r"(?:orki|orki_\w+|nox_sessions|benchmarks|chaos|review_fleet|sourcereview)(?:\.\w+)+")
COMMAND = re.compile(r"(?:\$ )?(orki(?:-agent|-codegen|-contract)?) ([^#]+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
ANCHOR = re.compile(r'<a id="([\w-]+)"></a>')
TERM = re.compile(r'- <a id="([\w-]+)"></a>\*\*([\w -]+)\*\*: \S.*\.')


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def tree() -> frozenset[str]:
    """Return every file and folder of the workspace by each tail of its path, since prose rarely gives the whole."""
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
    """Return the names of the sessions in noxfile.py."""
    body = ast.parse(read("noxfile.py")).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    return frozenset(
        node.name for node in functions if any("nox.session" in ast.unparse(each) for each in node.decorator_list)
    )


def code_in(text: str) -> list[str]:
    """Return the text of each pair of backticks outside of fenced blocks."""
    return CODE.findall(FENCE.sub("", text))


def named_paths(text: str) -> list[str]:
    """Return the paths in backticks: those with a slash or the suffix of a file."""
    return [
        word
        for word in code_in(text)
        if PATH.fullmatch(word)
        and not METHOD.fullmatch(word)
        and ("/" in word or word.endswith(SUFFIXES))
        and word not in SUFFIXES
    ]


def path_exists(word: str) -> bool:
    """Return whether a file or folder has this name, or git ignores it by name; `*` matches any part of a name."""
    if word.lstrip("/") in {line.lstrip("/") for line in read(".gitignore").splitlines()}:
        return True
    wanted = re.compile(re.escape(word.rstrip("/").removeprefix("./")).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
    return any(wanted.fullmatch(path) for path in tree())


def named_modules(text: str) -> list[str]:
    """Return the dotted names in backticks that begin with a package of this repository."""
    words = (word.partition("(")[0] for word in code_in(text))
    return [word for word in words if NAME.fullmatch(word) and not word.endswith(SUFFIXES)]


def name_exists(name: str) -> bool:
    """Return whether a dotted name is a module, a proto package or declaration, or an attribute of a module."""
    if name.startswith("orki.") and (name in protos() or re.search(rf"\b{name.rpartition('.')[2]}\b", protos())):
        return True
    module, rest = name, ""
    while True:
        try:
            if importlib.util.find_spec(module) is not None:
                break
        except ModuleNotFoundError:
            pass
        module, _, last = module.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
        if not module:
            return False
    value = importlib.import_module(module)
    for attribute in filter(None, rest.split(".")):
        if not hasattr(value, attribute):
            return False
        value = getattr(value, attribute)
    return True


@cache
def protos() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("proto/**/*.proto")))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page: those of its headings, as GitHub names them, and its `<a id>`."""
    text = read(page)
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text))
    return {*headings, *ANCHOR.findall(text)}


def links(page: str) -> list[tuple[str, str]]:
    """Return the target and the anchor of each link of a page to another file of the repository or to itself."""
    found = []
    for link in LINK.findall(FENCE.sub("", read(page))):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = (ROOT / page).parent / target if target else ROOT / page
            found.append((path.resolve().relative_to(ROOT).as_posix(), anchor))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_each_path_exists(page: str) -> None:
    missing = [word for word in named_paths(read(page)) if not path_exists(word)]
    assert not missing, f"{page} names paths that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_each_module_and_attribute_exists(page: str) -> None:
    text = read(page)
    missing = [name for name in [*named_modules(text), *RUN_MODULE.findall(text)] if not name_exists(name)]
    assert not missing, f"{page} names modules that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_each_session_exists(page: str) -> None:
    named = {name for names in SESSION.findall(read(page)) for name in names.split()}
    assert named <= sessions(), f"{page} names sessions that noxfile.py does not have: {sorted(named - sessions())}"


@cache
def help_of(*command: str) -> str:
    """Return the help of a command, or nothing if it does not exist."""
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def named_commands(text: str) -> set[tuple[str, str]]:
    """Return program and arguments of each command of orki in backticks or at the start of a line of a fenced block."""
    fenced = [line for match in FENCE.finditer(text) for line in match[0].splitlines()]
    matches = (COMMAND.match(line) for line in [*code_in(text), *fenced])
    return {(match[1], match[2].strip()) for match in matches if match}


def test_each_command_and_option_exists() -> None:
    named = {command for page in PAGES for command in named_commands(read(page))}
    assert ("orki", "up") in named
    for program, arguments in sorted(named):
        words = [word for word in arguments.partition(" / ")[0].split() if re.fullmatch("[a-z][a-z-]*", word)]
        text = (words[1:] and help_of(program, *words[:2])) or help_of(program, *words[:1])
        missing = [option for option in re.findall(r"--[a-z][a-z-]*", arguments) if option not in text]
        assert text, f"the docs name `{program} {arguments}`, which does not exist"
        assert not missing, f"the docs name `{program} {arguments}`, which does not have {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_page_and_an_anchor(page: str) -> None:
    for target, anchor in links(page):
        assert (ROOT / target).exists(), f"{page} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page} links to {target}#{anchor}, which does not exist"


def test_each_term_is_one_line_in_alphabetical_order() -> None:
    lines = [line for line in read("docs/glossary.md").splitlines() if line.startswith("- ")]
    terms = [match.groups() for line in lines if (match := TERM.fullmatch(line))]
    assert len(terms) == len(lines), 'a term has the form `- <a id="…"></a>**…**: ….`'
    assert [anchor for anchor, _ in terms] == [term.replace(" ", "-") for _, term in terms]
    assert [term for _, term in terms] == sorted({term for _, term in terms})


def test_each_term_is_linked() -> None:
    linked = {anchor for page in PAGES for target, anchor in links(page) if target == "docs/glossary.md"}
    assert not anchors("docs/glossary.md") - linked - {"glossary"}


def test_missing_names_are_detected() -> None:
    assert named_paths("See `packages/orki-gone/src`, `gone.py` and `and so on`.\n```\n`not/this`\n```\n") == [
        "packages/orki-gone/src",
        "gone.py",
    ]
    assert not path_exists("packages/orki-gone/src")
    assert path_exists("nox_sessions/workspace.py")
    assert path_exists("packages/*/README.md")
    assert named_modules("`orki_control.gone` and `orki_events.connect(URL)`") == [
        "orki_control.gone",
        "orki_events.connect",
    ]
    assert not name_exists("orki_control.gone")
    assert not name_exists("orki_control.Client.gone")
    assert name_exists("orki_control.session")
    assert name_exists("orki_contract.transitions.Transitions")
    assert name_exists("orki.events.v1")
    assert "lint" in sessions()
