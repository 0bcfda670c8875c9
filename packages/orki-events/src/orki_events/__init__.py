"""orki's event plane: typed events over Redis Streams."""

from orki_events.events import Events, connect
from orki_events.options import ConsumeOptions, EventOptions, Gap, GapKind
from orki_events.registry import RegisteredStream

__all__ = ["ConsumeOptions", "EventOptions", "Events", "Gap", "GapKind", "RegisteredStream", "connect"]
