"""The feed as a process: live events, exact resumption after a kill, redaction, slow clients, bad requests."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events
from orki_events.connection import parse_address
from orki_server._observers.feed import FeedOptions, run_feed

Start = Callable[..., Any]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=50)) as session:
        yield session
    await asyncio.sleep(0)


class Stream:
    """A client of the feed that reads block by block."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""

    async def block(self) -> dict[str, str]:
        """Return the next block that is not a comment."""
        fields: dict[str, str] = {}
        while True:
            line = (await self.response.content.readline()).decode()
            if not line:
                raise EOFError
            if line == "\n":
                if fields:
                    self.last_id = fields.get("id", self.last_id)
                    return fields
            elif not line.startswith(":"):
                name, _, value = line.rstrip("\n").partition(": ")
                fields[name] = value

    async def event(self) -> dict[str, Any]:
        while True:
            block = await self.block()
            if "event" not in block:
                event: dict[str, Any] = json.loads(block["data"])
                return event


@asynccontextmanager
async def followed(http: aiohttp.ClientSession, url: str, last_id: str = "", **query: str) -> AsyncIterator[Stream]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with http.get(f"{url}events", headers=headers, params=query) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        stream = Stream(response)
        hello = await stream.block()
        assert hello["event"] == "hello"
        yield stream


def feed(observer: Start, url: str) -> Any:
    return observer("observe", "feed", "--redis", url, "--port", "0")


async def test_events_arrive_redacted_with_their_envelope(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession, user: Any, canary: str
) -> None:
    process = feed(observer, valkey_url)
    await events.publish(user.stream, user.filled("before"))
    async with followed(http, process.where) as stream:
        await events.publish(user.stream, user.filled("r", 7))
        event = await stream.event()
    assert (event["stream"], event["message"], event["event"]["number"]) == ("secrets", "acmewatch.v1.SecretEvent", 7)
    assert event["event"]["inner"] == {"password": "[redacted]", "note": "shown"}
    assert event["producer"] == events.producer
    assert canary not in json.dumps(event)
    assert process.end() == 0
    assert canary not in process.log


async def test_no_event_is_missed_or_repeated_despite_kills_and_cuts(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession, user: Any
) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    total = 300
    process = feed(observer, valkey_url)
    async with followed(http, process.where) as stream:
        last_id = stream.last_id

    async def publish() -> None:
        for number in range(total):
            if number % 3:
                await events.publish(user.stream, user.filled(f"r{number}", number))
            else:
                await events.publish(USAGE, UsageEvent(model="m", input_tokens=number))
            await asyncio.sleep(0.001)

    publishing = asyncio.create_task(publish())
    seen: list[str] = []
    ends = 0
    while len(seen) < total:
        if ends < 2 and draw.random() < 0.5:
            process.end(signal.SIGKILL)
            process.start()
            ends += 1
        async with followed(http, process.where, last_id) as stream:
            for _ in range(min(draw.randrange(1, 120), total - len(seen))):
                event = await _next(stream, publishing, f"seed {seed}, {len(seen)} seen, {ends} kills")
                seen.append(event["event_id"])
                last_id = stream.last_id
    await publishing
    assert len(set(seen)) == len(seen) == total, f"seed {seed}, {ends} kills"
    async with followed(http, process.where, last_id) as stream:
        await events.publish(USAGE, UsageEvent(model="last"))
        assert (await stream.event())["event"]["model"] == "last", f"seed {seed}"
    assert process.end() == 0


async def _next(stream: Stream, publishing: asyncio.Task[None], story: str) -> dict[str, Any]:
    try:
        return await asyncio.wait_for(stream.event(), 60)
    except TimeoutError:
        published = publishing.done() and publishing.result() is None
        raise AssertionError(f"{story}, all published: {published}") from None


async def test_a_new_stream_is_read_from_its_beginning(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession, user: Any
) -> None:
    process = feed(observer, valkey_url)
    async with followed(http, process.where) as stream:
        for number in range(20):
            await events.publish(user.stream, user.filled(f"r{number}", number))
        found = {(await asyncio.wait_for(stream.event(), 20))["event"].get("number", 0) for _ in range(20)}
    assert found == set(range(20))


async def test_a_client_older_than_the_first_stream_misses_nothing_after_reconnecting(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession
) -> None:
    process = feed(observer, valkey_url)
    async with followed(http, process.where) as stream:
        assert stream.last_id
    await events.publish_many(USAGE, [UsageEvent(attempt=number) for number in range(1, 4)])
    async with followed(http, process.where, stream.last_id) as stream:
        found = [(await asyncio.wait_for(stream.event(), 20))["event"]["attempt"] for _ in range(3)]
    assert found == [1, 2, 3]


async def test_only_the_selected_streams_are_sent(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession, user: Any
) -> None:
    await events.prepare(user.stream)
    await events.prepare(USAGE)
    process = feed(observer, valkey_url)
    async with followed(http, process.where, stream="usage") as stream:
        await events.publish(user.stream, user.filled("r"))
        await events.publish(USAGE, UsageEvent(model="m"))
        assert (await stream.event())["stream"] == "usage"


