"""The hash chain of the audit log: rotation, crashes, and every way to tamper with lines."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_events import Events
from orki_server._observers.audit import AuditLog, Fsync, files_of
from orki_server._observers.audit_chain import START, Verifier, link_of, seal

pytestmark = pytest.mark.timeout(180)


def _lines(count: int) -> list[bytes]:
    link, found = START, []
    for number in range(count):
        event_id = f"{number:032x}"
        link, line = seal(link, json.dumps({"event_id": event_id, "event": {"number": number}}, separators=(",", ":")))
        found.append(f"{line}\n".encode())
    return found


def _problems(*files: list[bytes], first: int = 1) -> list[tuple[int, str]]:
    verifier = Verifier(first)
    return [(each.place, each.text) for lines in files for _, each in verifier.check(lines) if each is not None]


def test_untouched_lines_have_no_problem_in_any_number_of_files() -> None:
    lines = _lines(20)
    assert _problems(lines) == []
    assert _problems(lines[:7], [], lines[7:8], lines[8:]) == []
    assert _problems(lines[7:], first=8) == []
    assert json.loads(lines[4])["number"] == 5


@given(data=st.data())
def test_a_changed_dropped_added_or_moved_line_is_found(data: st.DataObject) -> None:
    lines = _lines(12)
    at = data.draw(st.integers(0, 10), label="line")
    kind = data.draw(st.sampled_from(["change", "drop", "repeat", "move", "add", "cut"]), label="kind")
    line = lines[at]
    if kind == "change":
        byte = data.draw(st.integers(0, len(line) - 2), label="byte")
        value = data.draw(st.integers(0, 255).filter(lambda each: each not in (line[byte], 10)), label="value")
        lines[at] = line[:byte] + bytes((value,)) + line[byte + 1 :]
    elif kind == "drop":
        del lines[at]
    elif kind == "repeat":
        lines.insert(at, line)
    elif kind == "move":
        to = data.draw(st.integers(0, 11).filter(lambda each: each != at), label="to")
        lines.insert(to, lines.pop(at))
    elif kind == "add":
        lines.insert(at, b'{"event_id":"00000000000000000000000000000000"}\n')
    else:
        lines[at] = line[: data.draw(st.integers(0, len(line) - 1), label="length")]
    assert _problems(lines), kind


def test_a_line_that_is_sealed_anew_breaks_the_next_one() -> None:
    lines = _lines(5)
    before = link_of(lines[1].strip())
    assert before is not None
    lines[2] = seal(before, '{"event_id":"forged"}')[1].encode() + b"\n"
    ((place, text),) = _problems(lines)
    assert (place, text) == (4, "was changed, or the line before it was")


def _log(path: Path, max_bytes: int) -> AuditLog:
    log = AuditLog(path, fsync=Fsync.NEVER, remember=1000, max_bytes=max_bytes)
    log.open()
    return log


def _line(number: int) -> tuple[str, str]:
    event_id = f"{number:032x}"
    return event_id, f'{{"event_id":"{event_id}","event":"{"x" * (number * 17 % 90)}"}}'


def _verified(path: Path) -> list[int]:
    verifier, numbers = Verifier(), []
    for each in files_of(path):
        with each.open("rb") as file:
            for line, problem in verifier.check(file):
                assert problem is None
                numbers.append(int(line[13:45], 16))
    return numbers


def test_a_file_that_has_its_size_is_rotated_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for start in (0, 30, 60):  # each time by another process
        log = _log(path, 2_000)
        assert log.append([_line(number) for number in range(max(0, start - 10), start)]) == 0
        for number in range(start, start + 30):
            assert log.append([_line(number)]) == 1
        log.close()
    assert _verified(path) == list(range(90))
    assert [each.name for each in files_of(path)][:2] == ["audit.jsonl.000001", "audit.jsonl.000002"]
    assert all(each.stat().st_size <= 2_000 for each in files_of(path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0), count=st.integers(1, 40), rotated=st.booleans())
def test_a_log_cut_at_any_byte_or_in_a_rotation_goes_on(tmp_path: Path, cut: int, count: int, rotated: bool) -> None:
    path = tmp_path / "audit.jsonl"
    for each in files_of(path):
        each.unlink(missing_ok=True)
    log = _log(path, 1_500)
    for number in range(count):
        log.append([_line(number)])
    log.close()
    if rotated:
        path.rename(f"{path}.000099")
    else:
        size = path.stat().st_size
        os.truncate(path, size - cut % (size + 1))
    again = _log(path, 1_500)
    again.append([_line(number) for number in range(count + 1)])
    again.close()
    assert _verified(path) == list(range(count + 1))


async def test_kills_and_rotations_lose_nothing_and_keep_the_chain(
    observer: Callable[..., Any], valkey_url: str, events: Events, tmp_path: Path, until: Any
) -> None:
    seed = random.randrange(1 << 30)
    draw, path = random.Random(seed), tmp_path / "audit.jsonl"
    process = observer("observe", "audit", str(path), "--redis", valkey_url, "--max-bytes", "20000")
    published = []
    for round_number in range(3):
        for number in range(150):
            published.append(await events.publish(USAGE, UsageEvent(model="m", input_tokens=number)))
        if round_number < 2:
            process.end(signal.SIGKILL)
            process.start()

    def ids() -> Counter[str]:
        texts = [each.read_text() for each in files_of(path) if each.exists()]
        return Counter(line[13:45] for text in texts for line in text.splitlines())

    await until(lambda: len(ids()) >= len(published))
    assert process.end() == 0
    assert ids() == Counter(each.hex() for each in published), f"seed {seed}"
    assert len(_verified(path)) == len(published)
    assert len(files_of(path)) > 3
    assert draw is not None


async def test_a_gap_is_a_line_of_the_chain(
    observer: Callable[..., Any], valkey_url: str, events: Events, link: Any, tmp_path: Path, until: Any
) -> None:
    path = tmp_path / "audit.jsonl"
    process = observer("observe", "audit", str(path), "--redis", valkey_url)
    await events.publish(USAGE, UsageEvent(model="before"))
    await until(lambda: path.exists() and path.read_text().count("\n") == 1)
    await link.execute((b"FLUSHALL",))
    await events.publish(USAGE, UsageEvent(model="after"))
    await until(lambda: '"rolled_back"' in path.read_text() and '"after"' in path.read_text())
    assert process.end() == 0
    assert len(_verified(path)) == path.read_text().count("\n")
    gaps = [each["gap"] for each in map(json.loads, path.read_text().splitlines()) if "gap" in each]
    (rolled_back,) = [gap for gap in gaps if gap["stream"] == "usage" and gap["kind"] == "rolled_back"]
    # One event was lost; the audit log had it already.
    assert (rolled_back["group"], rolled_back["count"]) == ("", 1)
    assert {gap["group"] for gap in gaps} <= {"", "audit"}


def test_verify_and_export(tmp_path: Path, command: Callable[..., Any]) -> None:
    path = tmp_path / "audit.jsonl"
    log = _log(path, 1_000)
    for number, stream in enumerate(["tasks", "audit"] * 6):
        event_id, time = f"{number:032x}", f"2026-11-{number + 1:02d}T00:00:00.000000Z"
        entry = {"event_id": event_id, "stream": stream, "time": time, "event": {"text": "=1+1"}}
        log.append([(event_id, json.dumps(entry, separators=(",", ":")))])
    log.close()
    good = command("audit", "verify", str(path))
    assert good.returncode == 0, good.stdout
    assert "12 lines, 0 problems" in good.stdout
    last = good.stdout.split()[-1]
    assert command("audit", "verify", str(path), "--last", last).returncode == 0
    shown = command("audit", "export", str(path), "--stream", "tasks", "--since", "2026-11-03", "--until", "2026-11-09")
    assert [json.loads(line)["number"] for line in shown.stdout.splitlines()] == [3, 5, 7]
    table = command("audit", "export", str(path), "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert (len(rows), rows[4]["number"], rows[4]["event"]) == (12, "5", '{"text":"=1+1"}')
    # The last line is dropped: only the hash that was kept elsewhere shows it.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert command("audit", "verify", str(path)).returncode == 0
    dropped = command("audit", "verify", str(path), "--last", last)
    assert dropped.returncode == 1
    assert "no line has the hash" in dropped.stdout
    # A line of a rotated file is changed.
    first = files_of(path)[0]
    first.write_text(first.read_text().replace("=1+1", "=1+2", 1))
    bad = command("audit", "verify", str(path))
    assert bad.returncode == 1
    assert f"{first}:1: the line was changed" in bad.stdout
    assert command("audit", "export", str(path)).returncode == 1
    first.unlink()
    assert "are missing" in command("audit", "verify", str(path)).stdout
    missing = command("audit", "verify", str(tmp_path / "none"))
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
