"""Finds the entries of one trace in the streams: paged scans, bounded by the times of the trace's own tasks.

Entry ids begin with the server's milliseconds, and the store writes a task's events with the same clock. So a scan
begins at the submission and ends some time after the task's end, whatever lies before and behind.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from orki_contract.errors import InvalidArgument, UnknownTask
from orki_events.connection import Connection
from orki_events.entries import parse_id, stream_keys
from orki_events.groups import parse_stream_state
from orki_events.registry import RegisteredStream
from orki_server._cli.trace_tree import TASK_EVENT, TraceRecord
from orki_server._observers.entries import EntryView, Readers

_PAGE: Final = 1000
_BEFORE_MS: Final = 1_000
_AFTER_MS: Final = 60_000
_ENDS: Final = ("succeeded", "failed", "cancelled")
_TASK_ID: Final = re.compile(r"t[0-9]{1,4}(-[0-9a-z]{0,26})?")
_TRACE_ID: Final = re.compile(r"[0-9a-f]{1,32}")

ScanProgress = Callable[[str, float], None]
"""Called with the name of a stream and how much of it was read, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """When a trace happened.

    Attributes:
        start_ms: Before its first event, in milliseconds since the Unix epoch.
        end_ms: After its last; None while one of its tasks runs.
    """

    start_ms: int
    end_ms: int | None


@dataclass(slots=True, kw_only=True)
class Found:
    """A trace that an id stands for.

    Attributes:
        trace_id: 32 hex digits.
        bounds: When it happened.
    """

    trace_id: str
    bounds: Bounds


@dataclass(slots=True)
class _Candidate:
    start_us: int
    open: set[str] = field(default_factory=set)
    end_us: int = 0


def check_id(wanted: str) -> None:
    """Refuses what can be neither a task id nor a trace id, nor the beginning of one.

    Raises:
        InvalidArgument: As said.
    """
    if not _TASK_ID.fullmatch(wanted) and not _TRACE_ID.fullmatch(wanted):
        raise InvalidArgument(f'"{wanted}" is no task id (such as t3-01jc…) and no trace id (32 hex digits)')


