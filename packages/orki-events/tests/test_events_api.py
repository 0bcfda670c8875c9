"""The public modules, their exact exports, and the cost of importing the package."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import orki_events
from orki_events.connection import Script
from orki_events.scripts import package_scripts

EXPORTS = {
    "orki_events": {
        "ConsumeOptions",
        "Consumer",
        "DeadLetterEntry",
        "Delivery",
        "DeliveryBatch",
        "EventOptions",
        "Events",
        "Gap",
        "GapKind",
        "GroupLedger",
        "Outgoing",
        "StreamLedger",
        "StreamVersion",
        "Subscription",
        "TailEntry",
        "Tuned",
        "Tuning",
        "connect",
        "consumer",
    },
    "orki_events.cloudevents": {"attributes"},
    "orki_events.connection": {
        "Address",
        "Command",
        "Connection",
        "GroupExists",
        "GroupMissing",
        "Reply",
        "Role",
        "Script",
        "ScriptMissing",
        "pack",
        "parse_address",
    },
    "orki_events.entries": {
        "decode_entries",
        "DATA_FIELD",
        "ENVELOPE_FIELD",
        "EVENT_ID_BYTES",
        "EntryId",
        "ONLY_GROUP_FIELD",
        "ORIGIN_FIELD",
        "REASON_FIELD",
        "ZERO_ID",
        "decode_envelope",
        "encode_envelope",
        "envelope_span",
        "event_id_of",
        "format_cursor",
        "new_event_id",
        "only_group",
        "parse_cursor",
        "parse_id",
        "partition_of",
        "predecessor",
        "split_entry",
        "stream_key",
        "stream_keys",
        "tagged_key",
    },
    "orki_events.groups": {
        "ConsumerGroups",
        "Mark",
        "StreamState",
        "checked",
        "group_start",
        "groups_key",
        "pairs",
        "parse_stream_state",
    },
    "orki_events.losses": {
        "GroupPosition",
        "PartitionPosition",
        "RecordedGap",
        "acknowledge_losses",
        "read_gaps",
        "read_positions",
    },
    "orki_events.scripts": {"load_scripts", "package_scripts"},
    "orki_events.registry": {
        "StreamRegistry",
        "StreamVersion",
        "compare_streams",
    },
    "orki_events.tuning": {
        "Tuned",
        "Tuning",
        "TuningCache",
        "effective_retention",
        "read_retention",
        "read_tunings",
        "tune",
    },
}

MEASURE = """
import json, sys
before = set(sys.modules)
import orki_events
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize("name", EXPORTS)
def test_a_public_module_exports_exactly_what_is_listed(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) == EXPORTS[name]
    assert len(module.__all__) == len(EXPORTS[name])
    for each in module.__all__:
        assert hasattr(module, each)


def test_every_other_module_is_internal() -> None:
    found = {f"orki_events.{each.name}" for each in pkgutil.iter_modules(orki_events.__path__)}
    assert {name for name in found if not name.startswith("orki_events._")} == EXPORTS.keys() - {"orki_events"}
    for name in found - EXPORTS.keys():
        assert not hasattr(importlib.import_module(name), "__all__")


def test_importing_the_package_loads_few_modules_and_no_redis_client() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True, text=True)
    loaded = json.loads(run.stdout)
    assert not [name for name in loaded if name.partition(".")[0] in {"redis", "grpc", "argparse"}]
    assert len(loaded) <= 300


def test_an_operator_loads_every_script_of_the_package() -> None:
    modules = (
        importlib.import_module(f"orki_events.{each.name}") for each in pkgutil.iter_modules(orki_events.__path__)
    )
    found = {value.digest for module in modules for value in vars(module).values() if isinstance(value, Script)}
    assert {each.digest for each in package_scripts()} == found
