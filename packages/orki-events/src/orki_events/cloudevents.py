"""CloudEvents attributes of events, for what leaves orki: another broker, a webhook, an archive.

CloudEvents 1.0.2, with the extensions for distributed tracing, sequences and partitions. The generated `asyncapi.json`
of a package declares the same attributes for each of its streams.
"""

from __future__ import annotations

__all__ = ["attributes"]

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from google.protobuf.message import Message

from orki.events.v1.envelope_pb2 import Envelope
from orki_contract import EventStream
from orki_contract.errors import EventUndecodable


def attributes(stream: EventStream[Any, Any], event: Message, envelope: Envelope) -> dict[str, str]:
    """Return the CloudEvents attributes of an event; its data is `event.SerializeToString()`.

    `source` and `id` identify the event: every delivery and every dead letter of it has the same ones. `sequence` is
    the number of the event among those of its `source` and `subject`.

    Args:
        stream: The stream of the event.
        event: The event.
        envelope: Its envelope, as of `Delivery.envelope`.

    Raises:
        EventUndecodable: The time in the envelope is outside the years 1 to 9999.
    """
    contract = stream.contract
    made = {
        "specversion": "1.0",
        "type": contract.message,
        "source": f"urn:orki:{quote(envelope.producer, safe='')}",
        "id": envelope.event_id.hex(),
        "time": _time(envelope.time_us),
        "datacontenttype": "application/protobuf",
        "subject": contract.name,
        "sequence": str(envelope.sequence),
    }
    if contract.partition_key:
        made["partitionkey"] = _text(getattr(event, contract.partition_key))
    if envelope.traceparent:
        made["traceparent"] = envelope.traceparent
    return made


def _time(time_us: int) -> str:
    try:
        whole = datetime.fromtimestamp(time_us // 1_000_000, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise EventUndecodable(f"the envelope's time, {time_us} us, is outside the years 1 to 9999") from error
    return whole.replace(microsecond=time_us % 1_000_000).isoformat()


def _text(key: str | int | bytes) -> str:
    """Return a value of a partition key as text: bytes in hexadecimal, booleans as 0 or 1."""
    if isinstance(key, bytes):
        return key.hex()
    return key if isinstance(key, str) else str(int(key))
