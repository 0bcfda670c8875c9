"""The feed: all events, live, as server-sent events for a screen (https://html.spec.whatwg.org/#server-sent-events).

Each client reads with cursors of its own and no consumer group, so a closed browser pins nothing. The id of an event is
the client's place in all streams at once: a client that sends it back as `Last-Event-ID`, to this process or to a later
one, goes on exactly there. A client that does not take what it is sent is dropped; it may come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final

from aiohttp import web

from orki_contract.errors import InvalidArgument, InvalidSetting, OrkiError, UnknownStream
from orki_events.connection import Address, Connection
from orki_server._observers.entries import EntryView, MergedReader, parse_feed_cursor
from orki_server._observers.http_server import ServerOptions, announce, serve_http
from orki_server._observers.redaction import safe_json

_log = logging.getLogger("orki.feed")

_RETRY_MS: Final = 1_000
_AGAIN_S: Final = (0.05, 2.0)
_PAGE: Final = {
    "/": ("feed.html", "text/html"),
    "/feed.css": ("feed.css", "text/css"),
    "/feed.js": ("feed.js", "text/javascript"),
}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """How the feed behaves.

    Attributes:
        server: Where it answers.
        clients: Most clients at once; the next one is refused.
        heartbeat_s: Longest silence; then a comment is sent, in seconds.
        send_timeout_s: A client that takes nothing for this long is dropped, in seconds. Until then one batch of events
            and the connection's own buffer wait for it, no more.
        event_bytes: Longest event in bytes; of a longer one only the head is sent.
    """

    server: ServerOptions = field(default_factory=ServerOptions)
    clients: int = 64
    heartbeat_s: float = 10.0
    send_timeout_s: float = 10.0
    event_bytes: int = 262_144

    def __post_init__(self) -> None:
        if self.clients < 1 or self.heartbeat_s <= 0 or self.send_timeout_s <= 0 or self.event_bytes < 1024:
            raise InvalidSetting(
                "the feed needs clients from 1, event_bytes from 1024, and heartbeat_s and send_timeout_s above 0"
            )


async def run_feed(address: Address, options: FeedOptions, stopped: asyncio.Event) -> None:
    """Serves until `stopped` is set; then ends every client's stream.

    Raises:
        InvalidSetting: The port is taken.
    """
    feed = _Feed(address, options, stopped)
    app = web.Application()
    for path, (name, kind) in _PAGE.items():
        app.router.add_get(path, _static(name, kind))
    app.router.add_get("/events", feed.events)
    async with serve_http(app, options.server) as url:
        announce("feed", f"{url}/")
        await stopped.wait()
        await feed.ended()


def _static(name: str, kind: str) -> Any:
    text = (resources.files("orki_server._observers") / "page" / name).read_text(encoding="utf-8")

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text, content_type=kind, headers=_HEADERS)

    return answer


class _Feed:
    def __init__(self, address: Address, options: FeedOptions, stopped: asyncio.Event) -> None:
        self._address = address
        self._options = options
        self._stopped = stopped
        self._clients = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def ended(self) -> None:
        """Waits until every client was told of the end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), 2 * self._options.send_timeout_s)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /events[?stream=NAME…]`."""
        if self._clients >= self._options.clients:
            return _refusal(503, f"{self._clients} clients follow already, the most that this feed takes: close one")
        if self._stopped.is_set():
            return _refusal(503, "the feed is stopping")
        self._clients += 1
        self._empty.clear()
        link = Connection(self._address, name="orki:feed", connect_timeout=5.0, answer_timeout=10.0)
        try:
            return await self._follow(request, link)
        finally:
            self._clients -= 1
            if self._clients == 0:
                self._empty.set()
            await link.close()

    async def _follow(self, request: web.Request, link: Connection) -> web.StreamResponse:
        try:
            reader = _reader(request, link)
            gaps = await reader.start()
        except (InvalidArgument, UnknownStream) as error:
            return _refusal(400, error.message)
        except OrkiError as error:
            return _refusal(503, error.message)
        client = _Client(request, self._options.send_timeout_s)
        await client.start()
        try:
            await client.send(_block("hello", safe_json({"streams": reader.streams}), reader.place, retry=True))
            for gap in gaps:
                shown = {"stream": gap.stream, "key": gap.key, "after": gap.after, "first": gap.first}
                await client.send(_block("gap", safe_json(shown)))
            await self._copy(reader, client)
        except (TimeoutError, ConnectionError):
            client.drop()
        return client.response

    async def _copy(self, reader: MergedReader, client: _Client) -> None:
        failures = 0
        while not self._stopped.is_set():
            try:
                entries = await self._read(reader)
                failures = 0
            except OrkiError as error:
                # The reader keeps its place; the client hears why nothing comes.
                await client.send(f": {safe_json(error.message)}\n\n")
                failures += 1
                await asyncio.sleep(random.uniform(_AGAIN_S[0], min(_AGAIN_S[1], _AGAIN_S[0] * 2**failures)))
                continue
            if entries:
                await client.send("".join(_block("", self._shown(view), place) for place, view in entries))
            elif client.silent_s > self._options.heartbeat_s:
                await client.send(": still here\n\n")

    async def _read(self, reader: MergedReader) -> list[tuple[str, EntryView]]:
        """One read, given up when the feed stops."""
        reading = asyncio.ensure_future(reader.read())
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else []
        finally:
            for each in (reading, stopping):
                each.cancel()
            await asyncio.gather(reading, stopping, return_exceptions=True)

    def _shown(self, view: EntryView) -> str:
        whole = safe_json(view.to_json())
        if len(whole) <= self._options.event_bytes:
            return whole
        return safe_json({**view.to_json(), "event": None, "problem": f"{len(whole)} bytes, too long for the feed"})


class _Client:
    """The sending half of one client's connection."""

    def __init__(self, request: web.Request, timeout_s: float) -> None:
        self._request = request
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self.response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._last

    async def start(self) -> None:
        await self.response.prepare(self._request)

    async def send(self, text: str) -> None:
        """Raises TimeoutError when the client takes nothing, ConnectionError when it has gone."""
        async with asyncio.timeout(self._timeout_s):
            await self.response.write(text.encode("ascii"))
        self._last = time.monotonic()

    def drop(self) -> None:
        """Ends the connection without waiting for what lies in its buffer."""
        if self._request.transport is not None:
            _log.warning("a client took nothing for %g s, or went away; it was dropped", self._timeout_s)
            self._request.transport.abort()


def _reader(request: web.Request, link: Connection) -> MergedReader:
    if unknown := sorted(set(request.query) - {"stream"}):
        raise InvalidArgument(f'unknown parameter "{unknown[0]}" (known: stream, which may be repeated)')
    names = request.query.getall("stream", [])
    last = request.headers.get("Last-Event-ID", "")
    return MergedReader(link, names=names, cursors=parse_feed_cursor(last) if last else None)


def _block(kind: str, data: str, place: str = "", *, retry: bool = False) -> str:
    lines = [f"retry: {_RETRY_MS}"] if retry else []
    lines += [f"event: {kind}"] if kind else []
    lines += [f"id: {place}"] if place else []
    return "\n".join([*lines, f"data: {data}", "", ""])


def _refusal(status: int, message: str) -> web.Response:
    headers = {**_HEADERS, "Retry-After": "2"} if status == 503 else _HEADERS
    return web.json_response({"error": message}, status=status, headers=headers)
