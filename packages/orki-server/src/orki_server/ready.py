"""One line that says that a command is ready: for people, for scripts, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orki_contract.errors import InvalidSetting

__all__ = ["announce_ready"]


def announce_ready(command: str, words: str, facts: dict[str, Any], as_json: bool, ready_file: Path | None) -> None:
    """Prints the one line of standard output that says that a command is ready, and writes it to a file.

    Raises:
        InvalidSetting: The file cannot be written.
    """
    text = json.dumps(facts)
    if ready_file is not None:
        # Whoever waits for the file must not read half of it.
        partial = ready_file.with_name(ready_file.name + ".partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(ready_file)
        except OSError as error:
            raise InvalidSetting(f"--ready-file {ready_file}: {error.strerror}") from error
    print(text if as_json else f"orki {command} ready: {words}", flush=True)
