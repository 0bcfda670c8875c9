"""orki's event plane: typed events over Redis Streams."""

from orki_events.deliveries import Delivery, DeliveryBatch
from orki_events.events import Events, connect
from orki_events.options import ConsumeOptions, EventOptions, Gap, GapKind
from orki_events.push import Consumer, consumer
from orki_events.registry import RegisteredStream

__all__ = [
    "ConsumeOptions",
    "Consumer",
    "Delivery",
    "DeliveryBatch",
    "EventOptions",
    "Events",
    "Gap",
    "GapKind",
    "RegisteredStream",
    "connect",
    "consumer",
]
