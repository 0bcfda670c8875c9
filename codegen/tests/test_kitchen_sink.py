"""All that a contract can hold, with the names that hurt most: the model, the generated code, what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orki_codegen._asyncapi import DOCUMENT
from orki_codegen._buf import Buf
from orki_contract.images import IMAGE_NAME
from orki_contract.model import dump
from orki_contract.read import read_image

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("kitchen") / "model.json"
GEN = "packages/acme-kitchen/gen"


def run(root: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python command with the generated code first on its path; warnings are errors."""
    environment = {**os.environ, "PYTHONPATH": str(root / GEN), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    program = [sys.executable, "-W", "error", *command]
    return subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, check=False)


def assert_runs(root: Path, program: str) -> str:
    """Runs a Python program on the generated code and returns what it prints."""
    done = run(root, "-c", program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_model_is_the_golden_one(kitchen: Path) -> None:
    model = dump(read_image(Buf(kitchen).image()).contract)
    assert model == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_generated_modules_are_formatted_and_lint_clean(kitchen: Path) -> None:
    configuration = ["--no-cache", "--config", str(ROOT / "pyproject.toml"), "."]
    for command in (["format", "--check", *configuration], ["check", *configuration]):
        done = run(kitchen / "packages", "-m", "ruff", *command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_all_generated_code_passes_strict_typing(kitchen: Path) -> None:
    roots = [kitchen / GEN, ROOT / "packages/orki-contract/src", ROOT / "packages/orki-contract/gen"]
    command = ["-m", "mypy", "--strict", "--config-file=", "--namespace-packages", "--explicit-package-bases"]
    done = run(kitchen, *command, str(kitchen / GEN), MYPYPATH=os.pathsep.join(map(str, roots)))
    assert done.returncode == 0, done.stdout + done.stderr


def test_which_files_there_are(kitchen: Path) -> None:
    stems = {
        "both": ["_orki.py", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"],
        "legacy": ["_orki.py", "_pb2.py", "_pb2.pyi"],
        "modern": ["_orki.py", "_pb2.py", "_pb2.pyi"],
        "my_dashed": ["_orki.py", "_pb2.py", "_pb2.pyi"],
        "plain": ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"],
        "sink": ["_orki.py", "_pb2.py", "_pb2.pyi"],
    }
    expected = {f"kitchen/v1/{stem}{suffix}" for stem, suffixes in stems.items() for suffix in suffixes}
    expected |= {f"kitchen/other/v1/sink{suffix}" for suffix in stems["sink"]}
    always = (DOCUMENT, IMAGE_NAME, "py.typed")
    expected |= {f"kitchen/{folder}/{name}" for folder in ("v1", "other/v1") for name in always}
    found = {path.relative_to(kitchen / GEN).as_posix() for path in (kitchen / GEN).rglob("*") if path.is_file()}
    assert found == expected


def test_a_grpc_module_holds_plain_services_only(kitchen: Path) -> None:
    for suffix in ("py", "pyi"):
        text = (kitchen / GEN / f"kitchen/v1/both_pb2_grpc.{suffix}").read_text(encoding="utf-8")
        assert "SecondServiceStub" in text
        assert "BothTool" not in text
    stubs = (kitchen / GEN / "kitchen/v1/both_pb2_grpc.pyi").read_text(encoding="utf-8")
    assert '"""Asks, plainly."""' in stubs
    assert '"""Calls."""' not in stubs


def test_messages_need_no_options_at_run_time(kitchen: Path) -> None:
    program = """
import sys
from kitchen.v1 import sink_pb2
assert not sink_pb2.OrderEvent.DESCRIPTOR.GetOptions().ByteSize()
assert not any(name.startswith("orki.options") for name in sys.modules)
print(sorted(file.name for file in sink_pb2.DESCRIPTOR.dependencies))
"""
    assert "options" not in assert_runs(kitchen, program)


def test_importing_a_contract_imports_no_grpc_and_no_redis(kitchen: Path) -> None:
    program = """
import sys
from kitchen.v1 import both_orki, legacy_orki, modern_orki, my_dashed_orki, sink_orki
assert not {"grpc", "redis", "asyncio", "jinja2"} & set(sys.modules), sorted(sys.modules)
print(sink_orki.ORDERS_PLACED_V2.contract.group("billing").dead_letter)
"""
    assert assert_runs(kitchen, program) == "billing.failed\n"


def test_importing_shipped_events_imports_no_grpc() -> None:
    program = """
import sys
from orki.events.v1 import agent_orki, audit_orki, task_orki, tool_orki, usage_orki
assert not {"grpc", "redis", "asyncio"} & set(sys.modules)
print(task_orki.TASKS.contract.name)
"""
    assert assert_runs(ROOT, program) == "tasks\n"


def test_what_modules_declare_is_what_the_model_says(kitchen: Path) -> None:
    """The classes that generated code instantiates equal those that are read from the descriptors."""
    program = """
from kitchen.v1 import both_orki, legacy_orki, modern_orki, my_dashed_orki, sink_orki
from kitchen.other.v1 import sink_orki as other_orki
from orki_contract import EventStream, FrameBase, Task, Tool
from orki_contract.images import image_of
from orki_contract.read import read_image
contract = read_image(image_of("kitchen.v1")).contract
modules = (both_orki, legacy_orki, modern_orki, my_dashed_orki, sink_orki)
values = [value for module in modules for value in vars(module).values()]
streams = {each.contract for each in values if isinstance(each, EventStream)} - {sink_orki.OTHER_EVENTS.contract}
assert streams | {other_orki.OTHER_EVENTS.contract} == set(contract.streams)
assert {each.contract for each in values if isinstance(each, Task)} == set(contract.tasks)
assert {each.contract for each in values if isinstance(each, Tool)} == set(contract.tools)
classes = {each for each in values if isinstance(each, type) and issubclass(each, FrameBase)}
assert {each.FRAME for each in classes} == set(contract.frames)
assert set(sink_orki.OTHER_EVENTS.contract.groups) == {each.group for each in contract.external_groups}
print(len(contract.streams), len(contract.tasks), len(contract.tools), len(contract.frames))
"""
    assert assert_runs(kitchen, program) == "5 4 4 5\n"


def test_modules_reexport_their_messages_and_payloads(kitchen: Path) -> None:
    program = """
from google.protobuf.empty_pb2 import Empty
from kitchen.v1 import both_orki, both_pb2, my_dashed_orki, sink_orki, sink_pb2
assert both_orki.CallRequest is both_pb2.CallRequest
assert sink_orki.OrderEvent is sink_pb2.OrderEvent
assert sink_orki.Outer is sink_pb2.Outer
assert sink_orki.Mood is sink_pb2.Mood
# A payload of another file is re-exported, whether it is a message or a frame.
assert sink_orki.Empty is Empty
assert sink_orki.DashedFrame is my_dashed_orki.DashedFrame
# A message of the file wins over one of the same name in another file, and a frame class over its message.
assert sink_orki.Sink is sink_pb2.Sink
assert sink_orki.Final is not sink_pb2.Final
assert sink_orki.Nothing is not sink_pb2.Nothing
"""
    assert_runs(kitchen, program)


# By hand: bool, u8 and i16, the reserved bytes that version 2 took, u64, u8 with 3 reserved, enum, 20 bytes with 4
# reserved, f64, the i64 of version 3, and the tail.
VECTOR = (
    "01 02 fdff 04000000 0800000000000000 01 000000 01000000"
    " 000102030405060708090a0b0c0d0e0f10111213 00000000 000000000000e03f f9ffffffffffffff c3bc21"
)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print(bytes(frame.encode()) == wire)", "True"),
        ("print(Final.decode(wire, 64) == frame)", "True"),
        ("print(Final.decode(memoryview(wire), 64).str)", "ü!"),
        ("print(Final.decode(wire[:64] + bytes(8) + b'x', 72, 4).str)", "x"),
        ("old = Final.decode(wire[:56] + b'ab', 56, 2); print(old.later, old.Literal, old.str)", "4 None ab"),
        ("old = Final.decode(wire[:56], 56, 1); print(old.later, old.Literal, old.wide)", "None None 8"),
        ("print(refusal(lambda: Final.decode(wire[:40], 64)))", "Final: expected a block of 64 bytes, got 40"),
        ("print(refusal(lambda: Final.decode(wire[:48], 48)))", "ends before ratio (bytes 48 to 55)"),
        ("print(refusal(lambda: Final.decode(wire[:64] + b'\\xff', 64)))", 'the tail "str" is not UTF-8'),
        ("print(refusal(replace(frame, pb=256).encode))", "kitchen.v1.Final: pb = 256 does not fit u8"),
        ("print(refusal(replace(frame, signed=-32769).encode))", "signed = -32769 does not fit i16"),
        ("print(refusal(replace(frame, wide=-1).encode))", "wide = -1 does not fit u64"),
        ("print(refusal(replace(frame, wide=1 << 64).encode))", "does not fit u64"),
        ("print(refusal(replace(frame, ratio='x').encode))", "ratio = 'x' does not fit f64"),
        ("print(refusal(replace(frame, digest=b'short').encode))", "digest = 5 bytes, not 20"),
        ("print(refusal(replace(frame, digest=bytes(21)).encode))", "digest = 21 bytes, not 20"),
        ("print(refusal(replace(frame, later=None).encode))", "later = None: a frame of version 3 requires it"),
        ("print(refusal(replace(frame, str='\\ud800').encode))", "the tail str is not valid UTF-8 text"),
        ("print(refusal(replace(frame, str=b'x').encode))", "the tail str is not valid UTF-8 text"),
        ("print(Nothing().encode(), Nothing.decode(b'', 0), Nothing.decode(b'later', 0))", "b'' Nothing() Nothing()"),
        ("print(DashedFrame(7, b'rye').encode())", "b'\\x07\\x00\\x00\\x00\\x00\\x00\\x00\\x00rye'"),
        ("print(refusal(Outer_Frame(1, 1e300).encode))", "float = 1e+300 does not fit f32"),
    ],
)
def test_frames_against_bytes_made_by_hand(kitchen: Path, program: str, said: str) -> None:
    prologue = f"""
from dataclasses import replace
from kitchen.v1.my_dashed_orki import DashedFrame
from kitchen.v1.sink_orki import Final, Nothing, Outer_Frame
from orki_contract.errors import FrameMalformed

wire = bytes.fromhex("{VECTOR}")
frame = Final(
    oc=True, pb=2, signed=-3, later=4, wide=8, colour=1, mood=1, digest=bytes(range(20)), ratio=0.5, Literal=-7,
    str="ü!",
)

def refusal(call):
    try:
        return call()
    except FrameMalformed as error:
        return error.message

"""
    assert said in assert_runs(kitchen, prologue + program)
