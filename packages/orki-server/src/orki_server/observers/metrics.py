"""The metrics observer: figures of the fleet for Prometheus, at `/metrics`.

It consumes the group `metrics` of orki's own streams, looks at the streams and groups themselves every second, and
follows the agents' lives from their stream's beginning, so that the number of connected agents is right after a
restart.
"""

from __future__ import annotations

__all__ = ["MetricsOptions", "run_metrics"]

import asyncio
import logging
import socket
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.task_orki import TASKS
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.usage_orki import USAGE
from orki_contract import EventStream
from orki_contract.errors import InvalidSetting, OrkiError, UnknownStream
from orki_events import EventOptions, Events, RegisteredStream, connect
from orki_events.connection import Connection, parse_address
from orki_server.observers.http_server import serve_http
from orki_server.observers.merged_reader import MergedReader
from orki_server.observers.metrics_book import MetricsBook
from orki_server.observers.process import ServerOptions, announce
from orki_server.observers.registered import follow_registered
from orki_server.observers.stream_figures import stream_figures

_log = logging.getLogger("orki.metrics")

_GROUP: Final = "metrics"
_BATCH: Final = 500
_AGAIN_S: Final = 1.0
_STREAMS: Final[tuple[EventStream[Any, Any], ...]] = (AGENTS, TASKS, TOOLS, USAGE)
_AGENT_STEPS: Final = ("spawned", "connected", "disconnected", "replaced", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsOptions:
    """How the observer behaves.

    Attributes:
        server: Where it answers. With a port of its own, its consumer has the same name at every start, and takes up at
            once what it had not acknowledged; with any free port, after the groups' acknowledgement deadline.
    """

    server: ServerOptions = field(default_factory=ServerOptions)


async def run_metrics(redis_url: str, options: MetricsOptions, stopped: asyncio.Event) -> None:
    """Counts and serves until `stopped` is set.

    Raises:
        InvalidSetting: The port is taken, or the URL cannot be used.
        OrkiError: The event server refuses, for a reason that time does not mend.
    """
    book = MetricsBook()
    port = options.server.port
    consumer = f"metrics.{socket.gethostname()}.{port}" if port else None
    events = connect(redis_url, options=EventOptions(dedupe_window=0))
    link = Connection(parse_address(redis_url), name="orki:metrics", connect_timeout=5.0, answer_timeout=10.0)
    agents = Connection(parse_address(redis_url), name="orki:metrics:agents", connect_timeout=5.0, answer_timeout=10.0)
    app = web.Application()
    app.router.add_get("/metrics", _exposition(book))
    async with serve_http(app, options.server) as url, events:
        announce("metrics", f"{url}/metrics")
        tasks = [asyncio.create_task(_count(events, each, book, consumer, stopped)) for each in _STREAMS]
        tasks.append(asyncio.create_task(_follow_agents(agents, book)))

        async def look(streams: list[RegisteredStream]) -> None:
            book.set_streams(await stream_figures(link, streams))

        try:
            await follow_registered(events, stopped, look, _log)
        finally:
            tasks[-1].cancel()
            await events.close()
            await asyncio.gather(*tasks, return_exceptions=True)
            await link.close()
            await agents.close()


def _exposition(book: MetricsBook) -> Any:
    async def answer(request: web.Request) -> web.Response:
        if request.query:
            return web.json_response({"error": "/metrics takes no parameters"}, status=400)
        # The header as Prometheus wants it; aiohttp would refuse the charset inside of it.
        return web.Response(body=book.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return answer


async def _count(
    events: Events, stream: EventStream[Any, Any], book: MetricsBook, consumer: str | None, stopped: asyncio.Event
) -> None:
    name = stream.contract.name
    while not stopped.is_set():
        try:
            source = events.delivery_batches(stream, group=_GROUP, size=_BATCH, consumer=consumer)
            async with source as batches:
                async for batch in batches:
                    async with batch as found:
                        for envelope, event in zip(batch.envelopes, found, strict=True):
                            book.count(name, envelope.event_id, envelope.time_us, event)
        except OrkiError as error:
            if isinstance(error, InvalidSetting):
                raise
            _log.error('the stream "%s" cannot be read: %s', name, error.message)
            await asyncio.sleep(_AGAIN_S)


async def _follow_agents(link: Connection, book: MetricsBook) -> None:
    reader = None
    while True:
        try:
            if reader is None:
                fresh = MergedReader(link, names=[AGENTS.contract.name], cursors={})
                await fresh.start()
                reader = fresh
            for _, view in await reader.read():
                body = view.body or {}
                step = next((each for each in _AGENT_STEPS if each in body), "")
                book.follow_agent(str(body.get("agent_id", "")), str(body.get("instance_id", "")), step)
        except OrkiError as error:
            if not isinstance(error, UnknownStream):
                _log.info("the agents cannot be followed now: %s", error.message)
            await asyncio.sleep(_AGAIN_S)


if __name__ == "__main__":
    from orki_server.cli.observe import metrics

    metrics()
