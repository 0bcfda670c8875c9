"""Numbers that a message or an enum will never use again."""

from __future__ import annotations

__all__ = ["reserves", "withdrawn"]

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto


def reserves(proto: DescriptorProto | EnumDescriptorProto, number: int) -> bool:
    """Whether a number is reserved."""
    return any(start <= number < end for start, end in _ranges(proto))


def withdrawn(
    before: DescriptorProto | EnumDescriptorProto, after: DescriptorProto | EnumDescriptorProto
) -> int | None:
    """The lowest number that was reserved before and is not any more; None for none."""
    kept = _ranges(after)
    for start, end in _ranges(before):
        at = start
        for first, behind in kept:
            if first <= at < behind:
                at = behind
        if at < end:
            return at
    return None


def _ranges(proto: DescriptorProto | EnumDescriptorProto) -> list[tuple[int, int]]:
    """The reserved ranges in order, each from its first number to the one behind its last."""
    # An enum's range includes its end, a message's does not.
    more = 1 if proto.DESCRIPTOR.name == "EnumDescriptorProto" else 0
    return sorted((each.start, each.end + more) for each in proto.reserved_range)
