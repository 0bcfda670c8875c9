"""Tell how a publish goes: lines for whoever watches, a file for a program."""

from __future__ import annotations

__all__ = ["Report"]

import json
import sys
from collections.abc import Sequence

from nox_sessions.release.options import Options
from nox_sessions.release.plan import State, Step


class Report:
    """What was found, and what was done about it."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._steps: tuple[Step, ...] = ()
        self._uploaded: set[str] = set()

    def say(self, line: str) -> None:
        """Print a line at once, also into a pipe."""
        print(line, flush=True)

    def planned(self, steps: Sequence[Step]) -> None:
        """Print how each file stands to the index."""
        self._steps = tuple(steps)
        for step in steps:
            self.say(f"{step.file.name}: {step.state.value}")

    def uploading(self, number: int, total: int, step: Step) -> None:
        """Print which file goes out now."""
        self.say(f"[{number}/{total}] {step.file.name}")

    def uploaded(self, step: Step) -> None:
        """Note that the index took a file."""
        self._uploaded.add(step.file.name)

    def end(self, outcome: str, text: str, status: int) -> int:
        """Print how it ended, write the file if one was asked for, and return the status."""
        print(text, file=sys.stderr if status else sys.stdout, flush=True)
        if self._options.json is not None:
            document = {
                "outcome": outcome,
                "status": status,
                "text": text,
                "index": self._options.address.simple,
                "upload": self._options.address.upload,
                "dry_run": self._options.dry_run,
                "files": [self._entry(step) for step in self._steps],
            }
            self._options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return status

    def _entry(self, step: Step) -> dict[str, str | None]:
        states = {State.MISSING: "missing", State.SAME: "same", State.COPIES: "copies", State.OTHER: "other"}
        return {
            "distribution": step.release.name,
            "version": str(step.release.version),
            "file": step.file.name,
            "sha256": step.file.sha256,
            "before": states[step.state],
            "sha256_there": step.there,
            "now": "uploaded" if step.file.name in self._uploaded else states[step.state],
        }
