"""Push consumers: `@consumer` declares one, `Events.run` runs it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, overload

from google.protobuf.message import Message

from orki_contract import EventStream
from orki_contract.errors import HandlerFailed, InvalidSetting
from orki_contract.trace import use_span
from orki_events._deliveries import Delivery, DeliveryBatch, take_batch, take_one
from orki_events._group_reader import GroupReader
from orki_events._options import ConsumeOptions

E = TypeVar("E", bound=Message)
G = TypeVar("G", bound=str)
P = ParamSpec("P")
_log = logging.getLogger("orki.events")

Single = Callable[[E, Delivery[E]], Awaitable[None]]
Batched = Callable[[list[E], DeliveryBatch[E]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer(Generic[P]):
    """A handler with its stream and group, made by `@consumer`. Call it like the function that it decorates.

    Attributes:
        stream: The stream.
        group: One of the groups that the stream declares.
        handler: Called with the event, or a list of events, and the delivery.
        concurrency: Number of concurrent calls.
        batch: Maximum number of events in one call; 0 for calls with single events.
        options: Further settings.

    Raises:
        UnknownGroup: The stream declares no such group.
        InvalidSetting: The handler is not a coroutine function, or a number is out of its range.
    """

    stream: EventStream[Any, Any]
    group: str
    handler: Callable[P, Awaitable[None]]
    concurrency: int
    batch: int
    options: ConsumeOptions = field(default_factory=ConsumeOptions)

    def __post_init__(self) -> None:
        self.stream.contract.group(self.group)
        if not inspect.iscoroutinefunction(self.handler):
            raise InvalidSetting(f"the consumer {self.handler!r} must be an `async def`")
        if not 1 <= self.concurrency <= 10_000:
            raise InvalidSetting(f"concurrency is {self.concurrency}; it must be from 1 to 10000")
        if not 0 <= self.batch <= 10_000:
            raise InvalidSetting(f"batch is {self.batch}; it must be from 1 to 10000")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[None]:
        """Call the handler directly, as a test does."""
        return self.handler(*args, **kwargs)


@overload
def consumer(
    stream: EventStream[E, G], *, group: G, concurrency: int = 16, options: ConsumeOptions | None = None
) -> Callable[[Single[E]], Consumer[[E, Delivery[E]]]]: ...


@overload
def consumer(
    stream: EventStream[E, G], *, group: G, batch: int, concurrency: int = 1, options: ConsumeOptions | None = None
) -> Callable[[Batched[E]], Consumer[[list[E], DeliveryBatch[E]]]]: ...


def consumer(
    stream: EventStream[Any, Any],
    *,
    group: str,
    batch: int | None = None,
    concurrency: int | None = None,
    options: ConsumeOptions | None = None,
) -> Callable[[Callable[..., Awaitable[None]]], Consumer[Any]]:
    """Declare an `async def` as a consumer: if it returns, the event is acknowledged; if it raises, it is retried.

    Args:
        stream: The stream.
        group: One of the groups that the stream declares.
        batch: Pass up to this many events of one partition at once, as a list; the default is single events.
        concurrency: Number of concurrent calls; the default is 16, or 1 with `batch`.
        options: Further settings.

    Raises:
        UnknownGroup: The stream declares no such group; the message lists the declared ones.
        InvalidSetting: A number is out of its range.
    """
    if batch is not None and batch < 1:
        raise InvalidSetting(f"batch is {batch}; it must be from 1 to 10000")

    def declare(handler: Callable[..., Awaitable[None]]) -> Consumer[Any]:
        return Consumer(
            stream=stream,
            group=group,
            handler=handler,
            concurrency=concurrency if concurrency is not None else (1 if batch else 16),
            batch=batch or 0,
            options=options or ConsumeOptions(),
        )

    return declare


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
        while (delivery := await take_one(self.reader, self._decode)) is not None:
            # Without `async with`, which costs two coroutine calls for each event.
            try:
                span = delivery.span
                with use_span(span.child() if span is not None else None):
                    await self._call(delivery.event, delivery)
            except Exception as error:
                self._log_failure(error, delivery.entry_id)
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
                self._log_failure(error, f"{batch.entry_ids[0]} and {len(batch) - 1} more")

    async def _call(self, *arguments: Any) -> None:
        limit = self._declared.options.handler_timeout
        if not limit:
            await self._declared.handler(*arguments)
            return
        timeout = asyncio.timeout(limit)
        try:
            async with timeout:
                await self._declared.handler(*arguments)
        except TimeoutError as error:
            if timeout.expired():
                raise HandlerFailed(f"the handler took more than {limit:g} s") from error
            raise

    def _log_failure(self, error: Exception, entries: str) -> None:
        _log.warning("%s failed on entry %s", self.reader.name, entries, exc_info=error)


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
