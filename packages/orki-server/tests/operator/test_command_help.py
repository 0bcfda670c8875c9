"""`orki --help` and completion: what they say, and what they import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from orki_server._cli.formats import counted, sentence
from orki_server._cli.root import LazyGroup, root

_HEAVY = ("aiohttp", "grpc", "prometheus_client", "redis")


def commands(group: click.Group = root, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every command, groups included."""
    context = click.Context(group)
    found: list[tuple[str, ...]] = [prefix]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += commands(command, (*prefix, name)) if isinstance(command, click.Group) else [(*prefix, name)]
    return found


def heavy_imports(arguments: tuple[str, ...], **environment: str) -> list[str]:
    """Run `orki` in a fresh interpreter and return the heavy libraries that it imported."""
    code = (
        "import sys\n"
        "from orki_server._cli.root import root\n"
        "try: root(sys.argv[1:], prog_name='orki')\n"
        "except SystemExit: pass\n"
        f"print('IMPORTED', *(each for each in {_HEAVY!r} if each in sys.modules))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env={**os.environ, **environment},
    )
    *shown, last = ended.stdout.splitlines()
    assert shown
    assert last.startswith("IMPORTED")
    return last.split()[1:]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_imports_no_heavy_library(path: tuple[str, ...]) -> None:
    assert heavy_imports((*path, "--help")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "agents --orchestrator BAD",
        "cancel t0-00000000000000000000000000 --orchestrator BAD",
        "contract list --redis BAD",
        "contract withdraw a.v1.B --redis BAD",
        "doctor --orchestrator BAD",
        "doctor --redis BAD",
        "observe audit audit.jsonl --redis BAD",
        "observe feed --redis BAD",
        "observe metrics --redis BAD",
        "serve --redis BAD",
        "streams --redis BAD",
        "streams --watch --redis BAD",
        "streams dead tasks audit --redis BAD",
        "streams tail tasks --redis BAD",
        "streams tune tasks --reset --redis BAD",
        "submit Do {} --orchestrator BAD",
        "tasks --orchestrator BAD",
        "tasks --watch --orchestrator BAD",
        "trace t0-00000000000000000000000000 --redis BAD",
        "up --redis BAD",
        "up --redis redis://h/0?Un=known",
    ],
)
def test_an_invalid_setting_is_one_line_and_exit_code_2(arguments: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "orki_server", *arguments.split()],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert ended.stderr.startswith("orki: ")


@pytest.mark.parametrize(
    ("words", "position"), [("orki ", 1), ("orki st", 1), ("orki tasks --", 2), ("orki observe ", 2)]
)
def test_completion_imports_no_heavy_library(words: str, position: int) -> None:
    environment = {"_ORKI_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    assert heavy_imports((), **environment) == []


def test_completion_lists_every_command() -> None:
    names = {each.value for each in root.shell_complete(click.Context(root), "")}
    assert names == set(root.list_commands(click.Context(root)))
    assert [each.value for each in root.shell_complete(click.Context(root), "st")] == ["streams"]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_shows_an_example_and_describes_every_option(path: tuple[str, ...]) -> None:
    command: click.Command = root
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    assert command.help
    text = CliRunner().invoke(root, [*path, "--help"]).output
    assert "Example" in text or isinstance(command, LazyGroup)
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert option.help.split("  [")[0].endswith("."), option.help


def test_root_help_explains_the_exit_codes(command: Callable[..., Any]) -> None:
    ended = command("--help")
    assert ended.returncode == 0
    for text in ("Exit codes:", "0  success", "1  the operation was refused or failed", "2  wrong usage"):
        assert text in ended.stdout


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(0, "task", "0 tasks"), (1, "task", "1 task"), (1, "entry", "1 entry"), (2000, "entry", "2,000 entries")],
)
def test_a_count_has_its_noun_in_the_right_number(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text


@pytest.mark.parametrize("text", ["it failed", "it failed.", "it failed..", "it failed. "])
def test_a_sentence_ends_with_one_full_stop(text: str) -> None:
    assert sentence(text) == "it failed."
