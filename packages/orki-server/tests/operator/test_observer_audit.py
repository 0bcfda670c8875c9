"""The audit observer as a process: each event once despite kills, redaction, a full disk."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.audit_pb2 import AuditEvent
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events

Start = Callable[..., Any]

pytestmark = pytest.mark.timeout(180)


def audit(observer: Start, url: str, file: Path, *more: str) -> Any:
    return observer("observe", "audit", str(file), "--redis", url, *more)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ids(file: Path) -> Counter[str]:
    return Counter(line["event_id"] for line in lines(file))


async def test_every_stream_is_written_redacted_including_new_ones(
    observer: Start, valkey_url: str, events: Events, user: Any, canary: str, tmp_path: Path, until: Any
) -> None:
    file = tmp_path / "audit.jsonl"
    await events.publish(AUDIT, AuditEvent(actor="a\nb\x1b[31m", action="submit", detail=canary))
    process = audit(observer, valkey_url, file)
    await until(lambda: len(lines(file)) == 1)
    await events.publish(user.stream, user.filled("r\x7f\u2028", 7))
    await until(lambda: len(lines(file)) == 2)
    assert process.end() == 0
    text = file.read_text()
    assert canary not in text + process.log
    assert text.isascii()
    assert all(line.isprintable() for line in text.splitlines())
    first, second = lines(file)
    assert first["event"] == {"actor": "a\nb\x1b[31m", "action": "submit", "detail": "[redacted]"}
    assert second["event"]["repository"] == "r\x7f\u2028"
    assert second["event"]["token"] == "[redacted]"
    assert second["event"]["by_name"] == {"k": {"password": "[redacted]", "note": "shown"}}
    assert second["stream"] == "secrets"
    assert second["producer"] == events.producer
    assert next(iter(second)) == "event_id"


async def test_each_event_is_written_once_despite_kills(
    observer: Start, valkey_url: str, events: Events, user: Any, tmp_path: Path, until: Any, link: Any
) -> None:
    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    file = tmp_path / "audit.jsonl"
    published: list[bytes] = []

    async def publish() -> None:
        for number in range(800):
            if number % 2:
                published.append(await events.publish(user.stream, user.filled(f"r{number}", number)))
            else:
                published.append(await events.publish(USAGE, UsageEvent(model="m", input_tokens=number)))
            if number % 7 == 0:
                await asyncio.sleep(0.005)

    publishing = asyncio.create_task(publish())
    process = audit(observer, valkey_url, file, "--fsync", "never")
    for _ in range(3):
        await asyncio.sleep(draw.uniform(0, 0.25))
        process.end(signal.SIGKILL)
        process.start()
    await publishing
    await until(lambda: len(ids(file)) >= len(published))
    assert process.end() == 0
    found = ids(file)
    assert found == Counter(each.hex() for each in published), f"seed {seed}"
    for key in ("orki:ev:{usage}", "orki:ev:{secrets:0}", "orki:ev:{secrets:1}"):
        assert (await link.execute((b"XPENDING", key, b"audit")))[0] == 0, f"seed {seed}"


async def test_undecodable_entries_are_reported_and_not_shown(
    observer: Start, valkey_url: str, events: Events, user: Any, canary: str, tmp_path: Path, until: Any, link: Any
) -> None:
    file = tmp_path / "audit.jsonl"
    await events.publish(USAGE, UsageEvent(model="m"))
    ((_, flat),) = await link.execute((b"XRANGE", "orki:ev:{usage}", b"-", b"+"))
    broken = flat[1].replace(flat[1][2:18], b"0123456789abcdef")
    await link.execute((b"XADD", "orki:ev:{usage}", b"*", b"e", broken, b"d", b"\xff" + canary.encode()))
    audit(observer, valkey_url, file)
    await until(lambda: len(lines(file)) == 2)
    line = lines(file)[1]
    assert line["event"] is None
    assert line["problem"] == f"{len(canary) + 1} bytes that are not a valid orki.events.v1.UsageEvent, not shown"
    assert canary not in file.read_text()


async def test_a_full_disk_is_retried_and_nothing_is_lost(
    observer: Start, valkey_url: str, events: Events, tmp_path: Path, until: Any, link: Any
) -> None:
    file = tmp_path / "audit.jsonl"
    process = audit(observer, valkey_url, file)
    await events.publish(USAGE, UsageEvent(model="before"))
    await until(lambda: len(lines(file)) == 1)
    pid = process.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    for number in range(5):
        await events.publish(USAGE, UsageEvent(model=f"m{number}"))
    await until(lambda: "cannot be written" in process.log)
    assert len(lines(file)) == 1
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    await until(lambda: len(lines(file)) == 6)
    assert process.end() == 0
    assert await link.execute((b"EXISTS", "orki:ev:{usage.audit.dead}")) == 0


def test_the_observer_waits_for_an_unreachable_event_server(dead_port: int, tmp_path: Path) -> None:
    module = [sys.executable, "-m", "orki_server", "observe", "audit"]
    process = subprocess.Popen(
        [*module, str(tmp_path / "a"), "--redis", f"redis://127.0.0.1:{dead_port}/0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    time.sleep(2.5)
    process.terminate()
    out, rest = process.communicate(timeout=40)
    assert process.returncode == 0
    assert out == ""
    assert "does not answer" in first
    assert "does not answer" not in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Missing argument"),
        (["a.jsonl", "--fsync", "often"], 2, "often"),
        (["a.jsonl", "--redis", "nonsense"], 2, "redis://"),
        (["no/such/folder/a.jsonl", "--redis", "redis://127.0.0.1:1"], 2, "cannot be opened"),
    ],
)
def test_invalid_settings_end_the_observer_with_one_sentence(
    command: Callable[..., Any], arguments: list[str], code: int, says: str
) -> None:
    ended = command("observe", "audit", *arguments)
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unusable_file_ends_the_observer_with_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orki_server", "observe", "audit", str(tmp_path), "--redis", "redis://127.0.0.1:1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    command[5] = str(tmp_path / "no" / "a.jsonl")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)


async def test_a_second_observer_of_one_file_is_refused(
    observer: Start, valkey_url: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    audit(observer, valkey_url, tmp_path / "audit.jsonl")
    ended = command("observe", "audit", "audit.jsonl", "--redis", valkey_url)
    assert ended.returncode == 2
    assert "another process writes to it" in ended.stderr
