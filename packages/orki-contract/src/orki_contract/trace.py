"""W3C Trace Context: parses and formats `traceparent`, and stores the current span.

The format is https://www.w3.org/TR/trace-context/#traceparent-header, version 00. This module does not sample or export
spans.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Span", "SpanSource", "current_span", "defer_span", "new_span", "parse_traceparent", "use_span"]

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """The identity of a span.

    Attributes:
        trace_id: 32 lower-case hex digits, not all zero.
        span_id: 16 lower-case hex digits, not all zero.
        parent_id: Id of the parent span; empty at the root or if unknown.
        flags: Trace flags, 0 to 255; bit 0 is "sampled".
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    flags: int = 1

    @property
    def traceparent(self) -> str:
        """The span as a `traceparent` value."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    def child(self) -> Span:
        """Return a new child span."""
        return Span(self.trace_id, _random_id(8), self.span_id, self.flags)


def new_span() -> Span:
    """Return the root span of a new trace."""
    return Span(_random_id(16), _random_id(8))


def parse_traceparent(value: str) -> Span | None:
    """Parse a `traceparent`; None if it is invalid (the standard says to start a new trace then)."""
    parts = value.split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
        return None
    version, trace_id, span_id, flags = parts[:4]
    if not _HEX.issuperset(version + trace_id + span_id + flags) or version == "ff":
        return None
    if (version == "00" and len(parts) != 4) or set(trace_id) == {"0"} or set(span_id) == {"0"}:
        return None
    return Span(trace_id, span_id, "", int(flags, 16))


class SpanSource(Protocol):
    """Something that makes a span when it is first used."""

    def resolve_span(self) -> Span | None:
        """Return the span, the same at each call."""
        ...


_current: ContextVar[Span | SpanSource | None] = ContextVar("orki_span", default=None)


def current_span() -> Span | None:
    """Return the span of the calling code."""
    found = _current.get()
    return found if found is None or isinstance(found, Span) else found.resolve_span()


def defer_span(source: SpanSource) -> None:
    """Make the span of `source` the current one of this task until it sets another; it is made when it is needed."""
    _current.set(source)


@contextmanager
def use_span(span: Span | None) -> Iterator[None]:
    """Make `span` the current span inside the `with` block, as the runtimes do for every handler."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


def _random_id(size: int) -> str:
    # All zeros is not a valid id, and os.urandom may give it.
    while not any(drawn := os.urandom(size)):
        pass
    return drawn.hex()
