"""The key and field tables: they cover every name that the code uses, and docs/keys.md shows them."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from orki_server import _fields
from orki_server import _keys as keys
from orki_server._events import OutboxRecord
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store.lifecycle import TIMERS

PAGE = Path(__file__).parents[3] / "docs" / "keys.md"
SHARD = ShardKeys(7)
TASK = "t7-01jcabcdefghjkmnpqrstvwxyz"
LUA = "\n".join(
    (files("orki_server._store") / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    for name in (
        *("placement", "batch", "budget", "life", "pause", "lanes", "wake", "operations", "suspension", "family"),
        "dispatch",
    )
)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (SHARD.task(TASK), "orki:{oN}:task:TASK"),
        (SHARD.progress(TASK), "orki:{oN}:progress:TASK"),
        (SHARD.index, "orki:{oN}:index"),
        (SHARD.open, "orki:{oN}:open"),
        (SHARD.outbox, "orki:{oN}:outbox"),
        (SHARD.fence, "orki:{oN}:fence"),
        (f"{SHARD.base}clock", "orki:{oN}:clock"),
        (SHARD.mail("o1"), "orki:{oN}:mail:ORCHESTRATOR"),
        (f"{SHARD.base}damaged", "orki:{oN}:damaged"),
        (f"{SHARD.base}queue:a.v1.S/M\x1fgpu=a\x1f\x1f\x1f", "orki:{oN}:queue:METHOD"),
        (f"{SHARD.base}lanes", "orki:{oN}:lanes"),
        (f"{SHARD.base}holders:tenant:a", "orki:{oN}:holders:KEY"),
        (FleetKeys.LAYOUT, "orki:{of}:layout"),
        (FleetKeys.AGENTS, "orki:{of}:agents"),
        (FleetKeys.PAUSES, "orki:{of}:pauses"),
        (FleetKeys.SCHEDULES, "orki:{of}:schedules"),
        (FleetKeys.TICKS, "orki:{of}:ticks"),
        (FleetKeys.SERVICES, "orki:{of}:services"),
        (FleetKeys.REVISIONS, "orki:{of}:revisions"),
        (FleetKeys.agent("a-1"), "orki:{of}:agent:AGENT"),
        (FleetKeys.service("a.v1.S"), "orki:{of}:service:SERVICE"),
    ],
)
def test_every_name_belongs_to_one_row(name: str, pattern: str) -> None:
    row = keys.match(name)
    assert row is not None
    assert row.pattern == pattern
    assert [each.pattern for each in keys.TABLE if each.expression.fullmatch(name)] == [pattern]


@pytest.mark.parametrize("name", ["orki:{o7}:x", "orki:{ox}:index", "orki:{o7}:task:", "orki:{of}:layouts", "other"])
def test_other_names_belong_to_no_row(name: str) -> None:
    assert keys.match(name) is None


def test_the_scripts_use_the_names_of_the_table() -> None:
    suffixes = dict(re.findall(r"local (\w+) = KEYS\[1\] \.\. '([^']+)'", keys.lua_names()))
    assert f"{SHARD.base}{suffixes['TASK']}{TASK}" == SHARD.task(TASK)
    assert f"{SHARD.base}{suffixes['OUTBOX']}" == SHARD.outbox
    assert len(set(suffixes.values())) == len(suffixes)
    assert {name for name in suffixes if not re.search(rf"\b{name}\b", LUA)} == set()
    assert "orki:" not in LUA


def test_the_scripts_use_the_fields_of_the_table() -> None:
    used = set(re.findall(r"\b(?:task|other|known)\.(\w+)", LUA))
    used -= {"id", "text", "next_text", "fields", "staged_fields", "touched", "dirty", "shown", "span", "span_of"}
    used -= {"spec", "request", "placement", "place", "more_text"}
    assert used | set(TIMERS) == {*_fields.STATE_FIELDS, *_fields.SPEC_FIELDS}
    assert set(TIMERS) == {name for name in _fields.NUMBERS if name.endswith("_due")}
    # Fields of the hash itself.
    found = re.findall(r"TASK \.\. [\w.]+, '(\w+)'|set\(task, '(\w+)'", LUA)
    used = {name for names in found for name in names if name}
    assert used | {"spec"} == set(_fields.TASK_FIELDS)
    assert set(_fields.SNAPSHOT) == set(_fields.TASK_FIELDS) - {"request", "checkpoint", "answer"}
    assert set(_fields.NUMBERS) <= {*_fields.STATE_FIELDS, *_fields.SPEC_FIELDS}


def test_the_scripts_use_the_named_values_of_the_table() -> None:
    changed = re.findall(r"remember\(task, \{(.*?)\}\)", LUA, flags=re.S)
    assert set(re.findall(r"(\w+) = ", "\n".join(changed))) == set(_fields.MORE_FIELDS)
    assert set(re.findall(r"\b(?:more\(task\)|values)\.(\w+)", LUA)) <= set(_fields.MORE_FIELDS)
    assert _fields.unpack_more(b"suspension=2\x1fquestion=a=b?") == {"suspension": "2", "question": "a=b?"}
    assert _fields.unpack_more(b"") == {}


def test_packed_fields_are_read_as_they_were_written() -> None:
    fields: dict[str, str | int] = dict.fromkeys(_fields.STATE_FIELDS, "") | {"state": "QUEUED", "revision": 3}
    read = _fields.unpack(_fields.STATE_FIELDS, _fields.pack(fields).encode())
    assert (read["state"], read["revision"], read["attempt"], read["agent_id"]) == ("QUEUED", "3", "0", "")
    for damaged in (b"", b"QUEUED", b"\xff" * 30, _fields.pack(fields).replace("3", "x").encode()):
        with pytest.raises(ValueError, match=r"argument|literal|decode"):
            _fields.unpack(_fields.STATE_FIELDS, damaged)


def test_the_scripts_write_the_records_that_python_reads() -> None:
    assert OutboxRecord._fields[1:] == tuple(_fields.RECORD_FIELDS)
    record = LUA[LUA.index("local function record(") : LUA.index("-- Puts the task at the end")]
    written = [line.strip() for line in record[record.index("+ 1] = {") :].splitlines()[1:] if line.startswith("    ")]
    assert len(written) == len(_fields.RECORD_FIELDS)
    for field, line in zip(_fields.RECORD_FIELDS, written, strict=True):
        names = {"task_id": "task.id", "time_us": "WALL_TEXT"}
        assert names.get(field, field) in line


def test_all_keys_of_a_shard_share_one_hash_tag() -> None:
    assert {row.pattern.split("}")[0] for row in keys.TABLE} == {"orki:{oN", "orki:{of"}


def test_the_page_shows_the_tables_and_the_life_of_a_task() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [f"| `{row.pattern}` | {row.kind} | {row.holds} | {row.writer} | {row.ends} |" for row in keys.TABLE]
    assert "\n".join(["| Key | Kind | Content | Written by | Removed |", "|---|---|---|---|---|", *rows, ""]) in page
    tables = (
        _fields.TASK_FIELDS,
        _fields.MORE_FIELDS,
        _fields.STATE_FIELDS,
        _fields.SPEC_FIELDS,
        _fields.PLACEMENT_FIELDS,
    )
    for fields in (*tables, _fields.RECORD_FIELDS, _fields.MAIL_FIELDS):
        rows = [f"| `{name}` | {holds} |" for name, holds in fields.items()]
        assert "\n".join(["| Field | Content |", "|---|---|", *rows, ""]) in page
