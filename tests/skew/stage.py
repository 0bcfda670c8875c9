"""The processes of one scenario, each in its own environment; all end with the scenario."""

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

ACTORS = Path(__file__).resolve().parent / "actors"
READY_SECONDS = 60.0
END_SECONDS = 40.0
_LAST_LINES = 12


class CaseFailed(Exception):
    """A pair did not behave as expected."""


class Actor:
    """A process that writes one JSON object per line."""

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
        """Return the value of the next line with one of these keys; with several keys, the whole line.

        Raises:
            CaseFailed: It ends or reports another outcome first, or the time is over.
        """
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise CaseFailed(f"{self.name} did not report {' or '.join(wanted)} within {seconds:.0f} s") from None
            if line is None:
                raise CaseFailed(f"{self.name} ended without {' or '.join(wanted)}: {self._tail()}")
            for key in wanted:
                if key in line:
                    return line[key] if len(wanted) == 1 else line
            for key in ("refused", "done"):
                if key in line:
                    raise CaseFailed(f"{self.name}: {key}: {_short(line[key])}")

    def end(self) -> None:
        """Close its input, which makes it drain."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def terminate(self) -> None:
        """Send SIGTERM and wait.

        Raises:
            CaseFailed: It does not end.
        """
        self._process.terminate()
        self._wait()

    def close(self) -> None:
        """End it, with a kill if needed."""
        self.end()
        try:
            self._wait()
        except CaseFailed:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout:
            self._process.stdout.close()

    def _wait(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise CaseFailed(f"{self.name} does not end: {self._tail()}") from None

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
        return " | ".join(lines[-_LAST_LINES:]) or "no output"


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
        """Start an actor with its instructions."""
        # -E and -s: variables and user packages must not replace the code of the wheels.
        command = [self._python(environment), "-E", "-s", str(ACTORS / f"{script}.py"), json.dumps(wanted)]
        return self._started(f"{script}-{environment}", command)

    def redis(self) -> str:
        """Start Redis for the event plane and the store; return its URL."""
        facts: dict[str, str] = self.actor("head-v2", "embedded").expect("ready")
        return facts["redis"]

    def server(self, environment: str, redis: str, *, listen: str = "127.0.0.1:0") -> tuple[Actor, str]:
        """Start an orchestrator; return it and its address."""
        command = [self._python(environment), "-E", "-s", "-m", "orki_server", "serve", "--json"]
        command += ["--listen", listen, "--redis", redis, "--drain-grace-ms", "100"]
        started = self._started(f"server-{environment}", command, orderly=True)
        return started, started.expect("address")

    def settled(self, address: str, *agents: str) -> None:
        """Wait until these agents have a session.

        Raises:
            CaseFailed: They do not get one.
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
