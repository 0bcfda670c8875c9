"""The pull form of consuming: what `async for` walks over, which ends its consumer whichever way it is left."""

from __future__ import annotations

__all__ = ["Deliveries"]

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from orki_events.subscription import Subscription

D = TypeVar("D")


class Deliveries(AsyncIterator[D], Generic[D]):
    """Deliveries as they come, until the `Events` they came from closes. Made by `Events.deliveries` and its kin.

    No generator: one that is left by `break` ends whenever Python gets round to it, which is after its event loop as
    often as before. This ends with its `async with` block or by `aclose`; when an iteration is cancelled or fails;
    when nobody holds it any more; and at the latest with its `Events`, whose end waits for it in any case.
    """

    __slots__ = ("_ended", "_subscribe", "_subscription", "_take")

    def __init__(
        self, subscribe: Callable[[], Subscription], take: Callable[[Subscription], Awaitable[D | None]]
    ) -> None:
        """Args: subscribe: starts the consumer; take: the next delivery, None once the consumer ends."""
        self._subscription: Subscription | None = None
        self._ended = False
        self._subscribe = subscribe
        self._take = take

    async def __aenter__(self) -> Self:
        """Starts the consumer; without it, the first iteration does."""
        self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As `aclose`."""
        await self.aclose()

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> D:
        """The next delivery; the wait for it may be shared by several tasks.

        Raises:
            StopAsyncIteration: The consumer has ended.
            OrkiError: The server refuses the consumer for good.
        """
        if self._ended:
            raise StopAsyncIteration
        try:
            taken = await self._take(self._started())
        except BaseException:
            await self.aclose()
            raise
        if taken is None:
            await self.aclose()
            raise StopAsyncIteration
        return taken

    async def aclose(self) -> None:
        """Ends the consumer in good order: waits for what was taken to be settled, for the drain timeout at most."""
        self._ended = True
        if self._subscription is not None:
            await self._subscription.close()

    def _started(self) -> Subscription:
        if self._subscription is None:
            self._subscription = self._subscribe()
        return self._subscription

    def __del__(self) -> None:
        """Nobody can iterate any more."""
        if not self._ended and self._subscription is not None:
            self._subscription.abandon()
