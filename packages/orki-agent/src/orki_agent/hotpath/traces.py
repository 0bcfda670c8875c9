"""The 28 bytes of a frame's header that carry the trace: flags, three reserved bytes, trace id, span id."""

from __future__ import annotations

from contextvars import Context, copy_context

from orki_agent.hotpath.frames import NO_TRACE
from orki_contract.trace import Span, use_span

__all__ = ["context_in", "pack_span", "unpack_span"]

_NO_ID_BYTES = (bytes(16), bytes(8))


def pack_span(span: Span | None) -> bytes:
    """The header's bytes for a span, or for none."""
    if span is None:
        return NO_TRACE
    return b"%c\0\0\0%b%b" % (span.flags, bytes.fromhex(span.trace_id), bytes.fromhex(span.span_id))


def unpack_span(trace: bytes) -> Span | None:
    """The span that the header names, or None where either id is zero (W3C: such a context is no context)."""
    trace_id, span_id = trace[4:20], trace[20:28]
    if trace_id == _NO_ID_BYTES[0] or span_id == _NO_ID_BYTES[1]:
        return None
    return Span(trace_id.hex(), span_id.hex(), "", trace[0])


def context_in(span: Span | None) -> Context:
    """A context that holds the span and nothing else; each call runs in a copy of it."""

    def capture() -> Context:
        with use_span(span):
            return copy_context()

    return Context().run(capture)
