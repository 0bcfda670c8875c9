"""orki's event plane: typed events over Redis Streams."""

from orki_events._client import Events, connect
from orki_events._dead_letters import DeadLetterEntry
from orki_events._deliveries import Delivery, DeliveryBatch, Subscription
from orki_events._ledger import GroupLedger, StreamLedger
from orki_events._options import ConsumeOptions, EventOptions, Gap, GapKind
from orki_events._publisher import Outgoing
from orki_events._push import Consumer, consumer
from orki_events._readers import TailEntry
from orki_events.registry import RegisteredStream
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
    "RegisteredStream",
    "StreamLedger",
    "Subscription",
    "TailEntry",
    "Tuned",
    "Tuning",
    "connect",
    "consumer",
]
