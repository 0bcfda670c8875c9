"""`docs/wire.md` explains the bytes of the golden vectors.

The vectors of entries and session messages are in `wire/entry/` and `wire/session/`. Like the frames, they may be added
but never changed. Run this file as a script to write missing vectors and the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import AttemptRef
from orki.control.v1.session_pb2 import (
    Accepted,
    AgentMessage,
    ConnectRequest,
    ConnectResponse,
    Heartbeat,
    Offer,
    OrchestratorMessage,
    Result,
)
from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.envelope_pb2 import DeadLetter, Envelope
from orki.events.v1.task_pb2 import TaskEvent, TaskStarted
from orki_contract.model import Retention, Stream
from orki_events.entries import decode_envelope, split_entry, stream_keys

ROOT = Path(__file__).resolve().parents[2]
WIRE = Path(__file__).with_name("wire")
PAGE = ROOT / "docs" / "wire.md"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ATTEMPT = AttemptRef(task_id="t3-01hx", attempt=2, fence=(1 << 44) + 7)

Part = tuple[int, int, str, str]
"""Offset, length, name and value."""


def entries() -> Iterator[tuple[str, str, dict[str, Message]]]:
    """Yield the name, description and ordered fields of each entry."""
    envelope = Envelope(
        event_id=bytes(range(16)),
        producer="orchestrator-1",
        sequence=41,
        time_us=1_780_000_000_000_000,
        traceparent=TRACEPARENT,
        parent_span_id="b7ad6b7169203331",
    )
    event = TaskEvent(
        task_id="t3-01hx",
        method="greenhouse.v1.WateringService/WaterBed",
        attempt=2,
        fence=ATTEMPT.fence,
        agent_id="gardener-1",
        started=TaskStarted(),
    )
    yield "started", "An entry of the stream `tasks`: an attempt began.", {"e": envelope, "d": event}
    letter = DeadLetter(
        stream="tasks",
        key="orki:ev:{tasks}",
        entry_id="1780000000000-0",
        group="metrics",
        deliveries=5,
        reason=Reason.REASON_DELIVERIES_EXHAUSTED,
        message="ValueError: no such bed",
    )
    dead = {"e": envelope, "d": event, "x": letter}
    yield "dead", "The same entry in the dead letter stream of the group `metrics`.", dead


def batches() -> Iterator[tuple[str, str, Message]]:
    """Yield the name, description and gRPC message of each session vector."""
    offer = Offer(
        attempt=ATTEMPT,
        method="greenhouse.v1.WateringService/WaterBed",
        request=b"\n\x05north",
        lease_ms=10_000,
        accept_timeout_ms=3_000,
        attempt_timeout_ms=600_000,
    )
    offered = ConnectResponse(messages=[OrchestratorMessage(traceparent=TRACEPARENT, offer=offer)])
    yield "offer", "The orchestrator hands out an attempt.", offered
    accepted = AgentMessage(traceparent=TRACEPARENT, accepted=Accepted(attempt=ATTEMPT))
    beat = AgentMessage(heartbeat=Heartbeat(number=9, running=[ATTEMPT], free_slots=3, loop_lag_us=250))
    yield "accepted", "The agent takes it; a heartbeat shares the batch.", ConnectRequest(messages=[accepted, beat])
    result = AgentMessage(traceparent=TRACEPARENT, result=Result(attempt=ATTEMPT, response=b"\x08\xfa\x01"))
    yield "result", "The agent's result, kept until it is acknowledged.", ConnectRequest(messages=[result])


def annotate(raw: bytes, message: Descriptor, start: int = 0, path: str = "") -> Iterator[Part]:
    """Yield each tag and value of an encoded protobuf message (protobuf.dev, "Encoding")."""
    offset = 0
    while offset < len(raw):
        tag, body = _varint(raw, offset)
        field = message.fields_by_number[tag >> 3]
        name = f"{path}{field.name}"
        if tag & 7 == 0:
            value, end = _varint(raw, body)
            yield start + offset, end - offset, name, _number(field, value)
        elif tag & 7 == 2:
            size, first = _varint(raw, body)
            end = first + size
            content = raw[first:end]
            if field.message_type is None:
                yield start + offset, end - offset, name, _shown(field, content)
            else:
                yield start + offset, first - offset, name, f"message of {size} bytes"
                yield from annotate(content, field.message_type, start + first, f"{name}.")
        else:
            raise AssertionError(f"{name} has wire type {tag & 7}, which orki's own messages do not use")
        offset = end


def _varint(raw: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, offset


def _number(field: FieldDescriptor, value: int) -> str:
    return field.enum_type.values_by_number[value].name if field.enum_type else f"{value}"


def _shown(field: FieldDescriptor, content: bytes) -> str:
    return f"{content.hex()} (hex)" if field.type == FieldDescriptor.TYPE_BYTES else f'"{content.decode()}"'


def table(raw: bytes, parts: list[Part]) -> str:
    """Return the parts as a table, and check that they cover each byte once."""
    offset = 0
    for start, size, _, _ in parts:
        assert start == offset, f"byte {offset} is in no part"
        offset += size
    assert offset == len(raw)
    lines = ["| byte | bytes | what | value |", "|---|---|---|---|"]
    lines += [f"| {a} | `{_cut(raw[a : a + n])}` | `{what}` | {value} |" for a, n, what, value in parts]
    return "\n".join(lines)


def _cut(raw: bytes) -> str:
    text = raw.hex(" ")
    return text if len(raw) <= 12 else f"{raw[:10].hex(' ')} … {raw[-1:].hex()}"


def golden(kind: str) -> Any:
    """Return the stored vectors of one kind."""
    return json.loads((WIRE / kind / "v1.json").read_text(encoding="utf-8"))


def page() -> str:
    """Return the text of `docs/wire.md`."""
    key = stream_keys(Stream(name="tasks", message="orki.events.v1.TaskEvent", retention=Retention(max_entries=1)))[0]
    out = [
        "# Wire formats",
        "",
        "One task, byte by byte: as a session message, as an entry of a stream, and in the frames of the tools that",
        "its handler calls. `tests/contract/test_wire_page.py` generates this page from the golden vectors in",
        "`tests/contract/wire`. The rules are in the protos: `proto/orki/control/v1/session.proto`,",
        "`proto/orki/events/v1/envelope.proto`, `proto/orki/hotpath/v1/frame.proto`.",
        "",
        "## Session messages",
        "",
        "A gRPC message of the session is a batch. Protobuf writes each field as a tag (number and wire type) and",
        "a value.",
    ]
    kinds: dict[str, type[Message]] = {"offer": ConnectResponse, "accepted": ConnectRequest, "result": ConnectRequest}
    for vector in golden("session"):
        raw = bytes.fromhex(vector["hex"])
        descriptor = kinds[vector["name"]].DESCRIPTOR
        out += ["", f"### {vector['shows']}", "", f"`{descriptor.full_name}`, {len(raw)} bytes.", ""]
        out += [table(raw, list(annotate(raw, descriptor)))]
    out += ["", "## Stream entries", "", f"The stream `tasks` has one partition, whose Redis key is `{key}`."]
    types: dict[str, type[Message]] = {"e": Envelope, "d": TaskEvent, "x": DeadLetter}
    for vector in golden("entry"):
        out += ["", f"### {vector['shows']}"]
        for name, text in vector["fields"].items():
            raw = bytes.fromhex(text)
            descriptor = types[name].DESCRIPTOR
            out += ["", f"Field `{name}`: `{descriptor.full_name}`, {len(raw)} bytes.", ""]
            out += [table(raw, list(annotate(raw, descriptor)))]
    out += ["", "## Frames", "", "Little-endian; a header of 56 bytes, then the block, then the tail."]
    for vector in golden("frame"):
        raw = bytes.fromhex(vector["hex"])
        out += ["", f"### {vector['shows']}", "", f"`{vector['payload']}`, {vector['bytes']} bytes.", ""]
        parts = [(p["offset"], p["size"], f"{p['where']}.{p['name']}", str(p["value"])) for p in vector["parts"]]
        out += [table(raw, sorted(parts))]
    return "\n".join(out) + "\n"


def write() -> None:
    """Write missing vectors and the page."""
    made: dict[str, list[dict[str, Any]]] = {
        "entry": [
            {"name": n, "shows": s, "fields": {k: _fixed(m).hex() for k, m in fields.items()}}
            for n, s, fields in entries()
        ],
        "session": [{"name": n, "shows": s, "hex": _fixed(m).hex()} for n, s, m in batches()],
    }
    for kind, vectors in made.items():
        target = WIRE / kind / "v1.json"
        known = golden(kind) if target.exists() else []
        names = {each["name"] for each in known}
        target.parent.mkdir(exist_ok=True)
        text = json.dumps(known + [each for each in vectors if each["name"] not in names], indent=1)
        target.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def _fixed(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


def test_the_page_matches_the_vectors() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run this file as a script and review the changes"


@pytest.mark.parametrize(("name", "_", "message"), list(batches()))
def test_session_messages_are_encoded_as_stored(name: str, _: str, message: Message) -> None:
    (known,) = [each for each in golden("session") if each["name"] == name]
    assert _fixed(message).hex() == known["hex"]
    assert type(message).FromString(bytes.fromhex(known["hex"])) == message


@pytest.mark.parametrize(("name", "_", "fields"), list(entries()))
def test_entries_are_encoded_as_stored(name: str, _: str, fields: dict[str, Message]) -> None:
    (known,) = [each for each in golden("entry") if each["name"] == name]
    assert {key: _fixed(each).hex() for key, each in fields.items()} == known["fields"]
    raw = [part for key, text in known["fields"].items() for part in (key.encode(), bytes.fromhex(text))]
    envelope, payload = split_entry(raw)
    assert decode_envelope(envelope) == fields["e"]
    assert payload == _fixed(fields["d"])


def test_a_byte_without_a_part_is_an_error() -> None:
    with pytest.raises(AssertionError, match="byte 1 is in no part"):
        table(b"abc", [(0, 1, "a", ""), (2, 1, "c", "")])


if __name__ == "__main__":
    write()
