"""The audit log's file: JSON lines, appended, each event once.

Every line begins with `{"event_id":"` and 32 hex digits, so that what is already written can be found without parsing.
What makes a line appear once although the process may be killed at any instant:

- A batch of lines is written and, with `Fsync.BATCH`, synced before `append` returns; only then may its events be
  acknowledged. An event that was never acknowledged comes again.
- `open` reads the ids at the end of the file, and `append` leaves out what it has seen. An event is recognised as long
  as fewer than `remember` others were written since.
- A last line without its newline was torn by a crash. Its event was never acknowledged, so `open` cuts it off.
- A lock on the file keeps a second writer away.
"""

from __future__ import annotations

__all__ = ["AuditLog", "AuditLogSettings", "Fsync"]

import contextlib
import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from orki_contract.errors import InvalidSetting, OrkiError

_START: Final = b'{"event_id":"'
_DIGITS: Final = 32
_HEX: Final = frozenset(b"0123456789abcdef")
_BLOCK: Final = 1 << 18


class Fsync(StrEnum):
    """When lines are forced to the disk.

    BATCH: Before their events are acknowledged; survives a power cut. NEVER: When the operating system likes; survives
    the death of the process, not of the machine.
    """

    BATCH = "batch"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLogSettings:
    """How the log is kept.

    Attributes:
        path: The file; its folder must exist.
        fsync: When lines are forced to the disk.
        remember: Ids kept in memory to recognise an event that comes again, at least 1000.
    """

    path: Path
    fsync: Fsync = Fsync.BATCH
    remember: int = 200_000

    def __post_init__(self) -> None:
        if self.remember < 1000:
            raise InvalidSetting(f"remember is {self.remember}; give 1000 or more")


class AuditLog:
    """An open audit log. Not for several threads at once."""

    def __init__(self, settings: AuditLogSettings) -> None:
        self._settings = settings
        self._descriptor = -1
        self._seen: OrderedDict[str, None] = OrderedDict()

    def open(self) -> int:
        """Locks the file, heals its end and learns what it holds.

        Returns:
            Bytes of a torn last line that were cut off; mostly 0.

        Raises:
            InvalidSetting: The file cannot be opened, or another process writes it.
        """
        path = self._settings.path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidSetting(
                f"{path} cannot be opened for appending: {error.strerror}; give another file"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            torn = self._heal()
            self._seen = OrderedDict.fromkeys(reversed(list(self._last_ids())))
        except OSError as error:
            self.close()
            why = "another process writes it" if isinstance(error, BlockingIOError) else str(error.strerror)
            raise InvalidSetting(f"{path} cannot be used: {why}; give each audit observer a file of its own") from error
        return torn

    def close(self) -> None:
        """Closes the file; harmless when it is closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def append(self, lines: Sequence[tuple[str, str]]) -> int:
        """Writes the lines whose events are not in the file yet; all of them are on the disk when it returns.

        Args:
            lines: Event id (32 hex digits) and line (without newline, beginning as the module says).

        Returns:
            How many lines were written.

        Raises:
            OrkiError: The file takes no more; nothing of the batch is in it then.
        """
        fresh = {event_id: line for event_id, line in lines if event_id not in self._seen}
        if fresh:
            self._write("".join(f"{line}\n" for line in fresh.values()).encode("ascii"))
            self._seen.update(dict.fromkeys(fresh))
            while len(self._seen) > self._settings.remember:
                self._seen.popitem(last=False)
        return len(fresh)

    def _write(self, block: bytes) -> None:
        end = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(block):
                written += os.write(self._descriptor, block[written:])
            if self._settings.fsync is Fsync.BATCH:
                os.fdatasync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # a disk so broken is healed at the next start
                os.ftruncate(self._descriptor, end)
            raise OrkiError(
                f"{self._settings.path} takes no more lines: {error.strerror}; "
                "make room, until then nothing is acknowledged"
            ) from error

    def _heal(self) -> int:
        size = os.fstat(self._descriptor).st_size
        for start, block in self._blocks_from_end(size):
            if (newline := block.rfind(b"\n")) >= 0:
                whole = start + newline + 1
                break
        else:
            whole = 0
        if whole < size:
            os.ftruncate(self._descriptor, whole)
        return size - whole

    def _last_ids(self) -> Iterator[str]:
        """Ids from the last line backwards, `remember` at the most."""
        left = self._settings.remember
        rest = b""
        for start, block in self._blocks_from_end(os.fstat(self._descriptor).st_size):
            lines = (block + rest).split(b"\n")
            rest = lines[0]
            for line in reversed(lines if start == 0 else lines[1:]):
                if (event_id := _event_id(line)) is not None:
                    yield event_id
                    left -= 1
                    if left == 0:
                        return

    def _blocks_from_end(self, size: int) -> Iterator[tuple[int, bytes]]:
        while size > 0:
            start = max(0, size - _BLOCK)
            yield start, os.pread(self._descriptor, size - start, start)
            size = start


def _event_id(line: bytes) -> str | None:
    found = line[len(_START) : len(_START) + _DIGITS]
    if line.startswith(_START) and len(found) == _DIGITS and _HEX.issuperset(found):
        return found.decode("ascii")
    return None
