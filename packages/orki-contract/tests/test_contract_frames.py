"""Frame classes: values round-trip, any bytes decode or raise, and versions are compatible."""

from __future__ import annotations

import struct
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orki_contract as oc
from orki_contract.errors import FrameMalformed


@oc.frame("a.v1.Reading", version=1, block_length=32)
class Reading(oc.FrameBase):
    """The first version."""

    when: int = oc.at(0, oc.Scalar.I64, number=1)
    level: int = oc.at(8, oc.Scalar.U16, number=2)
    good: bool = oc.at(10, oc.Scalar.BOOL, number=3)
    key: bytes = oc.at(16, oc.Scalar.BYTES, number=4, size=4)
    note: str = oc.tail(default="")


@oc.frame("a.v1.Reading", version=2, block_length=40)
class LaterReading(oc.FrameBase):
    """The second one: a field in reserved bytes, and one behind."""

    when: int = oc.at(0, oc.Scalar.I64, number=1)
    level: int = oc.at(8, oc.Scalar.U16, number=2)
    good: bool = oc.at(10, oc.Scalar.BOOL, number=3)
    key: bytes = oc.at(16, oc.Scalar.BYTES, number=4, size=4)
    note: str = oc.tail(default="")
    ratio: float | None = oc.at(24, oc.Scalar.F64, number=5, since=2, default=None)
    extra: int | None = oc.at(32, oc.Scalar.U32, number=6, since=2, default=None)


readings = st.builds(
    Reading,
    when=st.integers(-(2**63), 2**63 - 1),
    level=st.integers(0, 2**16 - 1),
    good=st.booleans(),
    key=st.binary(min_size=4, max_size=4),
    note=st.text(st.characters(exclude_categories=["Cs"])),
)


@given(readings)
def test_an_encoded_frame_decodes_to_an_equal_frame(frame: Reading) -> None:
    wire = frame.encode()
    assert wire[:32] == struct.pack("<qH?5x4s12x", frame.when, frame.level, frame.good, frame.key)
    assert Reading.decode(wire, 32) == frame
    assert Reading.decode(memoryview(wire), 32) == frame


@given(st.binary(max_size=80), st.integers(0, 96), st.integers(0, 3))
def test_any_bytes_are_read_or_refused(body: bytes, block_length: int, version: int) -> None:
    for cls in (Reading, LaterReading):
        short = len(body) < block_length or block_length < 20
        try:
            frame = cls.decode(body, block_length, version)
        except FrameMalformed:
            refused = True
        else:
            refused = False
            assert isinstance(frame, cls)
        # Beyond that only the tail's text may be refused, and a block that ends within a field of version 1.
        assert refused or not short


@given(readings)
def test_peers_of_different_versions_decode_each_others_frames(frame: Reading) -> None:
    later = LaterReading.decode(frame.encode(), 32, 1)
    assert (later.when, later.note, later.ratio, later.extra) == (frame.when, frame.note, None, None)
    newer = LaterReading(frame.when, frame.level, frame.good, frame.key, frame.note, ratio=0.5, extra=7)
    assert Reading.decode(newer.encode(), 40, 2) == frame


def test_a_newer_class_must_set_all_fields_of_its_version() -> None:
    with pytest.raises(FrameMalformed, match="ratio = None: a frame of version 2 requires it"):
        LaterReading(1, 2, True, b"abcd").encode()


def test_a_frame_is_a_value() -> None:
    frame = Reading(1, 2, True, b"abcd")
    assert frame == Reading(when=1, level=2, good=True, key=b"abcd", note="")
    assert hash(frame) == hash(Reading(1, 2, True, b"abcd"))
    assert not hasattr(frame, "__dict__")
    with pytest.raises(FrozenInstanceError):
        frame.when = 2  # type: ignore[misc]


def test_the_layout_matches_the_class() -> None:
    assert (
        oc.Frame(
            message="a.v1.Reading",
            version=1,
            block_length=32,
            fields=(
                oc.FrameField(offset=0, name="when", number=1, scalar=oc.Scalar.I64, size=8),
                oc.FrameField(offset=8, name="level", number=2, scalar=oc.Scalar.U16, size=2),
                oc.FrameField(offset=10, name="good", number=3, scalar=oc.Scalar.BOOL, size=1),
                oc.FrameField(offset=16, name="key", number=4, scalar=oc.Scalar.BYTES, size=4),
            ),
            tail="note",
            tail_text=True,
        )
        == Reading.FRAME
    )
    cls: type[oc.FrameType] = Reading
    assert isinstance(cls.decode(bytes(32), 32), oc.FrameType)
