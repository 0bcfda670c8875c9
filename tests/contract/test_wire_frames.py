"""The golden frames in `wire/frame/`: every kind of frame, with a name for each byte.

Vectors may be added but never changed, because later versions must read the frames of older peers. After adding one,
run this file as a script to write it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

import orki_contract as oc
from orki.errors.v1.errors_pb2 import Reason
from orki.hotpath.v1.frame_orki import FrameHeader
from orki.hotpath.v1.tool_orki import (
    CancelFrame,
    ContractAnswerFrame,
    ContractFrame,
    ErrorFrame,
    HelloFrame,
    WelcomeFrame,
)
from orki.hotpath.v1.tool_pb2 import ControlOpcode
from orki_agent.hotpath.frames import (
    HEADER_BYTES,
    NO_TRACE,
    OP_CONTRACT,
    FrameDecoder,
    encode_call,
    encode_cancel,
    encode_error,
    encode_hello,
    encode_reply,
    encode_welcome,
    pack_span,
)
from orki_contract.errors import PeerRefused, ToolFailed
from orki_contract.trace import Span

GOLDEN = Path(__file__).with_name("wire") / "frame" / "v1.json"
SPAN = Span("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


@oc.frame("example.v1.ReadRequest", version=2, block_length=24)
class ReadRequest(oc.FrameBase):
    """A tool's request with most scalar types, a gap, and a field that came later."""

    offset: int = oc.at(0, oc.Scalar.U64, number=1)
    delta: int = oc.at(8, oc.Scalar.I16, number=2)
    whole: bool = oc.at(10, oc.Scalar.BOOL, number=3)
    path: str = oc.tail(default="")
    scale: float | None = oc.at(16, oc.Scalar.F64, number=5, since=2, default=None)


@oc.frame("example.v1.ReadResponse", version=1, block_length=8)
class ReadResponse(oc.FrameBase):
    """A tool's response: a number and bytes."""

    length: int = oc.at(0, oc.Scalar.U32, number=1)
    content: bytes = oc.tail(default=b"")


PAYLOADS: dict[str, Any] = {
    each.FRAME.message: each
    for each in (
        HelloFrame,
        WelcomeFrame,
        ContractFrame,
        ContractAnswerFrame,
        ErrorFrame,
        CancelFrame,
        ReadRequest,
        ReadResponse,
    )
}


def vectors() -> Iterator[tuple[str, str, str, bytes]]:
    """Yield the name, description, payload's full name and bytes of each vector."""
    read = ReadRequest(offset=1 << 40, delta=-2, whole=True, path="src/ä.py", scale=0.5)
    hello = HelloFrame(token=bytes(range(32)), protocol_min=1, protocol_max=1, client="reviewer-1")
    welcome = WelcomeFrame(max_frame_bytes=16 << 20, max_calls=128, protocol=1)
    yield "hello", "A client opens a connection.", "orki.hotpath.v1.HelloFrame", encode_hello(hello)
    yield "welcome", "The bridge accepts it.", "orki.hotpath.v1.WelcomeFrame", encode_welcome(welcome)
    refused = encode_error(0, PeerRefused("the token is not this bridge's"))
    yield (
        "refusal",
        "The bridge refuses a connection. Correlation 0 belongs to no call.",
        "orki.hotpath.v1.ErrorFrame",
        refused,
    )
    request = ContractFrame(digest=bytes(range(32)), service="example.v1.FileToolService").encode()
    contract = encode_call(OP_CONTRACT, 32, 1, 1, 5_000_000, NO_TRACE, request)
    yield (
        "contract",
        "Before its first call of a service, a client asks for the bridge's contract of that service.",
        "orki.hotpath.v1.ContractFrame",
        contract,
    )
    contract_answer = ContractAnswerFrame(digest=bytes(range(32)), served=True).encode()
    answer = encode_reply(OP_CONTRACT, 40, 1, 1, contract_answer)
    yield (
        "agreement",
        "The bridge has the same contract, so its answer contains no image.",
        "orki.hotpath.v1.ContractAnswerFrame",
        answer,
    )
    call = encode_call(0x0101, 24, 2, 1, 250_000, pack_span(SPAN), read.encode())
    yield "call", "A call whose request is a frame, traced, with 250 ms to go.", "example.v1.ReadRequest", call
    response = ReadResponse(length=5, content=b"hello")
    reply = encode_reply(0x0101, 8, 1, 1, response.encode())
    yield "reply", "Its reply: same opcode, same correlation.", "example.v1.ReadResponse", reply
    failed = encode_error(1, ToolFailed("no such file", code=-2))
    yield "error", "A call that fails with an error code of the tool.", "orki.hotpath.v1.ErrorFrame", failed
    yield "cancel", "The caller asks for the end of call 7.", "orki.hotpath.v1.CancelFrame", encode_cancel(7)
    older = encode_call(0x0101, 16, 1, 2, 0, NO_TRACE, read.encode()[:16] + read.path.encode())
    yield "call-older", "A call by a client of version 1: its block is shorter.", "example.v1.ReadRequest", older
    text = StringValue(value="src/a.py").SerializeToString()
    message = encode_call(0x0102, 0, 0, 3, 1_000_000, NO_TRACE, text)
    yield "call-message", "A call whose request is a protobuf message.", "google.protobuf.StringValue", message


