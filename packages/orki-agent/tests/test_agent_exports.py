"""The public names of `orki_agent`, and what importing it loads."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import orki_agent

PUBLIC = {
    "orki_agent": [
        *("Agent", "BudgetUsedUp", "Cancelled", "HandlerFailed", "HandlerRejected", "OrkiError", "RunSettings"),
        "Subprocess",
        *("SyncTaskContext", "TaskChannel", "TaskContext", "TaskHandle", "ToolCall", "ToolFailed", "ToolsAt"),
    ],
    "orki_agent.opentelemetry": ["UsageSpanProcessor"],
    "orki_agent.testing": ["HandlerRun", "Published", "RunningHandler", "run_handler", "start_handler"],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_exports_exactly_these_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == PUBLIC[name]
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_every_other_module_is_internal() -> None:
    found = {each.name for each in pkgutil.walk_packages(orki_agent.__path__, "orki_agent.")}
    public = {name for name in found if not any(part.startswith("_") for part in name.split("."))}
    assert public == (set(PUBLIC) - {"orki_agent"}) | {"orki_agent.hotpath", "orki_agent.hotpath.frames"}


@pytest.mark.parametrize(("statement", "most"), [("import orki_agent", 330), ("from orki_agent._cli import main", 330)])
def test_importing_it_loads_neither_grpc_nor_redis(statement: str, most: int) -> None:
    program = f"import sys; {statement}; print(len(sys.modules), *sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    count, *loaded = printed.split()
    assert {name.partition(".")[0] for name in loaded} & {"grpc", "redis", "hiredis", "rich", "orki_events"} == set()
    assert int(count) <= most
