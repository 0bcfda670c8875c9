"""The audit observer: writes every event of every stream to a file, exactly once, as a redacted line of JSON.

It consumes the group `audit` of each registered stream and discovers new streams. An event is acknowledged once its
line is in the file and, with `Fsync.BATCH`, on the disk. Its consumer has the same name at every start, so it receives
unacknowledged events again at once.

Every line starts with `{"event_id":"` and 32 hex digits, so that ids are found without parsing. These rules make each
line appear once although the process may be killed at any time:

- `append` writes a batch of lines and, with `Fsync.BATCH`, syncs it before it returns. Only then may its events be
  acknowledged. An unacknowledged event is delivered again.
- `open` reads the ids at the end of the file, and `append` skips events whose ids are known. The log recognizes an
  event as long as fewer than `remember` others were written since.
- A last line without a newline was cut off by a crash. Its event was never acknowledged, so `open` removes the line.
- A lock on `FILE.lock` excludes a second writer.

Each line continues a hash chain (`audit_chain`). A file that has reached its size is renamed to `FILE.NUMBER`, and its
chain goes on in a new one. A gap that the event plane reports is a line as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import re
import socket
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Final

from orki_contract.errors import InvalidSetting, OrkiError
from orki_contract.model import AUDIT_GROUP, Group, Stream
from orki_events import DeliveryBatch, EventOptions, Events, Gap, GapKind, StreamVersion, connect
from orki_events.connection import Connection, parse_address
from orki_events.entries import stream_keys
from orki_server._observers.audit_chain import START, link_of, seal
from orki_server._observers.entries import DRAIN_TIMEOUT, EntryDecoders, poll_registry
from orki_server._observers.redaction import safe_json, time_text
from orki_server._observers.sequences import SequenceWatch
from orki_server._process import print_ready_line

_EVENT_ID: Final = re.compile(rb'\{"event_id":"([0-9a-f]{32})')
_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_BLOCK: Final = 1 << 18
_BATCH: Final = 500
_RETRY_DELAY: Final = 1.0
_HOLE_GRACE: Final = 10.0
"""Seconds in which an event may arrive after later ones of its producer: of other partitions, or after a retry."""
_HOLE_INTERVAL: Final = 2.0
# A crash counts as a delivery, and crashes must not turn an event into a dead letter.
_GROUP: Final = Group(name=AUDIT_GROUP.name, max_deliveries=1_000_000)

_log = logging.getLogger("orki.audit")


class Fsync(StrEnum):
    """When lines are synced to the disk.

    BATCH: before their events are acknowledged; lines survive a power failure. NEVER: when the operating system does
    it; lines survive a crash of the process but not of the machine.
    """

    BATCH = "batch"
    NEVER = "never"


class AuditLog:
    """An audit log. Not thread-safe."""

    def __init__(self, path: Path, *, fsync: Fsync = Fsync.BATCH, remember: int = 200_000, max_bytes: int = 0) -> None:
        """Create a log; `open` must be called before `append`.

        Args:
            path: The file; its directory must exist.
            fsync: When lines are synced to the disk.
            remember: Number of ids kept in memory to recognize repeated events, at least 1000.
            max_bytes: Size at which a file is renamed and another one begun; 0 for a single file.
        """
        if remember < 1000:
            raise InvalidSetting(f"remember is {remember}; it must be 1000 or more")
        self.path = path
        self._fsync = fsync
        self._remember = remember
        self._max_bytes = max_bytes
        self._descriptor = self._lock = -1
        self._end: int | None = None
        self._link = START
        self._seen: OrderedDict[str, None] = OrderedDict()

    def open(self) -> int:
        """Lock the file, remove an incomplete last line, and read the latest ids.

        Returns:
            Bytes of the incomplete last line that were removed; usually 0.

        Raises:
            InvalidSetting: The file cannot be opened, or another process writes to it.
        """
        path = self.path
        try:
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._descriptor = os.open(path, _APPEND, 0o600)
        except OSError as error:
            self.close()
            raise InvalidSetting(
                f"{path} cannot be opened for appending: {error.strerror}; use another file"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removed = self._remove_incomplete_line()
            self._seen = OrderedDict.fromkeys(reversed(list(islice(self._last_ids(), self._remember))))
            self._link = next((link for line in self._last_lines() if (link := link_of(line))), START)
        except OSError as error:
            self.close()
            why = "another process writes to it" if isinstance(error, BlockingIOError) else str(error.strerror)
            raise InvalidSetting(f"{path} cannot be used: {why}; each audit observer needs its own file") from error
        return removed

    def close(self) -> None:
        for descriptor in (self._descriptor, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._lock = -1

    def append(self, lines: Sequence[tuple[str, str]]) -> int:
        """Write the lines whose events are not in the file yet, and sync them with `Fsync.BATCH`.

        Args:
            lines: Event id (32 hex digits) and line (without newline, starting with the id as described above).

        Returns:
            Number of lines written.

        Raises:
            OrkiError: Writing failed; nothing of the batch is in the file.
        """
        fresh = {event_id: line for event_id, line in lines if event_id not in self._seen}
        if fresh:
            link, sealed = self._link, []
            for line in fresh.values():
                link, text = seal(link, line)
                sealed.append(f"{text}\n")
            self._write("".join(sealed).encode("ascii"))
            self._link = link
            self._seen.update(dict.fromkeys(fresh))
            while len(self._seen) > self._remember:
                self._seen.popitem(last=False)
        return len(fresh)

    def _write(self, block: bytes) -> None:
        try:
            if self._end is not None:
                # What is left of a failed write would break the chain.
                os.ftruncate(self._descriptor, self._end)
                self._end = None
            size = os.fstat(self._descriptor).st_size
            if self._max_bytes and size and size + len(block) > self._max_bytes:
                self._rotate()
                size = 0
            self._end = size
            written = 0
            while written < len(block):
                written += os.write(self._descriptor, block[written:])
            if self._fsync is Fsync.BATCH:
                os.fdatasync(self._descriptor)
            self._end = None
        except OSError as error:
            if self._end is not None:
                with contextlib.suppress(OSError):  # the next write or start removes the incomplete line
                    os.ftruncate(self._descriptor, self._end)
            raise OrkiError(
                f"{self.path} cannot be written: {error.strerror}; free disk space; until then no event is acknowledged"
            ) from error

    def _rotate(self) -> None:
        """Rename the file, and begin another one. A crash in between leaves no file, which `open` creates."""
        if self._fsync is Fsync.BATCH:
            os.fdatasync(self._descriptor)
        earlier = files_of(self.path)[:-1]
        number = int(earlier[-1].suffix[1:]) + 1 if earlier else 1
        os.rename(self.path, f"{self.path}.{number:06d}")
        descriptor = os.open(self.path, _APPEND, 0o600)
        os.close(self._descriptor)
        self._descriptor = descriptor
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove_incomplete_line(self) -> int:
        size = os.fstat(self._descriptor).st_size
        for start, block in _blocks_from_end(self._descriptor, size):
            if (newline := block.rfind(b"\n")) >= 0:
                whole = start + newline + 1
                break
        else:
            whole = 0
        if whole < size:
            os.ftruncate(self._descriptor, whole)
        return size - whole

    def _last_ids(self) -> Iterator[str]:
        """Yield ids from the last line backwards."""
        for line in self._last_lines():
            if (found := _EVENT_ID.match(line)) is not None:
                yield found[1].decode("ascii")

    def _last_lines(self) -> Iterator[bytes]:
        """Yield the lines of all files from the last one backwards, without empty ones."""
        for path in reversed(files_of(self.path)):
            with open(path, "rb") as file:
                rest = b""
                for start, block in _blocks_from_end(file.fileno(), os.fstat(file.fileno()).st_size):
                    lines = (block + rest).split(b"\n")
                    rest = lines[0]
                    yield from filter(None, reversed(lines if start == 0 else lines[1:]))


def files_of(path: Path) -> list[Path]:
    """Return the files of a log from the oldest to the one that is written, which may not exist."""
    name = re.escape(path.name)
    earlier = [each for each in path.parent.glob(f"{path.name}.*") if re.fullmatch(rf"{name}\.[0-9]{{6,}}", each.name)]
    return [*sorted(earlier, key=lambda each: int(each.suffix[1:])), path]


def _blocks_from_end(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    while size > 0:
        start = max(0, size - _BLOCK)
        yield start, os.pread(descriptor, size - start, start)
        size = start


async def run_audit(redis_url: str, log: AuditLog, stopped: asyncio.Event) -> None:
    """Write events until `stopped` is set, then finish the current batches.

    Raises:
        InvalidSetting: The file or the URL cannot be used.
        OrkiError: Redis refuses the connection or a command, and a retry would not help.
    """
    gaps: asyncio.Queue[Gap] = asyncio.Queue()
    holes = _Holes(gaps, Connection(parse_address(redis_url), name="orki:audit", connect_timeout=5, answer_timeout=10))
    events = connect(redis_url, options=EventOptions(dedupe_window=0, drain_timeout=DRAIN_TIMEOUT, on_gap=holes.report))
    removed = log.open()
    if removed:
        _log.warning("removed %d bytes of an incomplete last line; its event was not acknowledged", removed)
    try:
        async with events:
            audit = _Audit(events, log, stopped, holes)
            hole_finder = asyncio.create_task(holes.run(), name="audit sequences")
            gap_writer = asyncio.create_task(audit.write_gaps(gaps), name="audit gaps")
            try:
                await poll_registry(events, stopped, audit.follow, _log)
            finally:
                await audit.finish_reading()
                hole_finder.cancel()
                gap_writer.cancel()
                await asyncio.gather(gap_writer, hole_finder, return_exceptions=True)
                await holes.close()
                await audit.end(gaps)
    finally:
        log.close()


class _Holes:
    """Reports numbers that are missing in producers' sequences and that no other gap explains."""

    def __init__(self, gaps: asyncio.Queue[Gap], link: Connection) -> None:
        self._gaps = gaps
        self._link = link
        self._watches: dict[str, tuple[Stream, SequenceWatch]] = {}
        self._explained: Counter[str] = Counter()

    def report(self, gap: Gap) -> None:
        """Take a gap that the event plane reports, and pass it on to the log."""
        if gap.group == _GROUP.name:
            self._explained[gap.stream] += gap.count or 0
        self._gaps.put_nowait(gap)

    def saw(self, stream: Stream, batch: DeliveryBatch[bytes]) -> None:
        """Take note of events that are in the log."""
        watch = self._watches.setdefault(stream.name, (stream, SequenceWatch(_HOLE_GRACE)))[1]
        seen = zip(batch.envelopes, batch.deliveries, strict=True)
        numbers = [(each.producer, each.sequence, made == 1) for each, made in seen if each.sequence]
        watch.saw(numbers, asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Look for holes until cancelled."""
        while True:
            await asyncio.sleep(_HOLE_INTERVAL)
            for stream, watch in list(self._watches.values()):
                missing = watch.missing(asyncio.get_running_loop().time())
                count = sum(missing.values()) - self._explained[stream.name]
                self._explained[stream.name] = max(-count, 0) if missing else self._explained[stream.name]
                try:
                    if count > 0 and missing and await self._reads_alone(stream):
                        self._gaps.put_nowait(self._gap(stream, missing, count))
                except OrkiError as error:
                    _log.warning("%d events of stream %s may be missing: %s", count, stream.name, error.message)

    async def _reads_alone(self, stream: Stream) -> bool:
        """Whether all events come to this process: other consumers of the group see what is missing here."""
        for key in stream_keys(stream):
            consumers = await self._link.execute((b"XINFO", b"CONSUMERS", key, _GROUP.name))
            if sum(each[1] != b"handed-back" for each in consumers) > 1:
                return False
        return True

    def _gap(self, stream: Stream, missing: dict[str, int], count: int) -> Gap:
        producers = ", ".join(f"{name} ({number})" for name, number in list(missing.items())[:5])
        text = f'{count} events of stream "{stream.name}" are missing in their producers\' sequences: {producers}'
        _log.warning("%s", text)
        kind = GapKind.SEQUENCE_HOLE
        return Gap(kind=kind, stream=stream.name, group=_GROUP.name, count=count, possible=True, message=text)

    async def close(self) -> None:
        await self._link.close()


class _Audit:
    def __init__(self, events: Events, log: AuditLog, stopped: asyncio.Event, holes: _Holes) -> None:
        self._events = events
        self._holes = holes
        self._log = log
        self._stopped = stopped
        # The name depends only on host and file, so that a restarted observer receives its pending events at once.
        digest = hashlib.sha256(str(log.path.resolve()).encode()).hexdigest()[:12]
        self._consumer = f"audit.{socket.gethostname()}.{digest}"
        self._decoders = EntryDecoders()
        self._registered: dict[str, StreamVersion] = {}
        self._tasks: dict[str, tuple[int, asyncio.Task[None]]] = {}
        # A single thread serializes the batches of all streams, even if a task is cancelled.
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._announced = False

    async def follow(self, streams: list[StreamVersion]) -> None:
        """Start consumers for new streams and restart those whose number of partitions changed."""
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
            print_ready_line("audit", str(self._log.path))

    async def finish_reading(self) -> None:
        """Stop all consumers cleanly."""
        await self._events.close()
        await asyncio.gather(*(task for _, task in self._tasks.values()), return_exceptions=True)

    async def end(self, gaps: asyncio.Queue[Gap]) -> None:
        """Write the gaps that are left, and stop the thread."""
        with contextlib.suppress(OrkiError):  # logged
            while not gaps.empty():
                await self._append([_gap_line(gaps.get_nowait())])
        self._writer.shutdown()

    async def write_gaps(self, gaps: asyncio.Queue[Gap]) -> None:
        """Write each gap that the event plane reports for this observer's groups."""
        while True:
            line = _gap_line(await gaps.get())
            # A cancel must not take a gap out of the queue and leave it unwritten.
            writing = asyncio.ensure_future(self._append([line]))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await writing
                raise

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
                        self._holes.saw(stream, batch)
        except OrkiError as error:
            # Retried at the next poll of the registry.
            _log.error('the stream "%s" cannot be read: %s', stream.name, error.message)

    async def _write(self, name: str, batch: DeliveryBatch[bytes]) -> None:
        decoder = self._decoders.of(self._registered[name])
        lines = []
        for entry_id, envelope, event in zip(batch.entry_ids, batch.envelopes, batch.events, strict=True):
            entry = decoder.decode(batch.key, entry_id, envelope.SerializeToString(), event)
            lines.append((entry.event_id, safe_json(entry.to_json())))
        await self._append(lines)

    async def _append(self, lines: list[tuple[str, str]]) -> None:
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._log.append, lines)
                return
            except OrkiError as error:
                # The batch is kept and retried: a full disk must not turn events into dead letters.
                _log.error("%s", error.message)
                if self._stopped.is_set():
                    raise
                await asyncio.sleep(_RETRY_DELAY)


def _gap_line(gap: Gap) -> tuple[str, str]:
    """Return the id and the line of a gap."""
    shown = {name: value.value if isinstance(value, StrEnum) else value for name, value in asdict(gap).items()}
    event_id = uuid.uuid4().hex
    return event_id, safe_json({"event_id": event_id, "time": time_text(time.time_ns() // 1_000), "gap": shown})
