"""The table of keys: it covers what the code builds, and the page shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orki_server import _keys as keys
from orki_server._keys import FleetKeys, ShardKeys

PAGE = Path(__file__).parents[3] / "docs" / "keys.md"
SHARD = ShardKeys(7)
TASK = "t7-01jcabcdefghjkmnpqrstvwxyz"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        (SHARD.task(TASK), "orki:{oN}:t:TASK"),
        (SHARD.progress(TASK), "orki:{oN}:p:TASK"),
        (SHARD.index, "orki:{oN}:ix"),
        (SHARD.open, "orki:{oN}:open"),
        (SHARD.out, "orki:{oN}:out"),
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


@pytest.mark.parametrize("name", ["orki:{o7}:x", "orki:{ox}:ix", "orki:{o7}:t:", "orki:{of}:layouts", "other"])
def test_other_names_belong_to_none(name: str) -> None:
    assert keys.match(name) is None


def test_the_names_in_lua_are_the_table_s_own() -> None:
    suffixes = dict(keys.lua_names())
    assert f"{SHARD.base}{suffixes['TASK']}{TASK}" == SHARD.task(TASK)
    assert f"{SHARD.base}{suffixes['OUT']}" == SHARD.out
    assert len(set(suffixes.values())) == len(suffixes)


def test_all_keys_of_a_shard_share_one_hash_tag() -> None:
    assert {row.pattern.split("}")[0] for row in keys.TABLE} == {"orki:{oN", "orki:{of"}


def test_the_page_shows_the_table() -> None:
    assert keys.table_markdown() in PAGE.read_text(encoding="utf-8")
