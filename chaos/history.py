"""The history of one run: every actor appends JSON lines to one file, and the checker reads them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One line: `t` (monotonic ns), `actor`, `event`, and fields of the event."""


class History:
    """Appends records to a history file.

    Each record is one `write` to a file opened with O_APPEND. Processes can share the file, and a record survives the
    death of its writer.
    """

    def __init__(self, path: Path, actor: str) -> None:
        self._actor = actor
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, event: str, **fields: Any) -> None:
        """Append one record."""
        record = {"t": time.monotonic_ns(), "actor": self._actor, "event": event, **fields}
        os.write(self._file, json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_history(path: Path) -> list[Record]:
    """Return the records of a file in the order of their time."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda record: int(record["t"]))