async def test_trimmed_entries_are_sent_as_a_gap(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession, link: Any
) -> None:
    process = feed(observer, valkey_url)
    await events.prepare(USAGE)
    async with followed(http, process.where) as stream:
        await events.publish(USAGE, UsageEvent(model="seen"))
        await stream.event()
        last_id = stream.last_id
    for _ in range(5):
        await events.publish(USAGE, UsageEvent(model="unseen"))
    await link.execute((b"XTRIM", "orki:ev:{usage}", b"MAXLEN", 2))
    async with followed(http, process.where, last_id) as stream:
        gap = await stream.block()
        assert gap["event"] == "gap"
        assert json.loads(gap["data"])["stream"] == "usage"
        assert (await stream.event())["event"]["model"] == "unseen"


BAD_REQUESTS: list[tuple[str, dict[str, str], int, str]] = [
    ("events?strem=tasks", {}, 400, "unknown parameter"),
    ("events?stream=nobody", {}, 400, "registered"),
    ("events", {"Last-Event-ID": "garbage"}, 400, "Last-Event-ID"),
    ("events", {"Last-Event-ID": "usage=1-1_1-1"}, 400, "partitions"),
    ("events", {"Host": "evil.example"}, 403, "not a name of this machine"),
    ("", {"Host": "evil.example:80"}, 403, "not a name of this machine"),
]


async def test_bad_requests_are_refused_in_one_sentence(
    observer: Start, valkey_url: str, events: Events, http: aiohttp.ClientSession
) -> None:
    await events.prepare(USAGE)
    process = feed(observer, valkey_url)
    for path, headers, status, says in BAD_REQUESTS:
        async with http.get(process.where + path, headers=headers) as response:
            assert response.status == status, path
            assert says in (await response.json())["error"]
    async with followed(http, process.where, stream="usage") as stream:
        assert stream.last_id.startswith("usage=")
    assert "Traceback" not in process.log


async def test_the_page_needs_no_other_host(observer: Start, valkey_url: str, http: aiohttp.ClientSession) -> None:
    process = feed(observer, valkey_url)
    for path, kind in (("", "text/html"), ("feed.js", "text/javascript"), ("feed.css", "text/css")):
        async with http.get(process.where + path) as response:
            text = await response.text()
            assert (response.status, response.content_type) == (200, kind)
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert "://" not in text
            assert "innerHTML" not in text
    async with http.get(f"{process.where}nothing") as response:
        assert response.status == 404


async def test_the_feed_reports_a_lost_event_server_and_recovers(
    observer: Start, dead_port: int, http: aiohttp.ClientSession
) -> None:
    process = feed(observer, f"redis://127.0.0.1:{dead_port}/0")
    async with http.get(f"{process.where}events") as response:
        assert response.status == 503
        assert "does not answer" in (await response.json())["error"]
    assert process.end() == 0
    assert "Traceback" not in process.log


async def test_stop_ends_the_clients_cleanly(observer: Start, valkey_url: str, http: aiohttp.ClientSession) -> None:
    process = feed(observer, valkey_url)
    async with followed(http, process.where) as stream:
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(EOFError):
            await stream.block()
    assert process.process.wait(20) == 0
    assert "Traceback" not in process.log


async def test_a_client_that_reads_nothing_is_disconnected_and_others_continue(
    valkey_url: str,
    events: Events,
    http: aiohttp.ClientSession,
    user: Any,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    until: Any,
) -> None:
    stopped = asyncio.Event()
    running = asyncio.create_task(run_feed(parse_address(valkey_url), FeedOptions(send_timeout=0.3), stopped))
    said = ""
    while " ready: " not in said:
        await asyncio.sleep(0.01)
        said += capsys.readouterr().out
    url = said.partition(" ready: ")[2].strip()
    await events.prepare(user.stream)
    slow = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(slow, b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    greeting = b""
    while b"event: hello" not in greeting:
        greeting += await loop.sock_recv(slow, 4096)
    async with followed(http, url) as stream:
        big = user.event(repository="r", picked_text="x" * 100_000)
        for _ in range(120):
            await events.publish(user.stream, big)
            await asyncio.wait_for(stream.event(), 20)
        await until(lambda: "disconnected a client" in caplog.text)
        # The feed runs in this loop: it has some time to be read, and ends then, before this test reads.
        await asyncio.sleep(1.5)
    slow.settimeout(10)
    assert _received(slow) < 120 * 100_000
    slow.close()
    stopped.set()
    await running


def _received(connection: socket.socket) -> int:
    """Count the bytes received until the connection ends."""
    count = 0
    try:
        while part := connection.recv(1 << 20):
            count += len(part)
    except ConnectionError:
        pass
    return count


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--host", "0.0.0.0", "--redis", "redis://127.0.0.1:1"], 2, "loopback"),
        (["--redis", "http://127.0.0.1"], 2, "redis://"),
        (["--port", "70000"], 2, "70000"),
        (["--nonsense"], 2, "No such option"),
    ],
)
def test_invalid_settings_end_the_observer_with_one_sentence(
    command: Callable[..., Any], arguments: list[str], code: int, says: str
) -> None:
    ended = command("observe", "feed", *arguments)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_taken_port_is_reported(command: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = command("observe", "feed", "--port", str(taken.getsockname()[1]), "--redis", "redis://127.0.0.1:1")
    assert ended.returncode == 2
    assert "cannot listen" in ended.stderr
    assert ended.stderr.count("\n") == 1
