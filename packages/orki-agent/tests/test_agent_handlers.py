"""Services whose methods are no handlers are refused before anything connects, with the place."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orki_agent import Agent
from orki_agent.testing import run_handler
from orki_contract.errors import InvalidSetting


def plain(self: Any, request: Any, ctx: Any) -> Any: ...
async def coroutine(self: Any, request: Any, ctx: Any) -> Any: ...
def generator(self: Any, request: Any, ctx: Any) -> Any:
    yield 1


async def async_generator(self: Any, request: Any, ctx: Any) -> Any:
    yield 1


async def coroutine_of_one(self: Any, request: Any) -> Any: ...
async def coroutine_of_three(self: Any, request: Any, ctx: Any, more: Any) -> Any: ...
async def coroutine_of_keywords(self: Any, *, request: Any, ctx: Any) -> Any: ...
def plain_of_one(self: Any, request: Any) -> Any: ...


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return call


class Callable_:
    def __call__(self, request: Any, ctx: Any) -> Any: ...


class AsyncCallable:
    async def __call__(self, request: Any, ctx: Any) -> Any: ...


def made(base: Any, attribute: Any) -> Any:
    return type("Service", (base,), {"work": attribute, "__module__": __name__})()


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a plain function in an async base": ("async", plain, "not a coroutine function"),
    "a decorated plain function": ("async", logged(plain), "not a coroutine function"),
    "a partial of a plain function": (
        "async",
        staticmethod(functools.partial(plain, None)),
        "not a coroutine function",
    ),
    "an object with a plain call": ("async", Callable_(), "not a coroutine function"),
    "an async generator": ("async", async_generator, "generator"),
    "a generator in an async base": ("async", generator, "generator"),
    "a coroutine without a context": ("async", coroutine_of_one, "parameters"),
    "a coroutine with a third parameter": ("async", coroutine_of_three, "parameters"),
    "a coroutine with keywords only": ("async", coroutine_of_keywords, "parameters"),
    "no method in an async base": ("async", None, "missing"),
    "a text": ("async", "work", "not a method"),
    "a coroutine in a sync base": ("sync", coroutine, "coroutine function in a sync base"),
    "an object with an async call in a sync base": ("sync", AsyncCallable(), "coroutine function in a sync base"),
    "an async generator in a sync base": ("sync", async_generator, "generator"),
    "a generator in a sync base": ("sync", generator, "generator"),
    "a plain function without a context": ("sync", plain_of_one, "parameters"),
    "no method in a sync base": ("sync", None, "missing"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
async def test_what_is_no_handler_is_refused(work: SimpleNamespace, case: str) -> None:
    kind, attribute, fault = REFUSED[case]
    service = made(work.WorkServiceBase if kind == "async" else work.GrindServiceSyncBase, attribute)
    with pytest.raises(InvalidSetting, match=fault) as refused:
        Agent("worker", service)
    assert "Service.work, the handler of agentwork.v1." in refused.value.message
    if attribute is not None and callable(attribute):
        place, _, _ = refused.value.message.partition(": ")
        file, _, line = place.rpartition(":")
        assert file == __file__
        assert line.isdecimal()
    if hasattr(service.work, "__self__"):
        with pytest.raises(InvalidSetting, match=fault):
            await run_handler(service.work, work.WorkRequest())


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        ("async", coroutine),
        ("async", logged(coroutine)),
        ("async", staticmethod(functools.partial(coroutine, None))),
        ("async", AsyncCallable()),
        ("sync", plain),
        ("sync", logged(plain)),
        ("sync", Callable_()),
    ],
)
def test_handlers_of_any_form_are_served(work: SimpleNamespace, kind: str, attribute: Any) -> None:
    Agent("worker", made(work.WorkServiceBase if kind == "async" else work.GrindServiceSyncBase, attribute))


PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)
from orki_agent import Agent
from orki_contract.images import image_of
work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    {body}

agent = Agent("worker", Worker())
"""


@pytest.mark.parametrize(
    ("body", "line", "fault"),
    [("def work(self, request, ctx): ...", 12, "not a coroutine function"), ("pass", 14, "abstract")],
)
def test_the_command_refuses_them_with_the_place(
    work_path: Path, tmp_path: Path, body: str, line: int, fault: str
) -> None:
    file = tmp_path / "bad_agent.py"
    file.write_text(PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py")), body=body))
    command = [sys.executable, "-m", "orki_agent", "run", "bad_agent:agent", "--orchestrator", "127.0.0.1:1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(work_path)}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert f"{file}:{line}" in done.stderr
    assert fault in done.stderr
    assert "Traceback" not in done.stderr