async def find_trace(
    link: Connection, streams: Sequence[RegisteredStream], wanted: str, progress: ScanProgress
) -> Found:
    """The trace whose id, or one of whose tasks' ids, begins with `wanted`, from the tasks' own events.

    Raises:
        UnknownTask: There is none, or several.
        OrkiError: The server does not answer or refuses.
    """
    candidates: dict[str, _Candidate] = {}
    matching: dict[str, str] = {}
    for stream in streams:
        if stream.contract.message == TASK_EVENT:
            async for view in scan(link, stream, "-", "+", progress, b""):
                _note(view, candidates, matching, wanted)
    traces = sorted(set(matching.values()))
    if not traces:
        raise UnknownTask(
            f'no event of a task or trace "{wanted}" is in the streams: it is unknown, or older than their retention'
        )
    if len(traces) > 1:
        some = ", ".join(sorted(matching)[:4])
        raise UnknownTask(f'"{wanted}" may mean {len(matching)} tasks or traces ({some}, …); give more of the id')
    candidate = candidates[traces[0]]
    end_ms = None if candidate.open else candidate.end_us // 1000 + _AFTER_MS
    return Found(trace_id=traces[0], bounds=Bounds(start_ms=candidate.start_us // 1000 - _BEFORE_MS, end_ms=end_ms))


def task_bounds(submitted_us: int, ended_us: int) -> Bounds:
    """The bounds of a task that the orchestrator told of."""
    return Bounds(start_ms=submitted_us // 1000 - _BEFORE_MS, end_ms=ended_us // 1000 + _AFTER_MS if ended_us else None)


async def scan_trace(
    link: Connection, streams: Sequence[RegisteredStream], found: Found, progress: ScanProgress
) -> tuple[list[TraceRecord], list[str]]:
    """All entries of the trace, and the lives of the agents that took part.

    Returns:
        The entries, and the streams of which entries from that time may have been trimmed.

    Raises:
        OrkiError: The server does not answer or refuses.
    """
    start, end = str(found.bounds.start_ms), "+" if found.bounds.end_ms is None else str(found.bounds.end_ms)
    records: list[TraceRecord] = []
    trimmed = []
    for stream in streams:
        if await _trimmed_since(link, stream, found.bounds.start_ms):
            trimmed.append(stream.contract.name)
        needle = found.trace_id.encode()
        views = scan(link, stream, start, end, progress, needle)
        records += [_record(view) async for view in views if view.span and view.span.trace_id == found.trace_id]
    instances = {str(each.body.get("instance_id", "")) for each in records if each.message == TASK_EVENT} - {""}
    for stream in streams:
        if instances and stream.contract.message == "orki.events.v1.AgentEvent":
            async for view in scan(link, stream, "-", end, progress, b""):
                if view.body is not None and view.body.get("instance_id") in instances:
                    records.append(_record(view))
    return _relevant(records, found.bounds), trimmed


async def scan(
    link: Connection, stream: RegisteredStream, start: str, end: str, progress: ScanProgress, needle: bytes
) -> AsyncIterator[EntryView]:
    """Yields the entries between two ids whose envelope holds `needle`, page by page."""
    reader = _READERS.of(stream)
    name = stream.contract.name
    for key in stream_keys(stream.contract):
        low, first, last = start, 0, 0
        while True:
            page = await link.execute((b"XRANGE", key, low, end, b"COUNT", _PAGE))
            for entry_id, flat in page:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                raw = fields.get(b"e", b"")
                if needle in raw:
                    yield reader.view(key, entry_id.decode(), raw or None, fields.get(b"d"))
            if len(page) < _PAGE:
                break
            if not first:
                first = parse_id(page[0][0]).milliseconds
                last = await _last_ms(link, key)
            reached = parse_id(page[-1][0]).milliseconds
            progress(name, (reached - first) / max(1, last - first))
            low = f"({page[-1][0].decode()}"
    progress(name, 1.0)


_READERS: Final = Readers()


def _note(view: EntryView, candidates: dict[str, _Candidate], matching: dict[str, str], wanted: str) -> None:
    span, body = view.span, view.body or {}
    if span is None:
        return
    task_id = str(body.get("task_id", ""))
    candidate = candidates.setdefault(span.trace_id, _Candidate(view.time_us))
    candidate.start_us = min(candidate.start_us, view.time_us)
    if any(step in body for step in _ENDS):
        candidate.open.discard(task_id)
        candidate.end_us = max(candidate.end_us, view.time_us)
    elif "submitted" in body:
        candidate.open.add(task_id)
    if task_id.startswith(wanted):
        matching[task_id] = span.trace_id
    if span.trace_id.startswith(wanted):
        matching[span.trace_id] = span.trace_id


def _relevant(records: list[TraceRecord], bounds: Bounds) -> list[TraceRecord]:
    """Without what the agents did before the trace, but for how each began."""
    kept = []
    for record in records:
        if record.message == "orki.events.v1.AgentEvent" and record.time_us // 1000 < bounds.start_ms:
            if "spawned" in record.body:
                kept.append(record)
        else:
            kept.append(record)
    return kept


async def _trimmed_since(link: Connection, stream: RegisteredStream, start_ms: int) -> bool:
    for key in stream_keys(stream.contract):
        kind = await link.execute((b"TYPE", key))
        if kind != b"stream":
            continue
        state = parse_stream_state(await link.execute((b"XINFO", b"STREAM", key)))
        if state.added > state.length and (not state.first_id or parse_id(state.first_id).milliseconds > start_ms):
            return True
    return False


async def _last_ms(link: Connection, key: str) -> int:
    last = await link.execute((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1))
    return parse_id(last[0][0]).milliseconds if last else 0


def _record(view: EntryView) -> TraceRecord:
    body = view.body if view.body is not None else {"problem": view.problem}
    return TraceRecord(
        stream=view.stream,
        event_id=view.event_id,
        time_us=view.time_us,
        span=view.span,
        message=view.message,
        body=body,
    )
