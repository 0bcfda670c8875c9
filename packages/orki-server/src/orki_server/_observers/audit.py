"""The audit observer: every event of every stream, as one line of a file, redacted, exactly once.

It consumes the group `audit` of each registered stream and finds new streams by itself. An event is acknowledged once
its line is in the file (and on the disk, with `Fsync.BATCH`); what is delivered again after a crash is recognised by
what the file holds. Its consumer has the same name at every start, so it takes up at once what it had not acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from orki_contract.errors import InvalidSetting, OrkiError
from orki_contract.model import AUDIT_GROUP, Group, Stream
from orki_events import DeliveryBatch, EventOptions, Events, RegisteredStream, connect
from orki_server._observers.entries import Readers, follow_registered
from orki_server._observers.http_server import announce
from orki_server._observers.redaction import safe_json

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


_log = logging.getLogger("orki.audit")

_BATCH: Final = 500
_AGAIN_S: Final = 1.0
# A kill counts as a delivery; no number of kills may turn an event into a dead letter.
_GROUP: Final = Group(name=AUDIT_GROUP.name, max_deliveries=1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """What the observer needs to know.

    Attributes:
        log: The file.
    """

    log: AuditLogSettings


async def run_audit(redis_url: str, options: AuditOptions, stopped: asyncio.Event) -> None:
    """Writes until `stopped` is set, then finishes the lines at hand.

    Raises:
        InvalidSetting: The file or the URL cannot be used.
        OrkiError: The event server refuses, for a reason that time does not mend.
    """
    log = AuditLog(options.log)
    events = connect(redis_url, options=EventOptions(dedupe_window=0))
    torn = log.open()
    if torn:
        _log.warning("%d bytes of a torn last line were cut off; its event was not acknowledged", torn)
    try:
        async with events:
            audit = _Audit(events, log, options.log.path, stopped)
            try:
                await follow_registered(events, stopped, audit.follow, _log)
            finally:
                await audit.end()
    finally:
        log.close()


class _Audit:
    def __init__(self, events: Events, log: AuditLog, path: Path, stopped: asyncio.Event) -> None:
        self._events = events
        self._log = log
        self._path = path
        self._stopped = stopped
        self._consumer = consumer_name(path)
        self._readers = Readers()
        self._registered: dict[str, RegisteredStream] = {}
        self._tasks: dict[str, tuple[int, asyncio.Task[None]]] = {}
        # One thread: lines of several streams are written one batch after the other, also when a task is cancelled.
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._announced = False

    async def follow(self, streams: list[RegisteredStream]) -> None:
        """Consumes those that are not consumed yet, or have changed their partitions."""
        for each in streams:
            name, partitions = each.contract.name, each.contract.partitions
            self._registered[name] = each
            before = self._tasks.get(name)
            if before is not None and before[0] == partitions and not before[1].done():
                continue
            if before is not None:
                before[1].cancel()
                await asyncio.gather(before[1], return_exceptions=True)
            self._tasks[name] = (partitions, asyncio.create_task(self._consume(each.contract), name=f"audit {name}"))
        if not self._announced:
            self._announced = True
            announce("audit", str(self._path))

    async def end(self) -> None:
        """Ends all consumers in good order."""
        await self._events.close()
        await asyncio.gather(*(task for _, task in self._tasks.values()), return_exceptions=True)
        self._writer.shutdown()

    async def _consume(self, stream: Stream) -> None:
        groups = tuple(_GROUP if group.name == _GROUP.name else group for group in stream.groups)
        if _GROUP not in groups:
            groups = (*groups, _GROUP)
        observed = replace(stream, groups=groups)
        try:
            source = self._events.raw_deliveries(observed, group=_GROUP.name, size=_BATCH, consumer=self._consumer)
            async with source as batches:
                async for batch in batches:
                    async with batch:
                        await self._write(stream.name, batch)
        except OrkiError as error:
            # Tried again at the next look at the registry.
            _log.error('the stream "%s" cannot be read: %s', stream.name, error.message)

    async def _write(self, name: str, batch: DeliveryBatch[bytes]) -> None:
        reader = self._readers.of(self._registered[name])
        lines = []
        for entry_id, envelope, event in zip(batch.entry_ids, batch.envelopes, batch.events, strict=True):
            view = reader.view(batch.key, entry_id, envelope.SerializeToString(), event)
            lines.append((view.event_id, safe_json(view.to_json())))
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._log.append, lines)
                return
            except OrkiError as error:
                # Held, not failed: a full disk must not send events to the dead letters.
                _log.error("%s", error.message)
                if self._stopped.is_set():
                    raise
                await asyncio.sleep(_AGAIN_S)


def consumer_name(path: Path) -> str:
    """The consumer's name: the same for the same file of the same host."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    return f"audit.{socket.gethostname()}.{digest}"
