"""Runs the handlers that are declared with `@consumer`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from orki_contract.errors import HandlerFailed
from orki_contract.masking import masked_trace
from orki_contract.trace import defer_span
from orki_events._consumers import Consumer, next_delivery, take_batch
from orki_events._group_reader import GroupReader

_log = logging.getLogger("orki.events")


class PushRun:
    """A running push consumer: `concurrency` workers that take, call and settle."""

    def __init__(self, declared: Consumer[Any], reader: GroupReader) -> None:
        self.reader = reader
        self._declared = declared
        self._decode = declared.stream.message.FromString

    async def work(self) -> None:
        """Run the workers until the reader ends or the server refuses it."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._declared.concurrency):
                group.create_task(self._batches() if self._declared.batch else self._singles())

    async def _singles(self) -> None:
        reader, decode = self.reader, self._decode
        handler: Any = self._call if self._declared.options.handler_timeout else self._declared.handler
        while True:
            delivery = next_delivery(reader, decode)
            if delivery is None:
                if not await reader.wait():
                    return
                continue
            # Without `async with`, which costs two coroutine calls for each event.
            try:
                defer_span(delivery)
                await handler(delivery.event, delivery)
            except Exception as error:
                self._log_failure(error, delivery.entry_id, (delivery.event,))
                delivery.retry(error)
            except BaseException:
                delivery.give_back()
                raise
            else:
                delivery.acknowledge()

    async def _batches(self) -> None:
        while (batch := await take_batch(self.reader, self._decode, self._declared.batch)) is not None:
            try:
                async with batch as events:
                    await self._call(events, batch)
            except Exception as error:
                self._log_failure(error, f"{batch.entry_ids[0]} and {len(batch) - 1} more", batch.events)

    async def _call(self, *arguments: Any) -> None:
        limit = self._declared.options.handler_timeout
        timeout = asyncio.timeout(limit or None)
        try:
            async with timeout:
                await self._declared.handler(*arguments)
        except TimeoutError as error:
            if timeout.expired():
                raise HandlerFailed(f"the handler took more than {limit:g} s") from error
            raise

    def _log_failure(self, error: Exception, entries: str, events: Sequence[object]) -> None:
        if (trace := masked_trace(error, events)) is None:
            _log.warning("%s failed on entry %s", self.reader.name, entries, exc_info=error)
        else:
            _log.warning("%s failed on entry %s\n%s", self.reader.name, entries, trace.rstrip())


async def run_until(runs: list[PushRun], stop: asyncio.Event | None, drain_timeout: float) -> None:
    """Run consumers until the server refuses one or `stop` is set; then wait for handlers, at most `drain_timeout`."""
    workers = [asyncio.create_task(run.work()) for run in runs]
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait([*workers, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for run in runs:
            run.reader.end()
        stopping.cancel()
        _, late = await asyncio.wait([*workers, stopping], timeout=drain_timeout)
        for worker in late:
            worker.cancel()
        if late:
            await asyncio.wait(late)
    for worker in workers:
        if not worker.cancelled() and (error := worker.exception()) is not None:
            # Several workers may have failed; the first error is raised.
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error
