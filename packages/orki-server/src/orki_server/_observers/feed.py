"""The feed observer: all events live, as server-sent events (https://html.spec.whatwg.org/#server-sent-events).

Each client has its own cursors and no consumer group, so a closed browser retains nothing in Redis. The id of an event
is the client's cursor in all streams at once. A client that sends it back as `Last-Event-ID`, to this process or a
later one, continues exactly there. A client that reads too slowly is told so by the event `slow`, with the cursor up to
which it has all events, and disconnected; it may reconnect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Final

from aiohttp import web

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import InvalidArgument, InvalidSetting, OrkiError, UnknownStream
from orki_events.connection import Address, Connection
from orki_server._observers.entries import DecodedEntry, MultiStreamReader, parse_feed_cursor
from orki_server._observers.http_server import serve_http
from orki_server._observers.redaction import safe_json
from orki_server._process import print_ready_line

_log = logging.getLogger("orki.feed")

_RETRY_MS: Final = 1_000
_DRAIN_POLL: Final = 0.05
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
    """Options of the feed.

    Attributes:
        host: A loopback address to listen on.
        port: The port; 0 chooses a free one.
        clients: Maximum number of clients; further ones are refused.
        heartbeat_interval: Seconds without an event after which a comment is sent.
        send_timeout: Seconds after which a client that reads nothing is disconnected. Until then, at most one batch of
            events and the connection's buffer are held for it.
        event_bytes: Maximum size of an event in bytes; a longer one is sent without its body.
    """

    host: str = "127.0.0.1"
    port: int = 0
    clients: int = 500
    heartbeat_interval: float = 10.0
    send_timeout: float = 10.0
    event_bytes: int = 262_144

    def __post_init__(self) -> None:
        if self.clients < 1 or self.heartbeat_interval <= 0 or self.send_timeout <= 0 or self.event_bytes < 1024:
            raise InvalidSetting(
                "the feed needs at least 1 client, event_bytes of at least 1024, and heartbeat_interval and "
                "send_timeout above 0"
            )


async def run_feed(address: Address, options: FeedOptions, stopped: asyncio.Event) -> None:
    """Serve until `stopped` is set, then end every client's stream; raises InvalidSetting if it cannot listen."""
    feed = _Feed(address, options, stopped)
    app = web.Application()
    for path, (name, kind) in _PAGE.items():
        text = (resources.files("orki_server._observers") / "page" / name).read_text(encoding="utf-8")
        app.router.add_get(path, partial(_static, text, kind))
    app.router.add_get("/events", feed.events)
    async with serve_http(app, options.host, options.port) as url:
        print_ready_line("feed", f"{url}/")
        await stopped.wait()
        await feed.ended()


async def _static(text: str, kind: str, _: web.Request) -> web.Response:
    return web.Response(text=text, content_type=kind, headers=_HEADERS)


