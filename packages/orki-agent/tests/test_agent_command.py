"""`orki-agent run`: real processes, real signals, exit codes, and what it says to wrong usage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from orki_agent import Agent
from orki_agent._cli import load_agent, main
from orki_contract.errors import InvalidSetting, Reason

MODULE = """
import asyncio, importlib.util, sys, time

spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)

from orki_agent import Agent
from orki_contract.images import image_of

work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    async def work(self, request, ctx):
        if request.text == "spin":
            until = time.monotonic() + request.seconds
            while time.monotonic() < until:
                pass
        else:
            await asyncio.sleep(request.seconds)
        return work.WorkResponse(text="from another process")

agent = Agent("worker", Worker(), slots=2)
number = 5

def make():
    return agent
"""


@pytest.fixture
def folder(tmp_path: Path, work_path: Path) -> Path:
    (tmp_path / "an_agent.py").write_text(MODULE.format(conftest=str(Path(__file__).with_name("conftest.py"))))
    return tmp_path


class Command:
    """An `orki-agent` process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self, timeout: float = 25.0) -> tuple[int, str]:
        async with asyncio.timeout(timeout):
            _, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


@pytest.fixture
async def start(folder: Path, work_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts `orki-agent run` in the folder; ends what is left of it."""
    started: list[asyncio.subprocess.Process] = []

    async def run(*arguments: str, **environment: str) -> Command:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "orki_agent",
            "run",
            *arguments,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{work_path}:{os.environ.get('PYTHONPATH', '')}", **environment},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return Command(process)

    yield run
    for process in started:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


async def test_a_drained_agent_exits_with_0(orchestrator: Any, work: SimpleNamespace, start: Any) -> None:
    command = await start("an_agent:agent", "--orchestrator", orchestrator.target, "--agent-id", "worker-1")
    await orchestrator.until(lambda: bool(orchestrator.hellos), 30)
    await orchestrator.connected()
    assert (orchestrator.hellos[0].agent_id, orchestrator.hellos[0].slots) == ("worker-1", 2)
    task_id = await orchestrator.submit(work.WORK, work.WorkRequest(seconds=0.5))
    await orchestrator.running(task_id)
    command.send(signal.SIGTERM)
    result = await orchestrator.result(task_id)
    assert work.WorkResponse.FromString(result.response).text == "from another process"
    code, errors = await command.end()
    assert (code, "Traceback" in errors) == (0, False)
    assert "agent worker-1 left" in errors
    assert "after draining" in errors
    assert "lost its session" not in errors


async def test_a_second_signal_gives_work_back_at_once(orchestrator: Any, work: SimpleNamespace, start: Any) -> None:
    command = await start(
        "an_agent:agent", ORKI_ORCHESTRATOR=orchestrator.target, ORKI_SLOTS="3", ORKI_LABELS="gpu=a100 zone=eu"
    )
    await orchestrator.until(lambda: bool(orchestrator.hellos), 30)
    await orchestrator.connected()
    assert orchestrator.hellos[0].slots == 3
    assert dict(orchestrator.hellos[0].labels) == {"gpu": "a100", "zone": "eu"}
    assert orchestrator.hellos[0].agent_id.startswith("worker-")
    task_id = await orchestrator.submit(work.WORK, work.WorkRequest(seconds=60))
    await orchestrator.running(task_id)
    command.send(signal.SIGINT)
    await orchestrator.until(lambda: orchestrator.drained)
    command.send(signal.SIGINT)
    assert (await orchestrator.result(task_id)).failure.reason == Reason.REASON_ABANDONED
    assert (await command.end())[0] == 0


async def test_user_code_that_spins_does_not_keep_the_process(
    orchestrator: Any, work: SimpleNamespace, start: Any
) -> None:
    command = await start("an_agent:agent", "--orchestrator", orchestrator.target, "--drain-grace", "0.2")
    await orchestrator.until(lambda: bool(orchestrator.hellos), 30)
    await orchestrator.connected()
    task_id = await orchestrator.submit(work.WORK, work.WorkRequest(text="spin", seconds=60))
    await orchestrator.running(task_id)
    command.send(signal.SIGTERM)
    assert (await orchestrator.result(task_id)).failure.reason == Reason.REASON_ABANDONED
    code, errors = await command.end()
    assert code == 0
    assert "a handler blocks the process" in errors


async def test_a_killed_agent_is_seen_at_once(orchestrator: Any, work: SimpleNamespace, start: Any) -> None:
    command = await start("an_agent:agent", "--orchestrator", orchestrator.target)
    await orchestrator.until(lambda: bool(orchestrator.hellos), 30)
    await orchestrator.connected()
    task_id = await orchestrator.submit(work.WORK, work.WorkRequest(seconds=60))
    await orchestrator.running(task_id)
    command.send(signal.SIGKILL)
    await orchestrator.until(lambda: bool(orchestrator.ended))
    assert orchestrator.ended[0].running == (orchestrator.key(task_id),)


async def test_refused_and_replaced_agents_exit_with_3(orchestrator: Any, mismatch: Any, start: Any) -> None:
    first = await start("an_agent:agent", "--orchestrator", orchestrator.target, "--agent-id", "same")
    await orchestrator.until(lambda: len(orchestrator.hellos) == 1, 30)
    await orchestrator.connected()
    second = await start("an_agent:agent", "--orchestrator", orchestrator.target, "--agent-id", "same")
    code, errors = await first.end(40)
    assert code == 3
    assert "has replaced this instance of agent same: give each running agent its own agent id" in errors
    orchestrator.refuse_with = mismatch
    third = await start("an_agent:agent", "--orchestrator", orchestrator.target, "--agent-id", "other")
    code, errors = await third.end()
    assert code == 3
    assert "orki-agent: service agentwork.v1.WorkService is live with another contract" in errors
    assert "Traceback" not in errors
    second.send(signal.SIGTERM)
    assert (await second.end())[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'MODULE:ATTRIBUTE'"),
        (["an_agent"], "'an_agent' is not MODULE:ATTRIBUTE"),
        (["nowhere:agent"], "no module is named nowhere"),
        (["an_agent:agent", "--agnet-id", "x"], "No such option"),
        (["an_agent:agent", "--slots", "many"], "is not a valid integer"),
        (["an_agent:agent", "--slots", "0"], "slots 0"),
        (["an_agent:agent", "--label", "gpu"], "use NAME=VALUE"),
        (["an_agent:agent", "--label", "gpu=a b"], "'gpu'='a b'"),
        (["an_agent:agent", "--label", "gpu=a", "--label", "gpu=b"], "each name once"),
        (["an_agent:agent", "--agent-id", "a b"], "agent id 'a b'"),
        (["an_agent:agent", "--events", "redis://u:pw@h:bad/0"], "orki-agent: the event server's URL cannot be read"),
        (["an_agent:agent", "--events", "127.0.0.1:6379"], "the event server's URL must begin with redis://"),
        (["an_agent:agent", "--orchestrator", "somewhere"], "is not HOST:PORT"),
        (["an_agent:agent", "--orchestrator", "example.org:1"], "not encrypted"),
        (["an_agent:agent", "--drain-grace", "-1"], "drain_grace -1"),
        (["an_agent:agent", "--tools", "/tmp/x.sock"], "--tools needs the bridge's token"),
        (["an_agent:agent", "--tools-token-file", "an_agent.py"], "--tools-token-file needs --tools"),
        (["an_agent:agent", "--tools", "/x", "--tools-token-file", "an_agent.py"], "neither 32 bytes nor 64 hex"),
        (["an_agent:agent", "--log-level", "loud"], "is not one of"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], words: str, folder: Path, work: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "an_agent", raising=False)
    result = CliRunner().invoke(main, ["run", *arguments])
    assert (result.exit_code, words in result.output) == (2, True), result.output
    assert "pw" not in result.output


def test_help_teaches(folder: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--help"])
    assert result.exit_code == 0
    for word in ("ORKI_ORCHESTRATOR", "--agent-id", "--tools-token-file", "Exit codes", "Example"):
        assert word in result.output


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("", "sample:agent", "has no agent; it has no agent; add agent = Agent"),
        ("import no_such_thing", "sample:agent", r"sample.py:1: No module named 'no_such_thing'; install"),
        ("1 / 0", "sample:agent", r"importing sample failed at .*sample.py:1: ZeroDivisionError"),
        (
            "def agent(): ...",
            "sample:agent",
            r"a function, not an orki_agent.Agent \(.*sample.py:1\); name the Agent",
        ),
        *(
            (f"raise SystemExit({code})", "sample:x", r"failed at .*sample.py:1: SystemExit")
            for code in ("0", "'no'", "")
        ),
        ("agent = 5", "sample:agent", r"is an int, not an orki_agent.Agent"),
        (
            "from orki_agent import Agent\nagent = Agent('x')",
            "sample:agent",
            "sample.py:2: an agent needs at least",
        ),
    ],
)
def test_what_is_no_agent_is_described(
    source: str, target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sample.py").write_text(textwrap.dedent(source) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sample", raising=False)
    with pytest.raises(InvalidSetting, match=words):
        load_agent(target)
    sys.modules.pop("sample", None)
    result = CliRunner().invoke(main, ["run", target])
    assert (result.exit_code, result.output.startswith(f"orki-agent: {target}")) == (2, True), result.output
    sys.modules.pop("sample", None)


def test_settings_of_agents_are_checked(work: SimpleNamespace) -> None:
    class Service(work.WorkServiceBase):  # type: ignore[misc, name-defined]
        async def work(self, request: Any, ctx: Any) -> Any:
            return None

    agent = Agent("worker", Service())
    assert agent.methods == ("agentwork.v1.WorkService/Work",)
    for wrong, words in [
        (lambda: Agent("no spaces", Service()), "use 1 to 60 letters"),
        (lambda: Agent("worker", Service(), slots=0), "slots is 0"),
        (lambda: Agent("worker", Service), "give an instance, not the class"),
        (lambda: Agent("worker", Service(), Service()), "two services handle agentwork.v1.WorkService/Work"),
        (lambda: agent.settings("127.0.0.1:1", slotz=3), "unexpected keyword argument 'slotz'"),
        (lambda: agent.settings("127.0.0.1:1", labels={"": "x"}), "labels: ''='x'"),
        (lambda: agent.settings("127.0.0.1:1", progress_window=0), "progress_window 0"),
        (lambda: agent.settings("127.0.0.1:1", switch_interval=5), "switch_interval 5"),
        (lambda: agent.settings("127.0.0.1:1", max_message_bytes=1), "max_message_bytes 1"),
    ]:
        with pytest.raises(InvalidSetting, match=words):
            wrong()
    assert agent.settings("127.0.0.1:1").agent_id.startswith("worker-")
