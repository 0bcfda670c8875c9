"""orki's event plane: typed events over Redis Streams."""

from orki_events.dead_letters import DeadLetterEntry
from orki_events.deliveries import Delivery, DeliveryBatch
from orki_events.events import Events, connect
from orki_events.intake import Deliveries
from orki_events.ledger import GroupLedger, StreamLedger
from orki_events.options import ConsumeOptions, EventOptions, Gap, GapKind
from orki_events.publisher import Outgoing
from orki_events.push import Consumer, consumer
from orki_events.registry import RegisteredStream
from orki_events.tail import TailEntry
from orki_events.tuning import Tuned, Tuning

__all__ = [
    "ConsumeOptions",
    "Consumer",
    "DeadLetterEntry",
    "Deliveries",
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
    "TailEntry",
    "Tuned",
    "Tuning",
    "connect",
    "consumer",
]
