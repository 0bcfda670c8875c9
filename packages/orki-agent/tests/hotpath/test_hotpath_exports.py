"""Exports and imports of the hot path."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import orki_agent.hotpath
import orki_contract as oc
from orki_agent.hotpath import AsyncToolClient, SyncToolClient
from orki_agent.hotpath._handlers import Call

MODULES = [
    f"orki_agent.hotpath.{each.name}"
    for each in pkgutil.iter_modules(orki_agent.hotpath.__path__)
    if not each.name.startswith("_")
]


def test_the_package_exports_exactly_these_names() -> None:
    assert orki_agent.hotpath.__all__ == [
        "AsyncToolClient",
        "BridgeOptions",
        "CallHook",
        "SyncToolClient",
        "ToolBridge",
        "ToolClientOptions",
        "ToolRecord",
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_exports(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert all(hasattr(module, each) for each in module.__all__)


def test_the_clients_match_the_protocols_of_generated_code() -> None:
    sync: oc.SyncToolChannel = SyncToolClient("/nowhere", bytes(32), name="x")
    loop: oc.ToolChannel = AsyncToolClient("/nowhere", bytes(32), name="x")
    call: oc.ToolCall = Call(("x", None), None, 1, 0)  # type: ignore[arg-type]
    assert (callable(sync.call), callable(loop.call), call.cancelled, call.client) == (True, True, False, "x")


def test_the_codec_imports_no_io_module() -> None:
    code = (
        "import sys; before = set(sys.modules); import orki.hotpath.v1.tool_orki;"
        "import importlib.util as u; spec = u.find_spec('orki_agent.hotpath.frames');"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module);"
        "print(sorted({'socket', 'asyncio', 'threading', 'grpc', 'redis'} & set(vars(module))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert ran.stdout.strip() == "[]"


def test_the_package_imports_neither_grpc_nor_redis() -> None:
    code = (
        "import sys, types, importlib.util as u; found = u.find_spec('orki_agent');"
        "package = types.ModuleType('orki_agent'); package.__path__ = found.submodule_search_locations;"
        "sys.modules['orki_agent'] = package; import orki_agent.hotpath;"
        "print(sorted({'grpc', 'redis', 'orki_control', 'orki_events'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert ran.stdout.strip() == "[]"
