"""The metrics observer: serves the fleet's metrics to Prometheus at `/metrics`.

It consumes the group `metrics` of orki's own streams, and polls the state of streams, groups and the server every
second. It reads the number of connected agents from the store, if that is on the same server. Otherwise it follows the
stream of agent events from its beginning, and may miss agents whose events were trimmed.

The number of time series is bounded: of each family, at most `MAX_SERIES` combinations of labels are kept apart. All
further ones are counted together, with every label `other`, and `orki_folded_series` tells their families.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import resources
from typing import Any, Final, cast

import prometheus_client
from aiohttp import web
from google.protobuf.message import Message
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentEvent
from orki.events.v1.task_orki import TASKS
from orki.events.v1.task_pb2 import TaskEvent
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract import EventStream
from orki_contract.errors import InvalidSetting, OrkiError, UnknownStream
from orki_events import EventOptions, Events, StreamVersion, connect
from orki_events.connection import Connection, parse_address
from orki_server._health.findings import (
    VERDICTS,
    Check,
    check_dead_letters,
    check_groups,
    check_losses,
    check_server,
    replicas,
)
from orki_server._health.probe import ServerProbe
from orki_server._observers.entries import DRAIN_TIMEOUT, MultiStreamReader, poll_registry
from orki_server._observers.http_server import serve_http
from orki_server._observers.redaction import reason_text
from orki_server._observers.stream_stats import StreamStats, read_stream_stats
from orki_server._process import print_ready_line
from orki_server._store.fleet import count_connected

MAX_SERIES: Final = 500
"""Maximum number of combinations of labels in one family."""
OTHER: Final = "other"
"""The value of every label where further combinations are counted together."""
_MAX_SEEN_EVENTS: Final = 100_000
_TOOL_BUCKETS: Final = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
_TASK_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0)
_MAX_OPEN_TASKS: Final = 200_000
_GROUP: Final = "metrics"
_BATCH: Final = 500
_RETRY_DELAY: Final = 1.0
_PROBE_TIMEOUT: Final = 2.0
_HEALTH_INTERVAL: Final = 1.0
_COUNT_INTERVAL: Final = 2.0
"""Seconds between two counts of the agents, which read all of them."""
_STREAMS: Final[tuple[EventStream[Any, Any], ...]] = (AGENTS, TASKS, TOOLS, USAGE)
_AGENT_STEPS: Final = ("spawned", "connected", "disconnected", "replaced", "stopped")

_log = logging.getLogger("orki.metrics")


class _Family:
    """A metric with labels, of which only so many combinations are kept apart."""

    def __init__(self, metric: Any, labels: int, on_folded: Callable[[], object]) -> None:
        self._metric = metric
        self._other = (OTHER,) * labels
        self._on_folded = on_folded
        self._known: dict[tuple[str, ...], Any] = {}

    def labels(self, *values: str) -> Any:
        """Return the series of a combination of labels."""
        found = self._known.get(values)
        if found is None:
            if len(self._known) >= MAX_SERIES:
                self._on_folded()
                return self._metric.labels(*self._other)
            found = self._known[values] = self._metric.labels(*values)
        return found

    def clear(self) -> None:
        """Forget all series of a gauge."""
        self._known.clear()
        self._metric.clear()


class FleetMetrics:
    """The metrics of the fleet, as Prometheus collectors."""

    def __init__(self) -> None:
        # Each counter would have another series with the time of its creation.
        cast("Any", prometheus_client).disable_created_metrics()
        self._registry = CollectorRegistry()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._submitted: OrderedDict[str, int] = OrderedDict()
        self._connected: dict[str, str] = {}
        text = "Whether combinations of labels of a family are counted together as `other`."
        self._folded = Gauge("orki_folded_series", text, ["family"], registry=self._registry)
        counter, gauge, histogram = (partial(self._family, kind) for kind in (Counter, Gauge, Histogram))
        by_group, by_model = ["stream", "group"], ["model", "provider", "agent"]
        self._events = counter("orki_events", "Events counted.", ["stream"])
        self._entries = gauge("orki_stream_entries", "Entries in a stream.", ["stream"])
        text = "Entries not delivered to a consumer group yet; NaN if the server does not know."
        self._lag = gauge("orki_group_lag_entries", text, by_group)
        self._pending = gauge("orki_group_pending_entries", "Entries delivered and not acknowledged.", by_group)
        text = "Age of the oldest entry delivered and not acknowledged."
        self._oldest = gauge("orki_group_oldest_pending_seconds", text, by_group)
        self._dead = gauge("orki_group_dead_letters", "Entries in a group's dead letter stream.", by_group)
        text = "Entries that a group lost: trimmed before it settled them, or lost by the server."
        self._lost = gauge("orki_group_lost_entries", text, by_group)
        text = "Entries that a group received and whose outcome nobody knows."
        self._unaccounted = gauge("orki_group_unaccounted_entries", text, by_group)
        text = "Share of a stream's retention that a group's lag uses; at 1, it loses entries."
        self._retention = gauge("orki_group_used_retention_ratio", text, by_group)
        text = "Entries that the server lost although it had accepted them."
        self._rolled_back = gauge("orki_stream_rolled_back_entries", text, ["stream"])
        self._tokens = counter("orki_tokens", "Language model tokens.", [*by_model, "kind"])
        self._cost = counter("orki_cost_dollars", "Cost of language models in US dollars.", by_model)
        text = "Time from the call of a tool to its end."
        self._tools = histogram("orki_tool_duration_seconds", text, ["method", "reason"], buckets=_TOOL_BUCKETS)
        text = "Tasks that ended, by outcome and reason."
        self._tasks = counter("orki_tasks", text, ["method", "outcome", "reason"])
        text = "Time from the submission of a task to its end."
        self._durations = histogram("orki_task_duration_seconds", text, ["method", "outcome"], buckets=_TASK_BUCKETS)
        text = "Attempts that ended without a result, by reason."
        self._attempts = counter("orki_attempts_ended", text, ["method", "reason"])
        self._submissions = counter("orki_tasks_submitted", "Tasks accepted.", ["method"])
        self._agent_steps = counter("orki_agent_steps", "Lifecycle steps of agents.", ["step"])
        self._agents = Gauge("orki_agents_connected", "Agents with a session.", registry=self._registry)
        text = "State of a check of `orki doctor`: 0 ok, 1 warn, 2 bad."
        self._checks = gauge("orki_check_state", text, ["check"])
        text = "Memory that the server uses."
        self._memory = Gauge("orki_server_memory_used_bytes", text, registry=self._registry)
        text = "The server's maxmemory; 0 without a limit."
        self._limit = Gauge("orki_server_memory_limit_bytes", text, registry=self._registry)
        text = "Keys that the server has evicted since its start."
        self._evicted = Gauge("orki_server_evicted_keys", text, registry=self._registry)
        text = "Writes that a replica has not confirmed."
        self._behind = gauge("orki_replica_lag_bytes", text, ["replica"])
        text = "Time since a replica's last confirmation."
        self._silent = gauge("orki_replica_lag_seconds", text, ["replica"])

    def _family(self, kind: Any, name: str, text: str, labels: list[str], **options: Any) -> _Family:
        metric = kind(name, text, labels, registry=self._registry, **options)
        return _Family(metric, len(labels), lambda: self._folded.labels(name).set(1))

    def count(self, stream: str, event_id: bytes, time_us: int, event: Message) -> bool:
        """Count one event of orki's own streams; returns False if it was counted before.

        `time_us` is in microseconds since the Unix epoch. Of an unknown message, only the number of events is counted.
        """
        if event_id in self._seen:
            return False
        self._seen[event_id] = None
        if len(self._seen) > _MAX_SEEN_EVENTS:
            self._seen.popitem(last=False)
        self._events.labels(stream).inc()
        if isinstance(event, TaskEvent):
            self._task(event, time_us)
        elif isinstance(event, ToolEvent):
            self._tools.labels(event.method, _reason(event.reason)).observe(event.duration_ns / 1e9)
        elif isinstance(event, UsageEvent):
            self._usage(event)
        elif isinstance(event, AgentEvent):
            self._agent_steps.labels(event.WhichOneof("event") or "unknown").inc()
        return True

    def follow_agent(self, agent_id: str, instance_id: str, step: str) -> None:
        """Update the number of connected agents.

        `step` is the field of AgentEvent's oneof. The number is right once all steps since the beginning of the stream
        have been passed in order.
        """
        if step == "connected":
            self._connected[agent_id] = instance_id
        elif step in ("disconnected", "stopped") and self._connected.get(agent_id) == instance_id:
            del self._connected[agent_id]

    def set_agents(self, connected: int | None) -> None:
        """Set the number of connected agents; None for the one that the events tell."""
        self._agents.set(len(self._connected) if connected is None else connected)

    def set_health(self, checks: Iterable[Check], info: Mapping[str, str]) -> None:
        """Replace the states of the checks, and the figures of the server."""
        for gauge in (self._checks, self._behind, self._silent):
            gauge.clear()
        for check in checks:
            self._checks.labels(check.name).set(VERDICTS.index(check.verdict))
        for each in replicas(info):
            self._behind.labels(each.name).set(each.behind_bytes)
            self._silent.labels(each.name).set(each.silent)
        for figure, name in (
            (self._memory, "used_memory"),
            (self._limit, "maxmemory"),
            (self._evicted, "evicted_keys"),
        ):
            figure.set(float(info.get(name, "nan")))

    def set_streams(self, streams: Iterable[StreamStats]) -> None:
        """Replace the gauges of streams and groups."""
        losses = (self._lost, self._unaccounted, self._retention, self._rolled_back)
        for gauge in (self._entries, self._lag, self._pending, self._oldest, self._dead, *losses):
            gauge.clear()
        for stream in streams:
            self._entries.labels(stream.stream).set(stream.entries)
            self._rolled_back.labels(stream.stream).set(stream.rolled_back)
            for each in stream.groups:
                self._lag.labels(each.stream, each.group).set(float("nan") if each.lag is None else each.lag)
                self._pending.labels(each.stream, each.group).set(each.pending)
                self._oldest.labels(each.stream, each.group).set(each.oldest_pending_ms / 1000)
                self._dead.labels(each.stream, each.group).set(each.dead_letters)
                self._lost.labels(each.stream, each.group).set(each.lost)
                self._unaccounted.labels(each.stream, each.group).set(each.unaccounted)
                self._retention.labels(each.stream, each.group).set(each.used_retention)

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    def _task(self, event: TaskEvent, time_us: int) -> None:
        step = event.WhichOneof("event")
        if step == "submitted":
            self._submissions.labels(event.method).inc()
            self._submitted[event.task_id] = time_us
            if len(self._submitted) > _MAX_OPEN_TASKS:
                self._submitted.popitem(last=False)
        elif step == "attempt_ended":
            self._attempts.labels(event.method, _reason(event.attempt_ended.reason)).inc()
        elif step in ("succeeded", "failed", "cancelled"):
            reason = Reason.REASON_UNSPECIFIED if step == "succeeded" else getattr(event, step).reason
            self._tasks.labels(event.method, step, _reason(reason)).inc()
            if (submitted := self._submitted.pop(event.task_id, None)) is not None:
                self._durations.labels(event.method, step).observe(max(0, time_us - submitted) / 1e6)

    def _usage(self, event: UsageEvent) -> None:
        labels = (event.model, event.provider, event.agent_id)
        for kind in ("input", "output", "cached"):
            if tokens := getattr(event, f"{kind}_tokens"):
                self._tokens.labels(*labels, kind).inc(tokens)
        if event.cost_micros:
            self._cost.labels(*labels).inc(event.cost_micros / 1e6)


def _reason(reason: Reason.ValueType) -> str:
    """Return a reason as a label: `none`, its name in lower case, or the number of an unknown one."""
    return "none" if reason == Reason.REASON_UNSPECIFIED else reason_text(reason).lower()


async def run_metrics(redis_url: str, host: str, port: int, stopped: asyncio.Event) -> None:
    """Count events and serve metrics until `stopped` is set.

    The consumer's name contains the port. With a fixed port, a new process therefore gets the unacknowledged events of
    the last one at once; with port 0, after the groups' acknowledgement deadline.

    Raises:
        InvalidSetting: The address or the URL is invalid, or the port is taken.
        OrkiError: Redis refuses the connection or a command, and a retry would not help.
    """
    metrics = FleetMetrics()
    consumer = f"metrics.{socket.gethostname()}.{port}" if port else None
    events = connect(redis_url, options=EventOptions(dedupe_window=0, drain_timeout=DRAIN_TIMEOUT))
    open_link = partial(Connection, parse_address(redis_url), connect_timeout=5.0, answer_timeout=10.0)
    link, agents = open_link(name="orki:metrics"), open_link(name="orki:metrics:agents")
    next_count = 0.0
    group_checks: list[Check] = []
    probe = ServerProbe.of(redis_url, server="store", timeout=_PROBE_TIMEOUT, writes=False)
    app = web.Application()
    app.router.add_get("/metrics", partial(_serve_metrics, metrics))
    app.router.add_get("/dashboard.json", _serve_dashboard)
    async with serve_http(app, host, port) as url, events:
        print_ready_line("metrics", f"{url}/metrics")
        tasks = [asyncio.create_task(_count(events, each, metrics, consumer, stopped)) for each in _STREAMS]
        endless = [
            asyncio.create_task(_follow_agents(agents, metrics)),
            asyncio.create_task(_follow_health(probe, metrics, group_checks)),
        ]

        async def poll_streams(streams: list[StreamVersion]) -> None:
            figures = await read_stream_stats(link, streams)
            metrics.set_streams(figures)
            groups = [group for stream in figures for group in stream.groups]
            group_checks[:] = [*check_groups(groups), *check_dead_letters(groups), *check_losses(figures)]
            nonlocal next_count
            if (now := time.monotonic()) >= next_count:
                metrics.set_agents(await count_connected(link))
                next_count = now + _COUNT_INTERVAL

        try:
            await poll_registry(events, stopped, poll_streams, _log)
        finally:
            await events.close()
            # If the server refuses the observer, nothing has set `stopped`.
            for task in (*tasks, *endless):
                task.cancel()
            await asyncio.gather(*tasks, *endless, return_exceptions=True)
            for each in (link, agents, probe):
                await each.close()


async def _serve_metrics(metrics: FleetMetrics, request: web.Request) -> web.Response:
    if request.query:
        return web.json_response({"error": "/metrics takes no parameters"}, status=400)
    # Set as a header, since aiohttp refuses a content type that contains a charset.
    return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _follow_health(probe: ServerProbe, metrics: FleetMetrics, group_checks: list[Check]) -> None:
    while True:
        (snapshot,) = await probe.read()
        metrics.set_health([*check_server(snapshot), *group_checks], snapshot.info or {})
        await asyncio.sleep(_HEALTH_INTERVAL)


async def _serve_dashboard(_: web.Request) -> web.Response:
    text = resources.files("orki_server._observers").joinpath("dashboard.json").read_text(encoding="utf-8")
    return web.Response(text=text, content_type="application/json")


async def _count(
    events: Events, stream: EventStream[Any, Any], metrics: FleetMetrics, consumer: str | None, stopped: asyncio.Event
) -> None:
    name = stream.contract.name
    while not stopped.is_set():
        try:
            source = events.delivery_batches(stream, group=_GROUP, size=_BATCH, consumer=consumer)
            async with source as batches:
                async for batch in batches:
                    async with batch as found:
                        for envelope, event in zip(batch.envelopes, found, strict=True):
                            metrics.count(name, envelope.event_id, envelope.time_us, event)
        except OrkiError as error:
            if isinstance(error, InvalidSetting):
                raise
            _log.error('the stream "%s" cannot be read: %s', name, error.message)
            await asyncio.sleep(_RETRY_DELAY)


async def _follow_agents(link: Connection, metrics: FleetMetrics) -> None:
    reader = None
    while True:
        try:
            if reader is None:
                fresh = MultiStreamReader(link, names=[AGENTS.contract.name], cursors={})
                await fresh.start()
                reader = fresh
            for _, entry in await reader.read():
                body = entry.body or {}
                step = next((each for each in _AGENT_STEPS if each in body), "")
                metrics.follow_agent(str(body.get("agent_id", "")), str(body.get("instance_id", "")), step)
        except OrkiError as error:
            if not isinstance(error, UnknownStream):
                _log.info("agent events cannot be read now: %s", error.message)
            await asyncio.sleep(_RETRY_DELAY)
