"""Child processes of the demo: started together, ended in order, never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Child", "ChildFailed", "wait_for_file"]


class ChildFailed(Exception):
    """A child process did not do what it is there for; the message holds the end of its log."""


class Child:
    """One process with a log of its own.

    Args:
        name: For messages.
        module: Python module that it runs.
        arguments: Its command line behind the module.
        log: File that takes what it prints.
        environment: Variables that it gets beside those of this process.
    """

    def __init__(
        self, name: str, module: str, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # Ctrl-C at the terminal reaches the demo alone, which then ends its children in order.
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises `ChildFailed` if the process has ended."""
        if (code := self.process.poll()) is not None:
            tail = self.log.read_text(errors="replace")[-2_000:]
            raise ChildFailed(f"{self.name} ended with {code}; the end of {self.log}:\n{tail}")

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to this very process."""
        self.process.send_signal(number)

    def stop(self, timeout: float = 20.0) -> int:
        """Asks the process to end in good order, kills it after `timeout` seconds; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(timeout)


def wait_for_file(path: Path, child: Child, timeout: float = 30.0) -> dict[str, Any]:
    """The JSON object that a child writes to `path` once it is ready.

    Raises:
        ChildFailed: The child has ended, or was not ready within `timeout` seconds.
    """
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            ready: dict[str, Any] = json.loads(text)
            return ready
        child.check()
        time.sleep(0.02)
    raise ChildFailed(f"{child.name} was not ready within {timeout:.0f} s; its log is {child.log}")
