"""Usage from OpenTelemetry spans: which spans are recorded, once, and for which handler."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names
from opentelemetry.trace import Tracer

from orki_agent import opentelemetry
from orki_agent.testing import run_handler

CHAT = {
    names.GEN_AI_OPERATION_NAME: "chat",
    names.GEN_AI_PROVIDER_NAME: "acme",
    names.GEN_AI_REQUEST_MODEL: "small",
    names.GEN_AI_RESPONSE_MODEL: "small-2026",
    names.GEN_AI_USAGE_INPUT_TOKENS: 30,
    names.GEN_AI_USAGE_OUTPUT_TOKENS: 4,
}


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(opentelemetry.UsageSpanProcessor())
    yield provider.get_tracer("test")
    provider.shutdown()


async def used(work: SimpleNamespace, body: Any) -> list[tuple[str, str, int, int, int]]:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            await body()
            return work.WorkResponse()

    run = await run_handler(Service().work, work.WorkRequest())
    assert run.failure is None
    return [
        (each.provider, each.model, each.input_tokens, each.output_tokens, each.cached_tokens) for each in run.usage
    ]


async def test_a_request_to_a_model_is_recorded(work: SimpleNamespace, tracer: Tracer) -> None:
    async def body() -> None:
        with tracer.start_as_current_span("chat small") as span:
            await asyncio.sleep(0)
            span.set_attributes({**CHAT, "gen_ai.usage.cache_read.input_tokens": 10})

    assert await used(work, body) == [("acme", "small-2026", 30, 4, 10)]


async def test_older_names_of_attributes_are_known(work: SimpleNamespace, tracer: Tracer) -> None:
    async def body() -> None:
        older = {"gen_ai.system": "acme", "gen_ai.usage.prompt_tokens": 1, "gen_ai.usage.completion_tokens": 2}
        with tracer.start_as_current_span("chat") as span:
            span.set_attributes({"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", **older})

    assert await used(work, body) == [("acme", "m", 1, 2, 0)]


async def test_a_request_that_several_spans_describe_is_recorded_once(work: SimpleNamespace, tracer: Tracer) -> None:
    async def body() -> None:
        with tracer.start_as_current_span("chat", attributes={**CHAT, names.GEN_AI_PROVIDER_NAME: "framework"}):
            with tracer.start_as_current_span("http"), tracer.start_as_current_span("chat", attributes=CHAT):
                pass
            with tracer.start_as_current_span("chat", attributes={**CHAT, names.GEN_AI_USAGE_INPUT_TOKENS: 5}):
                pass

    assert await used(work, body) == [("acme", "small-2026", 30, 4, 0), ("acme", "small-2026", 5, 4, 0)]


@pytest.mark.parametrize("operation", ["invoke_agent", "execute_tool", "", None])
async def test_other_operations_are_ignored(work: SimpleNamespace, tracer: Tracer, operation: str | None) -> None:
    attributes = {**CHAT, names.GEN_AI_OPERATION_NAME: operation or ""}
    if operation is None:
        del attributes[names.GEN_AI_OPERATION_NAME]

    async def body() -> None:
        with tracer.start_as_current_span("other", attributes=attributes):
            pass

    assert await used(work, body) == []


async def test_handlers_that_run_at_once_have_their_own_usage(work: SimpleNamespace, tracer: Tracer) -> None:
    async def one(count: int) -> list[tuple[str, str, int, int, int]]:
        async def body() -> None:
            with tracer.start_as_current_span("chat") as span:
                await asyncio.sleep(0.01)
                span.set_attributes({**CHAT, names.GEN_AI_USAGE_INPUT_TOKENS: count})

        return await used(work, body)

    found = await asyncio.gather(*map(one, range(1, 6)))
    assert [[each[2] for each in usage] for usage in found] == [[1], [2], [3], [4], [5]]


async def test_a_span_that_ends_elsewhere_counts_for_the_handler_that_started_it(
    work: SimpleNamespace, tracer: Tracer
) -> None:
    async def body() -> None:
        span = tracer.start_span("chat", attributes=CHAT)
        thread = threading.Thread(target=span.end)  # It does not have the handler's context.
        thread.start()
        thread.join()

    assert len(await used(work, body)) == 1


async def test_a_blocking_handler_is_known(work: SimpleNamespace, tracer: Tracer) -> None:
    class Service(work.GrindServiceSyncBase):  # type: ignore[misc, name-defined]
        def work(self, request: Any, ctx: Any) -> Any:
            with tracer.start_as_current_span("chat", attributes=CHAT):
                return work.WorkResponse()

    run = await run_handler(Service().work, work.WorkRequest())
    assert [each.model for each in run.usage] == ["small-2026"]


async def test_invalid_counts_are_logged_and_do_not_reach_the_handler(
    work: SimpleNamespace, tracer: Tracer, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        with tracer.start_as_current_span("chat", attributes={**CHAT, names.GEN_AI_USAGE_INPUT_TOKENS: -1}):
            pass
        with tracer.start_as_current_span("chat", attributes={**CHAT, names.GEN_AI_USAGE_INPUT_TOKENS: "many"}):
            pass

    with caplog.at_level(logging.WARNING, "orki.agent"):
        assert await used(work, body) == []
    assert len([each for each in caplog.records if "was not recorded" in each.message]) == 2


def test_spans_outside_of_handlers_are_ignored(tracer: Tracer, caplog: pytest.LogCaptureFixture) -> None:
    with tracer.start_as_current_span("chat", attributes=CHAT):
        pass
    assert caplog.records == []


def test_open_spans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opentelemetry, "_MOST_OPEN", 10)
    processor = opentelemetry.UsageSpanProcessor()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    spans = [provider.get_tracer("test").start_span("chat", attributes=CHAT) for _ in range(100)]
    assert len(processor._open) == 10
    for span in spans:
        span.end()
    assert len(processor._open) == 0
