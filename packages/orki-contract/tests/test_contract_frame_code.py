"""The flat code of a frame class does what the general form does, and a frame made by it is one like any other."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orki_contract as oc
from orki_contract.errors import FrameMalformed


@oc.frame("a.v1.Nothing", version=1, block_length=0)
class Nothing(oc.FrameBase):
    """No field at all."""


@oc.frame("a.v1.Single", version=1, block_length=8)
class Single(oc.FrameBase):
    """One field, and reserved bytes."""

    only: int = oc.at(0, oc.Scalar.U32, number=1)


@oc.frame("a.v1.Odd", version=3, block_length=16)
class Odd(oc.FrameBase):
    """Field names that the generated code also uses, and a tail between the fields."""

    made: int = oc.at(8, oc.Scalar.I32, number=2)
    cls: bytes = oc.at(0, oc.Scalar.BYTES, number=1, size=3)
    body: bytes = oc.tail(default=b"")
    new: int | None = oc.at(12, oc.Scalar.I8, number=3, since=2, default=None)
    self: int | None = oc.at(13, oc.Scalar.U8, number=4, since=3, default=None)


def general_encode(frame: Any) -> bytes:
    return oc.FrameBase.encode(frame)


def general_decode(cls: type[Any], *arguments: Any) -> Any:
    return vars(oc.FrameBase)["decode"].__func__(cls, *arguments)


def outcome(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except FrameMalformed as error:
        return str(error)


anything = st.one_of(st.integers(-300, 2**33), st.binary(max_size=4), st.none(), st.text(max_size=2), st.floats())


@given(anything, anything, anything, anything, anything)
def test_both_forms_write_the_same_or_refuse_in_the_same_words(
    made: Any, key: Any, body: Any, new: Any, own: Any
) -> None:
    frame = Odd(made, key, body, new, own)
    assert outcome(frame.encode) == outcome(general_encode, frame)


@given(st.binary(max_size=40), st.integers(0, 20), st.integers(0, 4))
def test_both_forms_read_the_same_or_refuse_in_the_same_words(body: bytes, length: int, version: int) -> None:
    for cls in (Nothing, Single, Odd):
        flat = outcome(cls.decode, body, length, version)
        assert flat == outcome(general_decode, cls, body, length, version)
        assert flat == outcome(cls.decode, memoryview(body), length, version)


def test_a_decoded_frame_is_frozen_and_can_be_copied_replaced_and_pickled() -> None:
    read = Odd.decode(Odd(5, b"abc", b"tail", 6, 7).encode(), 16, 3)
    assert type(read) is Odd
    assert read == Odd(made=5, cls=b"abc", body=b"tail", new=6, self=7)
    assert hash(read) == hash(Odd(5, b"abc", b"tail", 6, 7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.made = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del read.made
    assert copy.copy(read) == copy.deepcopy(read) == pickle.loads(pickle.dumps(read)) == read
    assert dataclasses.replace(read, made=8) == Odd(8, b"abc", b"tail", 6, 7)
    assert dataclasses.asdict(read) == {"made": 5, "cls": b"abc", "body": b"tail", "new": 6, "self": 7}
    assert repr(read) == "Odd(made=5, cls=b'abc', body=b'tail', new=6, self=7)"


@pytest.mark.parametrize(
    ("positional", "named", "says"),
    [
        ((), {}, "missing 2 required positional arguments: 'made' and 'cls'"),
        ((1, b"abc"), {"made": 1}, "multiple values for argument 'made'"),
        ((1, b"abc"), {"other": 1}, "unexpected keyword argument 'other'"),
        ((1, b"abc", b"", 1, 1, 1), {}, "positional arguments but 7 were given"),
    ],
)
def test_wrong_arguments_raise_type_errors_like_a_python_function(positional: Any, named: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Odd(*positional, **named)


def test_a_subclass_is_decoded_as_itself() -> None:
    class Wider(Single):
        """With a dictionary of attributes, unlike its base."""

        @property
        def doubled(self) -> int:
            return 2 * self.only

    read = Wider.decode(Single(21).encode(), 8, 1)
    assert type(read) is Wider
    assert read.doubled == 42
    assert Wider(3).encode() == Single(3).encode()
