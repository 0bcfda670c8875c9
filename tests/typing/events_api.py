"""The event plane as users type it. Never run: `nox -s types` reads it, and a missing complaint is an error too."""

from __future__ import annotations

from typing import assert_type

from orki.events.v1.agent_orki import AgentEvent
from orki.events.v1.usage_orki import USAGE, UsageEvent
from orki_events import Consumer, Delivery, DeliveryBatch, StreamLedger, connect, consumer


@consumer(USAGE, group="metrics", concurrency=4)
async def on_usage(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
    """One event at a time."""


@consumer(USAGE, group="metrics", batch=100)
async def on_batch(events: list[UsageEvent], batch: DeliveryBatch[UsageEvent]) -> None:
    """Many events at once."""


assert_type(on_usage, Consumer[[UsageEvent, Delivery[UsageEvent]]])


@consumer(USAGE, group="metrcis")  # type: ignore[misc]
async def on_misspelt(event: UsageEvent, delivery: Delivery[UsageEvent]) -> None:
    """No such group."""


@consumer(USAGE, group="metrics")  # type: ignore[arg-type]
async def on_other(event: AgentEvent, delivery: Delivery[AgentEvent]) -> None:
    """Another stream's events."""


async def use() -> None:
    """Everything else."""
    async with connect("redis://127.0.0.1:6379/0") as events:
        assert_type(await events.publish(USAGE, UsageEvent()), bytes)
        assert_type(events.collect(USAGE, UsageEvent()), bytes)
        await events.publish(USAGE, AgentEvent())  # type: ignore[misc]
        async for delivery in events.deliveries(USAGE, group="metrics"):
            async with delivery as event:
                assert_type(event, UsageEvent)
        events.deliveries(USAGE, group="metrcis")  # type: ignore[misc]
        async with events.delivery_batches(USAGE, group="audit", size=10) as batches:
            async for batch in batches:
                async with batch as several:
                    assert_type(several, list[UsageEvent])
        async for entry in events.tail(USAGE, after="latest"):
            assert_type(entry.event, UsageEvent)
        assert_type(await events.ledger(USAGE), StreamLedger)
        await events.run(on_usage, on_batch)