def as_json(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


def parts(kind: str, whole: bytes) -> list[dict[str, object]]:
    """Return the named parts of a frame: header, block and tail, without gaps."""
    header = FrameHeader.decode(whole[:HEADER_BYTES], HEADER_BYTES)
    found = named("header", FrameHeader.FRAME, header, whole[:HEADER_BYTES], 0, HEADER_BYTES)
    block = header.block_length
    body = whole[HEADER_BYTES:]
    if kind not in PAYLOADS:
        return [*found, part("tail", "message", HEADER_BYTES, body, body.hex())]
    payload = PAYLOADS[kind]
    values = payload.decode(body, block, header.block_version)
    found += named("block", payload.FRAME, values, body[:block], HEADER_BYTES, block)
    if payload.FRAME.tail:
        found.append(
            part("tail", payload.FRAME.tail, HEADER_BYTES + block, body[block:], getattr(values, payload.FRAME.tail))
        )
    return found


def named(where: str, layout: oc.Frame, values: object, raw: bytes, start: int, length: int) -> list[dict[str, object]]:
    found, at = [], 0
    for field in layout.fields:
        if field.offset + field.size > length:
            break
        if field.offset > at:
            found.append(part(where, "(reserved)", start + at, raw[at : field.offset], None))
        at = field.offset + field.size
        found.append(part(where, field.name, start + field.offset, raw[field.offset : at], getattr(values, field.name)))
    if at < length:
        found.append(part(where, "(reserved)", start + at, raw[at:length], None))
    return found


def part(where: str, name: str, offset: int, raw: bytes, value: object) -> dict[str, object]:
    return {"where": where, "name": name, "offset": offset, "size": len(raw), "hex": raw.hex(), "value": as_json(value)}


def rendered() -> list[dict[str, object]]:
    """Return all vectors in the form of the file."""
    return [
        {
            "name": name,
            "shows": shows,
            "payload": kind,
            "bytes": len(whole),
            "hex": whole.hex(),
            "parts": parts(kind, whole),
        }
        for name, shows, kind, whole in vectors()
    ]


def golden() -> list[dict[str, Any]]:
    stored: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return stored


def test_the_encoder_still_writes_the_stored_vectors() -> None:
    assert golden() == rendered()


@pytest.mark.parametrize("vector", golden() if GOLDEN.exists() else [], ids=lambda vector: vector["name"])
def test_a_stored_vector_is_decoded_and_each_byte_has_a_name(vector: dict[str, Any]) -> None:
    whole = bytes.fromhex(vector["hex"])
    assert len(whole) == vector["bytes"]
    assert whole[0] == 0xF7
    [frame] = FrameDecoder(1 << 20).feed(whole)
    assert bytes(frame.body) == whole[HEADER_BYTES:]
    at = 0
    for each in vector["parts"]:
        assert (each["offset"], whole[at : at + each["size"]].hex()) == (at, each["hex"])
        at += each["size"]
    assert at == len(whole)


def test_every_kind_of_frame_has_a_vector() -> None:
    kinds = {vector["payload"] for vector in golden()}
    opcodes = {vector["parts"][3]["value"] for vector in golden()}
    assert kinds >= set(PAYLOADS)
    assert opcodes >= set(ControlOpcode.values()) - {0}
    reasons = {each["value"] for vector in golden() for each in vector["parts"] if each["name"] == "reason"}
    assert reasons == {Reason.REASON_PEER_REFUSED, Reason.REASON_TOOL_FAILED}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(rendered(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}\n")