class _Feed:
    def __init__(self, address: Address, options: FeedOptions, stopped: asyncio.Event) -> None:
        self._address = address
        self._options = options
        self._stopped = stopped
        self._clients = 0
        self._empty = asyncio.Event()
        self._empty.set()

    async def ended(self) -> None:
        """Wait until the streams of all clients have ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), 2 * self._options.send_timeout)

    async def events(self, request: web.Request) -> web.StreamResponse:
        """`GET /events[?stream=NAME…]`."""
        if self._clients >= self._options.clients:
            return _error_response(503, f"the feed already has {self._clients} clients, its maximum; close one")
        if self._stopped.is_set():
            return _error_response(503, "the feed is stopping")
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
            return _error_response(400, error.message)
        except OrkiError as error:
            return _error_response(503, error.message)
        client = _Client(request, self._options.send_timeout)
        await client.start()
        try:
            await client.send(_block("hello", safe_json({"streams": reader.streams}), reader.cursor, retry=True))
            for gap in gaps:
                await client.send(_block("gap", safe_json(gap)))
            await self._copy(reader, client)
        except TimeoutError:
            await client.end_slow(reader.cursor)
        except ConnectionError:
            client.drop()
        return client.response

    async def _copy(self, reader: MultiStreamReader, client: _Client) -> None:
        backoff = Jitter(JitterOptions(initial=0.1, maximum=2.0, spread=0.5))
        while not self._stopped.is_set():
            try:
                entries = await self._read(reader)
                backoff.reset()
            except OrkiError as error:
                # The reader keeps its cursor. The comment tells the client why no events arrive.
                await client.send(f": {safe_json(error.message)}\n\n")
                await asyncio.sleep(backoff.failed())
                continue
            if entries:
                await client.send("".join(_block("", self._entry_json(entry), cursor) for cursor, entry in entries))
            elif client.idle_time > self._options.heartbeat_interval:
                await client.send(": heartbeat\n\n")

    async def _read(self, reader: MultiStreamReader) -> list[tuple[str, DecodedEntry]]:
        """Read once; return no entries if the feed stops."""
        reading = asyncio.ensure_future(reader.read())
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else []
        finally:
            for each in (reading, stopping):
                each.cancel()
            await asyncio.gather(reading, stopping, return_exceptions=True)

    def _entry_json(self, entry: DecodedEntry) -> str:
        whole = safe_json(entry.to_json())
        if len(whole) <= self._options.event_bytes:
            return whole
        return safe_json({**entry.to_json(), "event": None, "problem": f"{len(whole)} bytes, too large for the feed"})


class _Client:
    """The sending side of one client's connection."""

    def __init__(self, request: web.Request, timeout: float) -> None:
        self._request = request
        self._timeout = timeout
        self._last = time.monotonic()
        self.response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream; charset=utf-8"})

    @property
    def idle_time(self) -> float:
        return time.monotonic() - self._last

    async def start(self) -> None:
        await self.response.prepare(self._request)

    async def send(self, text: str) -> None:
        """Send text; raises TimeoutError if the client reads nothing, ConnectionError if it has disconnected."""
        async with asyncio.timeout(self._timeout):
            await self.response.write(text.encode("ascii"))
        self._last = time.monotonic()

    async def end_slow(self, cursor: str) -> None:
        """Tell a client that it is too slow, behind what is still in its connection's buffer, and disconnect it."""
        _log.warning("disconnected a client that reads too slowly: its buffer was full for %g s", self._timeout)
        transport = self._request.transport
        if transport is None:
            return
        try:
            await self.send(_block("slow", safe_json({"timeout": self._timeout}), cursor))
            for _ in range(round(self._timeout / _DRAIN_POLL)):
                if not transport.get_write_buffer_size():
                    break
                await asyncio.sleep(_DRAIN_POLL)
            if not transport.get_write_buffer_size():
                await self.response.write_eof()
                transport.close()
                return
        except (TimeoutError, ConnectionError):
            pass
        self.drop()

    def drop(self) -> None:
        """Abort the connection without flushing its buffer."""
        if self._request.transport is not None:
            self._request.transport.abort()


def _reader(request: web.Request, link: Connection) -> MultiStreamReader:
    if unknown := sorted(set(request.query) - {"stream"}):
        raise InvalidArgument(f'unknown parameter "{unknown[0]}" (known: stream, repeatable)')
    names = request.query.getall("stream", [])
    last = request.headers.get("Last-Event-ID", "")
    return MultiStreamReader(link, names=names, cursors=parse_feed_cursor(last) if last else None)


def _block(kind: str, data: str, cursor: str = "", *, retry: bool = False) -> str:
    lines = [f"retry: {_RETRY_MS}"] if retry else []
    lines += [f"event: {kind}"] if kind else []
    lines += [f"id: {cursor}"] if cursor else []
    return "\n".join([*lines, f"data: {data}", "", ""])


def _error_response(status: int, message: str) -> web.Response:
    headers = {**_HEADERS, "Retry-After": "2"} if status == 503 else _HEADERS
    return web.json_response({"error": message}, status=status, headers=headers)
