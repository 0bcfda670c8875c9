"""Finds the entries of one trace in the streams by paged scans within the time range of its tasks.

Entry ids start with the server's time in milliseconds, and the store stamps a task's events with the same clock. A scan
therefore starts just before the submission and ends some time after the task's end.
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
from orki_events.registry import StreamVersion
from orki_server._cli.trace_tree import AGENT_EVENT, ENDS, TASK_EVENT
from orki_server._observers.entries import DecodedEntry, EntryDecoders

_PAGE: Final = 1000
_BEFORE_MS: Final = 1_000
_AFTER_MS: Final = 60_000
_TASK_ID: Final = re.compile(r"t[0-9]{1,4}(-[0-9a-z]{0,26})?")
_TRACE_ID: Final = re.compile(r"[0-9a-f]{1,32}")

ScanProgress = Callable[[str, float], None]
"""Called with the name of a stream and the fraction that was read, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRange:
    """A trace and its time range.

    Attributes:
        trace_id: 32 hex digits.
        start_ms: A time before its first event, in milliseconds since the Unix epoch.
        end_ms: A time after its last event; None while one of its tasks runs.
    """

    trace_id: str
    start_ms: int
    end_ms: int | None


@dataclass(slots=True)
class _Candidate:
    start_us: int
    open: set[str] = field(default_factory=set)
    end_us: int = 0


def check_id(wanted: str) -> None:
    """Raise InvalidArgument unless `wanted` can be a prefix of a task id or a trace id."""
    if not _TASK_ID.fullmatch(wanted) and not _TRACE_ID.fullmatch(wanted):
        raise InvalidArgument(f'"{wanted}" is neither a task id (such as t3-01jc…) nor a trace id (32 hex digits)')


async def find_trace(
    link: Connection, streams: Sequence[StreamVersion], wanted: str, progress: ScanProgress
) -> TraceRange:
    """Find the trace whose id, or one of whose task ids, starts with `wanted`, by scanning the task events.

    Raises UnknownTask if no trace or several match.
    """
    candidates: dict[str, _Candidate] = {}
    matching: dict[str, str] = {}
    for stream in streams:
        if stream.contract.message == TASK_EVENT:
            async for entry in scan(link, stream, "-", "+", progress, b""):
                _index_entry(entry, candidates, matching, wanted)
    traces = sorted(set(matching.values()))
    if not traces:
        raise UnknownTask(
            f'the streams have no event of a task or trace "{wanted}": it is unknown or older than their retention'
        )
    if len(traces) > 1:
        some = ", ".join(sorted(matching)[:4])
        raise UnknownTask(f'"{wanted}" matches {len(matching)} tasks or traces ({some}, …); use a longer prefix')
    candidate = candidates[traces[0]]
    return trace_range(traces[0], candidate.start_us, 0 if candidate.open else candidate.end_us)


def trace_range(trace_id: str, start_us: int, end_us: int) -> TraceRange:
    """Return the range of a trace with a margin around its start and end; `end_us` is 0 while it continues."""
    end_ms = end_us // 1000 + _AFTER_MS if end_us else None
    return TraceRange(trace_id=trace_id, start_ms=start_us // 1000 - _BEFORE_MS, end_ms=end_ms)


async def scan_trace(
    link: Connection, streams: Sequence[StreamVersion], trace: TraceRange, progress: ScanProgress
) -> tuple[list[DecodedEntry], list[str]]:
    """Read all entries of a trace and the lifecycle events of its agents.

    Returns:
        The entries, and the names of the streams whose entries of that time may have been trimmed.
    """
    start, end = str(trace.start_ms), "+" if trace.end_ms is None else str(trace.end_ms)
    records: list[DecodedEntry] = []
    trimmed = []
    for stream in streams:
        if await _trimmed_since(link, stream, trace.start_ms):
            trimmed.append(stream.contract.name)
        needle = trace.trace_id.encode()
        entries = scan(link, stream, start, end, progress, needle)
        records += [entry async for entry in entries if entry.span and entry.span.trace_id == trace.trace_id]
    instances = {str(each.fields.get("instance_id", "")) for each in records if each.message == TASK_EVENT} - {""}
    for stream in streams:
        if instances and stream.contract.message == AGENT_EVENT:
            entries = scan(link, stream, "-", end, progress, b"")
            records += [entry async for entry in entries if entry.fields.get("instance_id") in instances]
    # Of the agent events from before the trace, only each agent's start is shown.
    return [
        each
        for each in records
        if each.message != AGENT_EVENT or each.time_us // 1000 >= trace.start_ms or "spawned" in each.fields
    ], trimmed


async def scan(
    link: Connection, stream: StreamVersion, start: str, end: str, progress: ScanProgress, needle: bytes
) -> AsyncIterator[DecodedEntry]:
    """Yield the entries between two ids whose raw envelope contains `needle`, page by page."""
    decoder = _DECODERS.of(stream)
    name = stream.contract.name
    for key in stream_keys(stream.contract):
        low, first, last = start, 0, 0
        while True:
            page = await link.execute((b"XRANGE", key, low, end, b"COUNT", _PAGE))
            for entry_id, flat in page:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                raw = fields.get(b"e", b"")
                if needle in raw:
                    yield decoder.decode(key, entry_id.decode(), raw or None, fields.get(b"d"))
            if len(page) < _PAGE:
                break
            if not first:
                newest = await link.execute((b"XREVRANGE", key, b"+", b"-", b"COUNT", 1))
                first, last = parse_id(page[0][0]).milliseconds, parse_id(newest[0][0]).milliseconds if newest else 0
            reached = parse_id(page[-1][0]).milliseconds
            progress(name, (reached - first) / max(1, last - first))
            low = f"({page[-1][0].decode()}"
    progress(name, 1.0)


_DECODERS: Final = EntryDecoders()


def _index_entry(entry: DecodedEntry, candidates: dict[str, _Candidate], matching: dict[str, str], wanted: str) -> None:
    span, body = entry.span, entry.body or {}
    if span is None:
        return
    task_id = str(body.get("task_id", ""))
    candidate = candidates.setdefault(span.trace_id, _Candidate(entry.time_us))
    candidate.start_us = min(candidate.start_us, entry.time_us)
    if any(step in body for step in ENDS):
        candidate.open.discard(task_id)
        candidate.end_us = max(candidate.end_us, entry.time_us)
    elif "submitted" in body:
        candidate.open.add(task_id)
    if task_id.startswith(wanted):
        matching[task_id] = span.trace_id
    if span.trace_id.startswith(wanted):
        matching[span.trace_id] = span.trace_id


async def _trimmed_since(link: Connection, stream: StreamVersion, start_ms: int) -> bool:
    for key in stream_keys(stream.contract):
        kind = await link.execute((b"TYPE", key))
        if kind != b"stream":
            continue
        state = parse_stream_state(await link.execute((b"XINFO", b"STREAM", key)))
        if state.added > state.length and (not state.first_id or parse_id(state.first_id).milliseconds > start_ms):
            return True
    return False
