"""The code blocks of the docs work.

The README's generated file is current, and its other files type-check and run. The blocks of package pages and package
docstrings run against a real orchestrator and a real server.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orki_server.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- (proto|generated|file): (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
MARKED = {(kind, name): text for kind, name, text in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
FILES = [name for kind, name in MARKED if kind == "file"]
OWNER = '[project]\nname = "greenhouse"\nversion = "0.1.0"\n\n[tool.orki]\ncontracts = ["greenhouse.v1"]\n'


def run(folder: Path, *arguments: str, text: str = "", **environment: str) -> str:
    """Run this Python in a folder, with `text` as its input. Its output is the message if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def search_path(greenhouse: Path) -> str:
    """Return the PYTHONPATH with the generated code and the README's files."""
    return os.pathsep.join([str(greenhouse / "gen"), str(greenhouse / "src")])


@pytest.fixture(scope="module")
def greenhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a workspace with the README's proto, its generated code and the other files of the README."""
    root = tmp_path_factory.mktemp("greenhouse")
    for name in ("buf.yaml", "buf.gen.yaml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "proto/orki/options", root / "proto/orki/options")
    package = root / "packages/greenhouse"
    (package / "src").mkdir(parents=True)
    (package / "pyproject.toml").write_text(OWNER, encoding="utf-8")
    for (kind, name), text in MARKED.items():
        target = root / "proto" / name if kind == "proto" else package / "src" / name
        if kind != "generated":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    run(root, "-m", "orki_codegen.generate")
    return package


def test_the_generated_file_is_current(greenhouse: Path) -> None:
    shown = {name: text for (kind, name), text in MARKED.items() if kind == "generated"}
    assert shown
    for name, text in shown.items():
        assert (greenhouse / "gen" / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_readme_runs(greenhouse: Path, name: str) -> None:
    command = f"import {Path(name).stem}; print('done')"
    assert "done" in run(greenhouse, "-W", "error", "-c", command, PYTHONPATH=search_path(greenhouse))


def test_the_files_of_the_readme_pass_mypy(greenhouse: Path) -> None:
    roots = [str(greenhouse / "gen"), str(greenhouse / "src")]
    installed = sorted(str(path) for path in ROOT.glob("packages/*/[gs][er][nc]"))
    search = {"MYPYPATH": os.pathsep.join([*roots, *installed])}
    options = ["--strict", "--namespace-packages", "--explicit-package-bases", "--follow-imports", "silent"]
    assert "Success" in run(greenhouse, "-m", "mypy", *options, *roots, **search)


PACKAGES = ("orki_agent", "orki_contract", "orki_control", "orki_events", "orki_server")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# The blocks may use `await` outside of a function, as the asyncio REPL does.
RUN = """\
import ast, asyncio, inspect, sys, types
main = sys.modules["__main__"]
code = compile(sys.stdin.read(), "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
result = types.FunctionType(code, main.__dict__)()
if inspect.iscoroutine(result):
    asyncio.run(result)
"""


def blocks() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each block."""
    for package in PACKAGES:
        page = ROOT / "packages" / package.replace("_", "-") / "README.md"
        texts = {f"{package}-page": page.read_text(encoding="utf-8")}
        texts[f"{package}-docstring"] = importlib.import_module(package).__doc__ or ""
        for name, text in texts.items():
            found = PYTHON.findall(text)
            assert found, f"{name} has no Python block"
            yield from ((f"{name}-{number}", block) for number, block in enumerate(found, 1))


BLOCKS = dict(blocks())


def wait_for_json(path: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Return the object that a process writes when it is ready."""
    limit = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert process.poll() is None, "the process ended"
        assert time.monotonic() < limit, "the process was not ready within 30 s"
        time.sleep(0.05)
    ready: dict[str, str] = json.loads(path.read_text())
    return ready


@pytest.fixture(scope="module")
def addresses(greenhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The README's agent under a real orchestrator; returns the addresses that replace those of the blocks."""
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer())
        environment = {**os.environ, "PYTHONPATH": search_path(greenhouse)}

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen([sys.executable, "-m", *arguments], env=environment)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            return process

        ready = folder / "ready.json"
        listen = ("--listen", "127.0.0.1:0", "--ready-file", str(ready))
        serve = start("orki_server", "serve", "--redis", server.url, *listen)
        address = str(wait_for_json(ready, serve)["address"])
        start("orki_agent", "run", "gardener:agent", "--orchestrator", address)
        waiting = f"""
import time
from orki_control import Client
async with Client({address!r}) as orki:
    while not await orki.list_agents():
        time.sleep(0.1)
"""
        run(greenhouse, "-c", RUN, text=waiting)
        yield {"127.0.0.1:50051": address, "redis://127.0.0.1:6379/0": server.url}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_a_package_runs(name: str, greenhouse: Path, addresses: dict[str, str]) -> None:
    text = BLOCKS[name]
    for shown, real in addresses.items():
        text = text.replace(shown, real)
    # A task in the background may fail without ending the process.
    assert "Traceback" not in run(greenhouse, "-c", RUN, text=text, PYTHONPATH=search_path(greenhouse))
