"""Reads the partition keys of entries, by which their order is kept."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from google.protobuf.message import DecodeError

from orki_contract import EventStream
from orki_contract.errors import EventUndecodable
from orki_contract.model import Stream
from orki_events._delivery_queue import KeyOf
from orki_events._delivery_table import Entry
from orki_events.entries import split_entry


def key_reader(stream: EventStream[Any, Any] | Stream) -> KeyOf | None:
    """Return the function that reads the partition key of an entry; None if the stream has no order.

    Entries that cannot be decoded have keys of their own. Without generated code, all entries of a partition have one.
    """
    contract = stream if isinstance(stream, Stream) else stream.contract
    if contract.partitions == 1:
        return None
    if isinstance(stream, Stream):
        return lambda entry: None
    decode, field_name = stream.message.FromString, contract.partition_key

    def key_of(entry: Entry) -> Hashable:
        try:
            key: str | int = getattr(decode(split_entry(entry[1])[1]), field_name)
        except (DecodeError, EventUndecodable):
            return bytes(entry[0])
        return key

    return key_of
