"""The commands of docs/security.md work, in the order of the page."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orki_server.embedded import EmbeddedServer

PAGE = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (?:run|file): (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))


def environment(redis_url: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ORKI_REDIS_URL": redis_url}


def shell(folder: Path, text: str, redis_url: str) -> str:
    done = subprocess.run(
        ["bash", "-eu", "-c", text],
        cwd=folder,
        env=environment(redis_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def served(folder: Path, text: str, redis_url: str, port: int) -> Iterator[None]:
    command = "exec " + text.replace("50051", str(port)) + " --json"
    process = subprocess.Popen(
        ["bash", "-c", command.replace("\n", " ")], cwd=folder, env=environment(redis_url), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the orchestrator did not start"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    assert set(BLOCKS) == {"certificates", "serve", "agents", "tokens", "serve-tokens", "agents-tokens", "policy.toml"}
    (tmp_path / "policy.toml").write_text(BLOCKS["policy.toml"], encoding="utf-8")
    with EmbeddedServer() as store:
        shell(tmp_path, BLOCKS["certificates"], store.url)
        shell(tmp_path, BLOCKS["tokens"], store.url)
        for serve, agents in (("serve", "agents"), ("serve-tokens", "agents-tokens")):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            with served(tmp_path, BLOCKS[serve], store.url, port):
                began = time.monotonic()
                output = shell(tmp_path, BLOCKS[agents].replace("50051", str(port)), store.url)
                assert time.monotonic() - began < 50
                assert "refuse" not in output
