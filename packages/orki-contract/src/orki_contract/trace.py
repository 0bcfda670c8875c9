"""W3C Trace Context without a tracing library: parse and print `traceparent`, and carry the current span.

The format is https://www.w3.org/TR/trace-context/#traceparent-header, version 00. Nothing here samples or exports: a
span is an identity that travels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Span", "current_span", "new_span", "parse_traceparent", "use_span"]

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """One span's identity.

    Attributes:
        trace_id: 32 lower-case hex digits, not all zero.
        span_id: 16 lower-case hex digits, not all zero.
        parent_id: Span above it, or empty at the root or where it is not known.
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
        """A new span below this one."""
        return Span(self.trace_id, _random_id(8), self.span_id, self.flags)


def new_span() -> Span:
    """The root of a new trace."""
    return Span(_random_id(16), _random_id(8))


def parse_traceparent(value: str) -> Span | None:
    """The span that a `traceparent` names, or None where it names none (the standard says: then start anew)."""
    parts = value.split("-")
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
        return None
    version, trace_id, span_id, flags = parts[:4]
    if not _HEX.issuperset(version + trace_id + span_id + flags) or version == "ff":
        return None
    if (version == "00" and len(parts) != 4) or set(trace_id) == {"0"} or set(span_id) == {"0"}:
        return None
    return Span(trace_id, span_id, "", int(flags, 16))


_current: ContextVar[Span | None] = ContextVar("orki_span", default=None)


def current_span() -> Span | None:
    """The span in which the calling code runs."""
    return _current.get()


@contextmanager
def use_span(span: Span | None) -> Iterator[None]:
    """Makes `span` the current one inside the `with` block; the runtimes do this around every handler."""
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
