"""Typed events over Redis Streams: at-least-once delivery to declared groups, with retries and dead letters.

A contract declares each stream with its message, groups and retention. Its generated module contains a handle for each
stream, such as `USAGE`. `connect` opens the event plane:

```python
from orki.events.v1.usage_orki import USAGE, UsageEvent
from orki_events import connect

async with connect("redis://127.0.0.1:6379/0") as events:
    await events.publish(USAGE, UsageEvent(model="m"))
    async with events.deliveries(USAGE, group="metrics") as deliveries:
        async for delivery in deliveries:
            async with delivery as event:
                print(event.model)
            break
```
"""

from orki_events._client import Events, connect
from orki_events._consumers import Consumer, Delivery, DeliveryBatch, Subscription, consumer
from orki_events._lanes import Outgoing
from orki_events._ledger import GroupLedger, StreamLedger
from orki_events._letters import DeadLetterEntry
from orki_events._options import ConsumeOptions, EventOptions, Gap, GapKind
from orki_events._readers import TailEntry
from orki_events.registry import StreamVersion
from orki_events.tuning import Tuned, Tuning

__all__ = [
    "ConsumeOptions",
    "Consumer",
    "DeadLetterEntry",
    "Delivery",
    "DeliveryBatch",
    "EventOptions",
    "Events",
    "Gap",
    "GapKind",
    "GroupLedger",
    "Outgoing",
    "StreamLedger",
    "StreamVersion",
    "Subscription",
    "TailEntry",
    "Tuned",
    "Tuning",
    "connect",
    "consumer",
]
