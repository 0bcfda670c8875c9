"""The audit observer: every event of every stream, as one line of a file, redacted, exactly once.

It consumes the group `audit` of each registered stream and finds new streams by itself. An event is acknowledged once
its line is in the file (and on the disk, with `Fsync.BATCH`); what is delivered again after a crash is recognised by
what the file holds. Its consumer has the same name at every start, so it takes up at once what it had not acknowledged.
"""

from __future__ import annotations

__all__ = ["AuditOptions", "run_audit"]

import asyncio
import hashlib
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from orki_contract.errors import OrkiError
from orki_contract.model import AUDIT_GROUP, Group, Stream
from orki_events import DeliveryBatch, EventOptions, Events, RegisteredStream, connect
from orki_server.observers.audit_log import AuditLog, AuditLogSettings
from orki_server.observers.entry_view import Readers
from orki_server.observers.process import announce
from orki_server.observers.redaction import safe_json
from orki_server.observers.registered import follow_registered

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


if __name__ == "__main__":
    from orki_server.cli.observe import audit

    audit()
