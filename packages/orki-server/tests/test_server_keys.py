"""The key and field tables: they cover every name that the code uses, and docs/keys.md shows them."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from orki_server import _keys as keys
from orki_server._events import OutboxRecord
from orki_server._keys import FleetKeys, ShardKeys
from orki_server._store.lifecycle import TIMERS

PAGE = Path(__file__).parents[3] / "docs" / "keys.md"
SHARD = ShardKeys(7)
TASK = "t7-01jcabcdefghjkmnpqrstvwxyz"
LUA = "\n".join(
    (files("orki_server._store") / "lua" / name).read_text(encoding="utf-8") for name in ("task.lua", "operations.lua")
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
        (FleetKeys.LAYOUT, "orki:{of}:layout"),
        (FleetKeys.AGENTS, "orki:{of}:agents"),
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
    used = set(re.findall(r"\b(?:task|other|known)\.(\w+)", LUA)) - {"id", "stored", "stored_state"}
    # HSET and HGET of fields that are not loaded.
    used |= set(re.findall(r"TASK \.\. [\w.]+, '(\w+)'", LUA))
    used |= {"failure_message", "failure_type"}
    assert used | set(TIMERS) | {"request", "earlier_failures"} <= set(keys.TASK_FIELDS)
    assert used >= set(keys.TASK_FIELDS) - set(TIMERS) - {"submitted_us"}
    assert set(TIMERS) == {name for name in keys.NUMBERS if name.endswith("_due")}
    assert next(iter(keys.TASK_FIELDS)) == keys.SNAPSHOT[0] == "state", "a missing state means a missing task"
    assert {*keys.NUMBERS, *keys.NOT_LOADED, *keys.SNAPSHOT} <= set(keys.TASK_FIELDS)


def test_the_scripts_write_the_records_that_python_reads() -> None:
    assert OutboxRecord._fields[1:] == tuple(keys.RECORD_FIELDS)
    record = LUA[LUA.index("local function record(") : LUA.index("local function count_open(")]
    assert set(re.findall(r"^    (\w+) = ", record, re.M)) == set(keys.RECORD_FIELDS)


def test_all_keys_of_a_shard_share_one_hash_tag() -> None:
    assert {row.pattern.split("}")[0] for row in keys.TABLE} == {"orki:{oN", "orki:{of"}


def test_the_page_shows_the_tables_and_the_life_of_a_task() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = [f"| `{row.pattern}` | {row.kind} | {row.holds} | {row.writer} | {row.ends} |" for row in keys.TABLE]
    assert "\n".join(["| Key | Kind | Content | Written by | Removed |", "|---|---|---|---|---|", *rows, ""]) in page
    for fields in (keys.TASK_FIELDS, keys.RECORD_FIELDS):
        rows = [f"| `{name}` | {holds} |" for name, holds in fields.items()]
        assert "\n".join(["| Field | Content |", "|---|---|", *rows, ""]) in page
