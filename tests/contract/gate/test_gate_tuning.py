"""A deployment tunes the retention of a stream without a release."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from gate_index import LocalIndex
from gate_trees import Tree, generated
from google.protobuf import message_factory

from orki_codegen import cli
from orki_codegen._gate.wheels import build_wheel
from orki_contract import EventStream
from orki_contract.descriptors import Schema
from orki_contract.errors import InvalidSetting
from orki_contract.images import image_of
from orki_contract.read import read_image
from orki_events import Tuning, connect
from orki_server.embedded import EmbeddedServer

pytestmark = pytest.mark.timeout(300)

PROTO = "acme/review/v1/review.proto"
KEY = "orki:ev:{findings}"
TREE = Tree(
    protos={
        PROTO: """
message Finding {
  option (orki.options.v1.stream) = {
    name: "findings"
    retention: {max_entries: 1000 least_entries: 300 most_entries: 5000}
  };
  string path = 1;
}
"""
    },
    versions={"acme-review": "0.1.0"},
    sources={"acme-review/src/acme_review/__init__.py": '"""Reviews."""\n'},
)
GREEN, RED = 0, 1
NODE = 100
"""Entries of one node of a stream: trimming is exact to about this number."""


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The released wheel."""
    return build_wheel(generated(TREE.lay_out(tmp_path / "released")), "packages/acme-review", tmp_path)


@pytest.fixture
def findings(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventStream[Any, Any]]:
    """The stream of the contract in the installed wheel."""
    site = tmp_path / "site"
    with zipfile.ZipFile(released) as wheel:
        wheel.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    mine = [name for name in sys.modules if name.partition(".")[0] == "acme"]
    for name in mine:
        monkeypatch.delitem(sys.modules, name)
    image = image_of("acme.review.v1")
    (stream,) = read_image(image).contract.streams
    classes = message_factory.GetMessageClassesForFiles([PROTO], Schema(image).pool)
    yield EventStream(classes[stream.message], stream)
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


async def kept(url: str, findings: EventStream[Any, Any], tuning: Tuning | None, count: int) -> int:
    """Return the number of entries after a deployment set a limit and as many more entries were published."""
    async with connect(url) as operator, connect(url) as publisher:
        await operator.prepare(findings)
        await operator.tune("findings", tuning)
        await publisher.publish_many(findings, [findings.message(path=str(number)) for number in range(count)])
    with redis.Redis.from_url(url) as client:
        return int(client.xlen(KEY))


async def test_tuning_needs_no_release(
    released: Path, findings: EventStream[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def gate(root: Path, *arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(root)
        return cli.main(["gate", *arguments]), capfd.readouterr().out

    with EmbeddedServer() as server:
        assert 1_000 <= await kept(server.url, findings, None, 2_500) < 1_000 + 2 * NODE
        assert 300 <= await kept(server.url, findings, Tuning(max_entries=300), 500) < 300 + 2 * NODE
        assert await kept(server.url, findings, Tuning(max_entries=5_000), 2_000) >= 2_300
        with pytest.raises(InvalidSetting, match=r"300 to 5000 .*acme\.review\.v1\.Finding in acme/review/v1/review"):
            await kept(server.url, findings, Tuning(max_entries=299), 1)
    with LocalIndex() as index:
        index.put(released)
        tree = TREE.lay_out(tmp_path / "tree")
        status, out = gate(generated(tree), "--index", index.url)
        assert (status, "unchanged, no release needed" in out) == (GREEN, True)
        # The same by the contract is a release, and a major one.
        lower = TREE.edited(PROTO, "max_entries: 1000", "max_entries: 300")
        status, out = gate(generated(lower.lay_out(tree)), "--index", index.url)
        assert (status, "ORKI_STREAM_ENTRIES_LOWERED" in out, "→ acme-review 0.2.0" in out) == (RED, True, True)
