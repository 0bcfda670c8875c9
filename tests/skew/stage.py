"""Processes of one scenario: each in an environment of its own, all gone when the scenario is over."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Actor", "Stage", "Wrong"]

ACTORS = Path(__file__).resolve().parent / "actors"
READY_SECONDS = 60.0
END_SECONDS = 40.0
_LAST_LINES = 12


class Wrong(Exception):
    """A pair does not do what it must; the text says what was seen instead."""


class Actor:
    """A process that writes one JSON object a line."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def expect(self, *wanted: str, seconds: float = READY_SECONDS) -> Any:
        """The value of the next line that has one of these keys; with several keys, the whole line.

        Raises:
            Wrong: It ended without one, says something else at last, or takes too long.
        """
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise Wrong(f"{self.name} said no {' or '.join(wanted)} within {seconds:.0f} s") from None
            if line is None:
                raise Wrong(f"{self.name} ended without a word of {' or '.join(wanted)}: {self._tail()}")
            for key in wanted:
                if key in line:
                    return line[key] if len(wanted) == 1 else line
            for key in ("refused", "done"):
                if key in line:
                    raise Wrong(f"{self.name}: {key}: {_short(line[key])}")

    def end(self) -> None:
        """Ends its input, on which it drains; killed where it does not."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def terminate(self) -> None:
        """Ends it by SIGTERM, and waits.

        Raises:
            Wrong: It does not end.
        """
        self._process.terminate()
        self._wait()

    def close(self) -> None:
        """Ends it in any way; harmless when it has ended."""
        self.end()
        try:
            self._wait()
        except Wrong:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout:
            self._process.stdout.close()

    def _wait(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise Wrong(f"{self.name} does not end: {self._tail()}") from None

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    self._lines.put(found)
        self._lines.put(None)

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(lines[-_LAST_LINES:]) or "it wrote nothing"


class Stage:
    """The processes of one scenario.

    Args:
        environments: The interpreter of each environment, by `SIDE-CONTRACT`.
    """

    def __init__(self, environments: Mapping[str, str]) -> None:
        self._environments = environments
        self._stack = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="orki-skew-")))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def actor(self, environment: str, script: str, /, **wanted: Any) -> Actor:
        """Starts an actor; what it is to do goes with it."""
        # -E and -s: no variable of the caller's and nothing of the user's own leads to other code than the wheels'.
        command = [self._python(environment), "-E", "-s", str(ACTORS / f"{script}.py"), json.dumps(wanted)]
        return self._started(f"{script}-{environment}", command)

    def redis(self) -> str:
        """Starts a server of the event plane and of the store; its URL."""
        facts: dict[str, str] = self.actor("head-v2", "embedded").expect("ready")
        return facts["redis"]

    def server(self, environment: str, redis: str, *, listen: str = "127.0.0.1:0") -> tuple[Actor, str]:
        """Starts an orchestrator; it, and where it listens."""
        command = [self._python(environment), "-E", "-s", "-m", "orki_server", "serve", "--json"]
        command += ["--listen", listen, "--redis", redis, "--drain-grace-ms", "100"]
        started = self._started(f"server-{environment}", command, orderly=True)
        return started, started.expect("address")

    def settled(self, address: str, *agents: str) -> None:
        """Returns once these agents have a session.

        Raises:
            Wrong: They have not.
        """
        watcher = self.actor("head-v2", "submitter", orchestrator=address, agents=agents, first=0, count=0, linger=0.0,
                             patience=30.0, prune=False)  # fmt: skip
        watcher.expect("done")

    def _python(self, environment: str) -> str:
        return self._environments[environment]

    def _started(self, name: str, command: list[str], *, orderly: bool = False) -> Actor:
        self._count += 1
        actor = Actor(f"{name}-{self._count}", command, self._folder)
        self._stack.callback(actor.close)
        if orderly:
            self._stack.callback(actor.terminate)
        return actor


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 600 else f"{text[:600]}…"
