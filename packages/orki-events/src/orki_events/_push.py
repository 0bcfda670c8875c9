"""Push consumers: `@consumer` declares one, `Events.run` runs it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, overload

from google.protobuf.message import Message

from orki_contract.errors import HandlerFailed, InvalidSetting
from orki_contract.handles import EventStream
from orki_contract.trace import use_span
from orki_events._deliveries import Decode, Delivery, DeliveryBatch, take_batch, take_one
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
    """A handler and what it handles; call it as the plain function that it decorates.

    Attributes:
        stream: Whose events.
        group: The group, one that the stream declares.
        handler: Called with the event, or a list of events, and their delivery.
        concurrency: Calls at once.
        batch: Most events in one call; 0 calls with single events.
        options: More settings.
    """

    stream: EventStream[Any, Any]
    group: str
    handler: Callable[P, Awaitable[None]]
    concurrency: int
    batch: int
    options: ConsumeOptions = field(default_factory=ConsumeOptions)

    def __post_init__(self) -> None:
        """Validates.

        Raises:
            UnknownGroup: The stream declares no such group.
            InvalidSetting: The handler is no coroutine function, or a number is out of its range.
        """
        self.stream.contract.group(self.group)
        if not inspect.iscoroutinefunction(self.handler):
            raise InvalidSetting(f"the consumer {self.handler!r} must be an `async def`")
        if not 1 <= self.concurrency <= 10_000:
            raise InvalidSetting(f"concurrency is {self.concurrency}; it must be from 1 to 10000")
        if not 0 <= self.batch <= 10_000:
            raise InvalidSetting(f"batch is {self.batch}; it must be from 1 to 10000")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Awaitable[None]:
        """Calls the handler, as a test does."""
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
    """Declares an `async def` as a consumer: when it returns, the event is acknowledged; when it raises, retried.

    Args:
        stream: Whose events.
        group: One of the groups that the stream declares.
        batch: Hand over up to so many events of one partition at once, as a list; single events unless given.
        concurrency: Calls at once, 16 unless given; of a batch consumer 1.
        options: More settings.

    Raises:
        UnknownGroup: The stream declares no such group; the message lists those that are.
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
    """One push consumer while it runs: so many workers that take, call and settle."""

    def __init__(self, declared: Consumer[Any], subscription: GroupReader, decode: Decode[Any]) -> None:
        """Args: declared: the consumer; subscription: its source of entries, started; decode: for the events."""
        self._declared = declared
        self._subscription = subscription
        self._decode = decode

    async def work(self) -> None:
        """Runs until the subscription ends.

        Raises:
            OrkiError: The server refuses the consumer for good.
        """
        worker = self._batches if self._declared.batch else self._singles
        async with asyncio.TaskGroup() as group:
            for _ in range(self._declared.concurrency):
                group.create_task(worker())

    async def _singles(self) -> None:
        while (delivery := await take_one(self._subscription, self._decode)) is not None:
            try:
                span = delivery.span
                with use_span(span.child() if span is not None else None):
                    await self._call(delivery.event, delivery)
            except Exception as error:
                self._complain(error, delivery.entry_id)
                delivery.retry(error)
            except BaseException:
                delivery.give_back()
                raise
            else:
                delivery.acknowledge()

    async def _batches(self) -> None:
        while (batch := await take_batch(self._subscription, self._decode, self._declared.batch)) is not None:
            try:
                await self._call(batch.events, batch)
            except Exception as error:
                self._complain(error, f"{batch.entry_ids[0]} and {len(batch) - 1} more")
                batch.retry(error)
            except BaseException:
                batch.give_back()
                raise
            else:
                batch.acknowledge()

    async def _call(self, *arguments: Any) -> None:
        limit = self._declared.options.handler_timeout_s
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

    def _complain(self, error: Exception, what: str) -> None:
        _log.warning("%s failed on entry %s", self._subscription.name, what, exc_info=error)


async def run_until(
    runs: list[PushRun], subscriptions: list[GroupReader], stop: asyncio.Event | None, drain_timeout_s: float
) -> None:
    """Works until one consumer is refused or `stop` is set; then lets handlers finish, for at most so long.

    Raises:
        OrkiError: The server refuses a consumer for good.
    """
    workers = [asyncio.create_task(run.work()) for run in runs]
    stopping = asyncio.create_task((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait([*workers, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for subscription in subscriptions:
            subscription.end()
        stopping.cancel()
        _, late = await asyncio.wait([*workers, stopping], timeout=drain_timeout_s)
        for worker in late:
            worker.cancel()
        if late:
            await asyncio.wait(late)
    for worker in workers:
        if not worker.cancelled() and (error := worker.exception()) is not None:
            raise _first(error)


def _first(error: BaseException) -> BaseException:
    """The error inside the group that several workers made of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
