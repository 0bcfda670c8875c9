"""Usage of language models from OpenTelemetry spans; needs the extra `orki-agent[opentelemetry]`.

Instrumentations of model clients describe each request by a span with attributes of the semantic conventions for
generative AI (`gen_ai.*`). `UsageSpanProcessor` records such a span as `ctx.usage(...)` of the handler that made it:

    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    provider.add_span_processor(UsageSpanProcessor())
    trace.set_tracer_provider(provider)
"""

from __future__ import annotations

__all__ = ["UsageSpanProcessor"]

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from orki_agent._budget import BudgetUsedUp
from orki_agent._execution import CURRENT_CONTEXT, HandlerContext
from orki_contract.errors import OrkiError

_OPERATIONS: Final = frozenset({"chat", "completion", "text_completion", "generate_content", "embeddings"})
"""Operations that are one request to a model. Spans of agents and tools repeat the usage of the requests below them."""
_MODEL: Final = ("gen_ai.response.model", "gen_ai.request.model")
_PROVIDER: Final = ("gen_ai.provider.name", "gen_ai.system")
_INPUT: Final = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT: Final = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_CACHED: Final = ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cached_input_tokens")
_MOST_OPEN: Final = 10_000
"""Maximum number of open spans to remember. The oldest are forgotten; they count for the handler that ends them."""
_log = logging.getLogger("orki.agent")


@dataclass(slots=True)
class _Open:
    """A span that has not ended: the handler that started it, and whether a span below it was recorded."""

    context: HandlerContext | None
    recorded: bool = False


class UsageSpanProcessor(SpanProcessor):
    """Records ended spans of requests to language models as usage of the handler in which they started.

    A request that several instrumentations describe, one span inside the other, is recorded once: the innermost span
    with token counts. Spans outside of handlers, spans of other operations, and spans without token counts are ignored.
    A span whose attributes are invalid is logged. Errors never reach the code that ends the span. If a budget is used
    up, the next call of the handler's context raises `BudgetUsedUp`.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._guard = threading.Lock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Remember the handler in which a span starts."""
        if span.context is None:
            return
        with self._guard:
            self._open[span.context.span_id] = _Open(CURRENT_CONTEXT.get())
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)

    def on_end(self, span: ReadableSpan) -> None:
        """Record the span if it is a request to a model."""
        if span.context is None:
            return
        attributes = span.attributes or {}
        with self._guard:
            known = self._open.pop(span.context.span_id, None) or _Open(CURRENT_CONTEXT.get())
            counted = not known.recorded and _is_request(attributes)
            above = self._open.get(span.parent.span_id) if span.parent is not None else None
            if above is not None and (counted or known.recorded):
                above.recorded = True
        if counted and known.context is not None:
            _record(known.context, attributes)

    def shutdown(self) -> None:
        """Forget all open spans."""
        with self._guard:
            self._open.clear()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return true: usage is recorded when a span ends."""
        return True


def _is_request(attributes: Mapping[str, Any]) -> bool:
    if attributes.get("gen_ai.operation.name") not in _OPERATIONS:
        return False
    return any(name in attributes for name in (*_INPUT, *_OUTPUT))


def _record(context: HandlerContext, attributes: Mapping[str, Any]) -> None:
    try:
        context.usage(
            model=str(_first(attributes, _MODEL) or "unknown"),
            provider=str(_first(attributes, _PROVIDER) or ""),
            input_tokens=_first(attributes, _INPUT) or 0,
            output_tokens=_first(attributes, _OUTPUT) or 0,
            cached_tokens=_first(attributes, _CACHED) or 0,
        )
    except BudgetUsedUp:
        pass  # It was recorded. A span ends anywhere in the client's code, so the handler's next call raises it.
    except OrkiError as error:
        _log.warning("the usage of a span was not recorded for task %s: %s", context.task_id, error.message)


def _first(attributes: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((attributes[name] for name in names if name in attributes), None)
