"""The audit log after crashes: incomplete lines, repeated events, a full disk, a second writer."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orki_contract.errors import InvalidSetting, OrkiError
from orki_server._observers import audit as audit_log
from orki_server._observers.audit import AuditLog, Fsync


def _line(number: int, body: str = "") -> tuple[str, str]:
    event_id = f"{number:032x}"
    return event_id, f'{{"event_id":"{event_id}","body":"{body}"}}'


def _opened(path: Path, remember: int = 1000) -> AuditLog:
    log = AuditLog(path, fsync=Fsync.NEVER, remember=remember)
    log.open()
    return log


def _ids(path: Path) -> list[int]:
    return [int(line[13:45], 16) for line in path.read_text().splitlines()]


def test_an_event_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _opened(path)
    assert log.append([_line(1), _line(2), _line(1)]) == 2
    assert log.append([_line(2), _line(3)]) == 1
    log.close()
    again = _opened(path)
    assert again.append([_line(1), _line(3), _line(4)]) == 1
    again.close()
    assert _ids(path) == [1, 2, 3, 4]
    assert path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0), block=st.integers(min_value=1, max_value=300), count=st.integers(0, 12))
def test_a_log_cut_at_any_byte_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, block: int, count: int
) -> None:
    monkeypatch.setattr(audit_log, "_BLOCK", block)
    path = tmp_path / "audit.jsonl"
    path.unlink(missing_ok=True)
    log = _opened(path)
    log.append([_line(number, "x" * (number * 17 % 90)) for number in range(1, count + 1)])
    log.close()
    size = path.stat().st_size
    os.truncate(path, size - cut % (size + 1))
    again = _opened(path)
    again.append([_line(number) for number in range(1, count + 2)])
    again.close()
    assert _ids(path) == list(range(1, count + 2))


def test_remembered_ids_are_bounded_and_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _opened(path)
    log.append([_line(number) for number in range(1, 2501)])
    assert log.append([_line(1501)]) == 0
    assert log.append([_line(1)]) == 1
    log.close()
    again = _opened(path)
    assert again.append([_line(1600), _line(1)]) == 0
    again.close()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _opened(path)
    with pytest.raises(InvalidSetting, match="another process writes to it"):
        _opened(path)
    log.close()
    _opened(path).close()


def test_a_directory_and_a_missing_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "audit.jsonl"):
        with pytest.raises(InvalidSetting, match="cannot be opened"):
            _opened(path)


def test_a_full_disk_writes_nothing_of_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = _opened(path)
    log.append([_line(1)])
    size = path.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
    try:
        with pytest.raises(OrkiError, match="cannot be written"):
            log.append([_line(2), _line(3)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size
    assert log.append([_line(2), _line(3)]) == 2
    log.close()
    assert _ids(path) == [1, 2, 3]


def test_synced_batches_are_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    assert log.open() == 0
    assert log.append([_line(1)]) == 1
    log.close()
    log.close()
    assert _ids(path) == [1]


def test_other_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('hello\n{"event_id":"short"}\n\n')
    log = _opened(path)
    log.append([_line(1)])
    log.close()
    assert path.read_text().startswith("hello\n")
    assert path.read_text().count("\n") == 4


def test_a_small_remember_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="1000 or more"):
        AuditLog(tmp_path / "a", remember=10)
