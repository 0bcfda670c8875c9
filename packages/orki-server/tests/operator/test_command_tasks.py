"""submit, tasks, agents and cancel as processes, against a real orchestrator."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner

from orki_contract.errors import HandlerRejected
from orki_server._cli.root import root

SERVICE = "servertests.v1.WorkService"

pytestmark = pytest.mark.timeout(180)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def body(text: str) -> str:
    return json.dumps({"body": encoded(text)})


@pytest.fixture
async def fleet(orchestrator: Any, stand_in: Callable[..., Any]) -> Any:
    """An orchestrator and an agent that echoes requests."""
    agent = stand_in(orchestrator.address)
    await agent.ready()
    return agent


@pytest.fixture
def at(orchestrator: Any) -> dict[str, str]:
    """Environment for commands."""
    return {"ORKI_ORCHESTRATOR": orchestrator.address, "COLUMNS": "80"}


async def failing(_: Any) -> bytes:
    raise HandlerRejected("the bed is dry\x1b[31m")


async def never(_: Any) -> bytes:
    await asyncio.sleep(600)
    return b""


@pytest.mark.parametrize("name", ["Do", f"{SERVICE}/Do"])
async def test_a_task_is_submitted_by_any_unambiguous_name(fleet: Any, orki: Any, at: Any, name: str) -> None:
    ended = await orki("submit", name, body("hello"), **at)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {"body": encoded("hello")}
    assert "task t" in ended.err


async def test_json_contains_the_task_with_its_response(fleet: Any, orki: Any, at: Any) -> None:
    ended = await orki("submit", "Do", "-", "--json", stdin=body("x"), **at)
    task = json.loads(ended.out)
    assert (task["state"], task["attempt"], task["failure"]) == ("succeeded", 1, None)
    assert task["response"] == {"body": encoded("x")}
    assert sorted(task) == sorted(
        [
            *("task_id", "method", "state", "attempt", "fence", "agent_id", "submitted", "ended", "trace_id"),
            *("priority", "start", "labels", "limits", "fairness_key", "failure", "earlier_failures", "response"),
            *("suspension", "parent_task_id", "root_task_id", "over_budget"),
        ]
    )


async def test_no_wait_prints_the_id_and_a_key_returns_the_same_task(fleet: Any, orki: Any, at: Any) -> None:
    first = await orki("submit", "Do", body("x"), "--no-wait", "--idempotency-key", "k", **at)
    again = await orki("submit", "Do", body("x"), "--no-wait", "--idempotency-key", "k", **at)
    other = await orki("submit", "Do", body("y"), "--no-wait", "--idempotency-key", "k", **at)
    assert first.out == again.out
    assert first.out.startswith("t")
    assert other.code == 1
    assert other.err.count("\n") == 1


async def test_priority_and_delay_are_shown(fleet: Any, orki: Any, at: Any) -> None:
    later = await orki("submit", "Do", body("a"), "--no-wait", "--priority", "9", "--delay", "600", **at)
    assert later.code == 0, later.err
    dated = await orki("submit", "Do", body("b"), "--start-at", "2026-01-01T00:00:00+01:00", "--json", **at)
    assert json.loads(dated.out)["start"] == "2025-12-31T23:00:00.000000Z", dated.err
    table = (await orki("tasks", **at)).out
    row = next(line for line in table.splitlines() if later.out.strip() in line)
    assert re.search(r"\bin (9|10) min\b", row)
    assert " 9 " in row
    shown = json.loads((await orki("tasks", later.out.strip(), "--json", **at)).out)
    assert (shown["state"], shown["priority"], shown["attempt"]) == ("queued", 9, 0)
    assert shown["start"] > shown["submitted"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--priority", "10"],
        ["--delay", "-1"],
        ["--delay", "nan"],
        ["--start-at", "tomorrow"],
        ["--start-at", "2026-01-01T00:00:00"],
        ["--delay", "1", "--start-at", "2026-01-01T00:00:00Z"],
    ],
)
async def test_a_bad_placement_is_wrong_usage(fleet: Any, orki: Any, at: Any, arguments: list[str]) -> None:
    ended = await orki("submit", "Do", body("a"), *arguments, **at)
    assert (ended.code, ended.out) == (2, "")


async def test_explain_shows_what_a_task_waits_for(
    orchestrator: Any, stand_in: Callable[..., Any], orki: Any, redis_url: str
) -> None:
    at = {"ORKI_ORCHESTRATOR": orchestrator.address, "COLUMNS": "120", "ORKI_REDIS_URL": redis_url}
    agent = stand_in(orchestrator.address)
    await agent.ready()
    await orki("pause", SERVICE, **at)
    task_id = (await orki("submit", "Do", "{}", "--no-wait", **at)).out.split()[0]
    (row,) = json.loads((await orki("explain", task_id, "--json", **at)).out)
    assert (row["cause"], row["agent_id"], row["until"]) == ("paused", "", None)
    assert "is paused" in (await orki("explain", task_id, **at)).out
    unknown = await orki("explain", "t0-" + "0" * 26, **at)
    assert (unknown.code, unknown.out) == (1, "")


async def test_the_commands_show_a_pause(
    orchestrator: Any, stand_in: Callable[..., Any], orki: Any, redis_url: str
) -> None:
    at = {"ORKI_ORCHESTRATOR": orchestrator.address, "COLUMNS": "120", "ORKI_REDIS_URL": redis_url}
    agent = stand_in(orchestrator.address)
    await agent.ready()
    paused = await orki("pause", SERVICE, "--message", "the model is down", **at)
    assert paused.code == 0, paused.err
    assert f"orki resume {SERVICE}" in paused.out
    (row,) = json.loads((await orki("pause", "--json", **at)).out)
    assert (row["target"], row["message"]) == (SERVICE, "the model is down")
    await orki("submit", "Do", "{}", "--no-wait", **at)
    assert "paused" in (await orki("tasks", **at)).out
    checks = json.loads((await orki("doctor", "--json", **at)).out)["checks"]
    (check,) = [each for each in checks if each["name"] == f"service.{SERVICE}"]
    assert (check["verdict"], "the model is down" in check["cause"]) == ("warn", True)
    assert "is resumed" in (await orki("resume", SERVICE, **at)).out
    assert "was not paused" in (await orki("resume", SERVICE, **at)).out
    assert "nothing is paused" in (await orki("pause", **at)).out


async def test_limits_and_labels_on_the_command_line(fleet: Any, orki: Any, at: Any) -> None:
    assert "no limits" in (await orki("limit", "list", **at)).out
    made = await orki("limit", "set", "model:small", "--concurrency", "4", "--rate", "30/min", "--burst", "2", **at)
    assert made.code == 0, made.err
    (row,) = json.loads((await orki("limit", "list", "--json", **at)).out)
    assert row == {"key": "model:small", "concurrency": 4, "used": 0, "interval_us": 2_000_000, "burst": 2}
    assert "0.5/s" in (await orki("limit", "list", **at)).out
    asked = ("--label", "gpu=a100", "--limit", "model:small", "--fairness-key", "t1", "--no-wait", "--json")
    task = json.loads((await orki("submit", "Do", body("a"), *asked, **at)).out)
    assert (task["labels"], task["limits"], task["fairness_key"]) == ({"gpu": "a100"}, ["model:small"], "t1")
    shown = (await orki("tasks", task["task_id"], **at)).out
    assert "gpu=a100" in shown
    listed = json.loads((await orki("tasks", "--label", "gpu=a100", "--json", **at)).out)
    assert [each["task_id"] for each in listed] == [task["task_id"]]
    assert json.loads((await orki("tasks", "--label", "gpu=b", "--json", **at)).out) == []
    assert (await orki("limit", "remove", "model:small", **at)).code == 0
    assert json.loads((await orki("limit", "list", "--json", **at)).out) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["limit", "set", "k"],
        ["limit", "set", "k", "--rate", "10/day"],
        ["limit", "set", "k", "--rate", "nan"],
        ["limit", "set", "k", "--rate", "-1/s"],
        ["limit", "set", "k", "--concurrency", "0"],
        ["limit", "set", "k", "--concurrency", "1", "--burst", "2"],
        ["submit", "Do", "{}", "--label", "gpu"],
        ["submit", "Do", "{}", "--label", "gpu=a", "--label", "gpu=b"],
    ],
)
async def test_a_malformed_limit_or_label_is_wrong_usage(orki: Any, at: Any, arguments: list[str]) -> None:
    ended = await orki(*arguments, **at)
    assert (ended.code, ended.out) == (2, "")


async def test_schedules_on_the_command_line(fleet: Any, orki: Any, at: Any) -> None:
    assert "no schedules" in (await orki("schedule", "list", **at)).out
    arguments = ("nightly", "0 2 * * *", "Do", body("a"), "--time-zone", "Europe/Berlin", "--missed", "catch-up")
    added = await orki("schedule", "add", *arguments, **at)
    assert added.code == 0, added.err
    assert "first tick" in added.out
    again = await orki("schedule", "add", *arguments, **at)
    assert (again.code, "there is a schedule nightly" in again.err) == (1, True)
    assert (await orki("schedule", "add", *arguments, "--replace", "--priority", "2", **at)).code == 0
    (row,) = json.loads((await orki("schedule", "list", "--json", **at)).out)
    assert (row["name"], row["cron"], row["time_zone"], row["missed"]) == (
        *("nightly", "0 2 * * *", "Europe/Berlin", "catch-up"),
    )
    assert row["next_tick"]
    assert "is paused" in (await orki("schedule", "pause", "nightly", **at)).out
    assert "paused" in (await orki("schedule", "list", **at)).out
    assert "goes on" in (await orki("schedule", "resume", "nightly", **at)).out
    assert "is removed" in (await orki("schedule", "remove", "nightly", **at)).out
    assert "there is no schedule" in (await orki("schedule", "remove", "nightly", **at)).out
    bad = await orki("schedule", "add", "x", "61 * * * *", "Do", **at)
    assert (bad.code, "schedule.cron" in bad.err, bad.err.count("\n")) == (1, True, 1)


async def test_a_failed_task_exits_with_1(orchestrator: Any, stand_in: Callable[..., Any], orki: Any, at: Any) -> None:
    agent = stand_in(orchestrator.address, handler=failing)
    await agent.ready()
    ended = await orki("submit", "Do", body("x"), **at)
    assert (ended.code, ended.out) == (1, "")
    assert "the bed is dry" in ended.err.splitlines()[-1]
    assert "\x1b" not in ended.err
    listed = await orki("tasks", "--state", "failed", "--json", **at)
    (task,) = json.loads(listed.out)
    assert task["failure"]["reason"] == "HANDLER_REJECTED"
    shown = await orki("tasks", task["task_id"], **at)
    assert "HANDLER_REJECTED" in shown.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Do", '{"boddy": ""}'], "boddy"),
        (["Dont", "{}"], "WorkService.Do"),
        (["Do", "{}", "--idempotency-key", "k" * 300], "256"),
    ],
)
async def test_bad_input_is_refused_in_one_sentence(
    fleet: Any, orki: Any, at: Any, arguments: list[str], says: str
) -> None:
    ended = await orki("submit", *arguments, **at)
    assert (ended.code, ended.out) == (1, "")
    assert says in ended.err
    assert ended.err.startswith("orki: ")
    assert ended.err.count("\n") == 1


async def test_wait_ends_after_the_timeout(orchestrator: Any, stand_in: Callable[..., Any], orki: Any, at: Any) -> None:
    agent = stand_in(orchestrator.address, handler=never)
    await agent.ready()
    ended = await orki("submit", "Do", body("x"), "--timeout", "0.5", **at)
    assert ended.code == 1
    assert "it continues" in ended.err.splitlines()[-1]
    (task,) = json.loads((await orki("tasks", "--json", **at)).out)
    assert task["state"] == "running"
    assert f"attempt 1 on {task['agent_id']}" in ended.err
    agents = await orki("agents", **at)
    assert "1/4" in agents.out
    cancelled = await orki("cancel", task["task_id"], "--message", "enough", **at)
    assert (cancelled.code, cancelled.out.split()[2]) in ((0, "cancelling"), (0, "cancelled"))
    again = await orki("cancel", task["task_id"], "--json", **at)
    assert json.loads(again.out)["task_id"] == task["task_id"]


async def test_tables_fit_80_columns_without_colors(fleet: Any, orki: Any, at: Any) -> None:
    await orki("submit", "Do", body("a"), **at)
    for name in ("tasks", "agents"):
        ended = await orki(name, **at)
        assert ended.code == 0, ended.err
        assert all(len(line) <= 80 for line in ended.out.splitlines())
        assert "\x1b" not in ended.out
    ids = [each["task_id"] for each in json.loads((await orki("tasks", "--json", **at)).out)]
    table = (await orki("tasks", **at)).out
    assert all(each in table for each in ids)
    (agent,) = json.loads((await orki("agents", "--json", **at)).out)
    assert (agent["agent_id"], agent["connected"], agent["services"]) == ("agent-1", True, [SERVICE])


@pytest.mark.parametrize(("drains", "state"), [(True, "left"), (False, "lost")])
async def test_a_drained_agent_has_left_and_a_broken_session_is_lost(
    orchestrator: Any,
    fleet: Any,
    orki: Any,
    at: Any,
    drains: bool,
    state: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", logger="orki.server.sessions")
    if drains:
        fleet.machine.drain(time.monotonic())
        fleet.say()
        async with asyncio.timeout(20):
            while "draining" not in (await orki("agents", **at)).out:
                await asyncio.sleep(0.1)
    await fleet.close()
    async with asyncio.timeout(20):
        while state not in (await orki("agents", **at)).out.split():
            await asyncio.sleep(0.1)
    assert ("agent agent-1 left after draining" in caplog.text) == drains
    (agent,) = json.loads((await orki("agents", "--json", **at)).out)
    assert (agent["connected"], agent["draining"]) == (False, drains)
    # As later, when it has been silent for long.
    monkeypatch.setattr(orchestrator._fleet, "_silence_timeout", -60.0)
    assert state in (await orki("agents", **at)).out.split()


async def test_the_trace_of_a_real_task(fleet: Any, orki: Any, at: Any, redis_url: str) -> None:
    task_id = (await orki("submit", "Do", body("x"), "--no-wait", **at)).out.strip()
    ended = await orki("trace", task_id, "--follow", "--json", ORKI_REDIS_URL=redis_url, **at)
    assert ended.code == 0, ended.err
    tree = json.loads(ended.out)
    task = next(each for each in tree["roots"] if each["kind"] == "task")
    assert (tree["finished"], task["status"], task["details"]["task_id"]) == (True, "ok", task_id)
    (attempt,) = (each for each in task["children"] if each["kind"] == "attempt")
    assert [each["kind"] for each in attempt["children"]] == ["offered", "started"]


async def test_the_shell_completes_methods(fleet: Any, orki: Any, at: Any) -> None:
    completing = {"_ORKI_COMPLETE": "bash_complete", "COMP_WORDS": "orki submit workservice.", "COMP_CWORD": "2"}
    ended = await orki(**completing, **at)
    assert f"plain,{SERVICE}.Direct" in ended.out
    gone = await orki(**completing, **{**at, "ORKI_ORCHESTRATOR": "127.0.0.1:1"})
    assert (gone.out.strip(), gone.err) == ("", "")


async def test_filters(fleet: Any, orki: Any, at: Any) -> None:
    for text in ("a", "b", "c"):
        await orki("submit", "Do", body(text), "--no-wait", **at)

    async def count(*filters: str) -> int:
        return len(json.loads((await orki("tasks", "--json", *filters, **at)).out))

    assert await count("--limit", "2") == 2
    assert await count("--method", f"{SERVICE}/Do") == 3
    assert await count("--method", f"{SERVICE}/Direct") == 0
    assert "no such tasks" in (await orki("tasks", "--state", "failed", "--state", "cancelled", **at)).out


async def test_unknown_tasks(fleet: Any, orki: Any, at: Any) -> None:
    for name in ("tasks", "cancel"):
        ended = await orki(name, "t0-00000000000000000000000000", **at)
        assert ended.code == 1
        assert ended.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["submit", "X.Y", "{}"], ["tasks"], ["agents"], ["cancel", "t0-1"]])
async def test_without_an_orchestrator(orki: Any, dead_port: int, arguments: list[str]) -> None:
    ended = await orki(*arguments, "--orchestrator", f"127.0.0.1:{dead_port}")
    assert (ended.code, ended.out) == (1, "")
    assert str(dead_port) in ended.err
    assert all(step in ended.err for step in ("`orki serve`", "`orki up`", "--orchestrator"))
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tasks", "--orchestrator", "nonsense"], 2),
        (["tasks", "--orchestrator", "example.com:80"], 2),
        (["tasks", "--state", "asleep"], 2),
        (["tasks", "--limit", "0"], 2),
        (["tasks", "t0-1", "--limit", "3"], 2),
        (["tasks", "--nonsense"], 2),
        (["submit"], 2),
        (["submit", "X", "{}", "--timeout", "-1"], 2),
        (["cancel"], 2),
        (["agents", "extra"], 2),
        (["nonsense"], 2),
    ],
)
def test_bad_usage(arguments: list[str], code: int) -> None:
    ended = CliRunner().invoke(root, arguments)
    assert ended.exit_code == code, ended.output
    assert ended.exception is None or isinstance(ended.exception, SystemExit)


COMMANDS = [
    "agents", "cancel", "doctor", "observe", "observe audit", "observe feed", "observe metrics",
    "streams", "streams tail", "submit", "tasks", "trace",
]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name: str) -> None:
    ended = CliRunner().invoke(root, [*name.split(), "--help"], terminal_width=80)
    assert ended.exit_code == 0
    assert "Example" in ended.output
    assert f"orki {name}" in ended.output
    assert all(len(line) <= 100 for line in ended.output.splitlines())


def test_the_root_lists_every_command_without_importing_them() -> None:
    ended = CliRunner().invoke(root, ["--help"])
    assert ended.exit_code == 0
    for name in ("agents", "cancel", "doctor", "observe", "serve", "streams", "submit", "tasks", "trace", "up"):
        assert f"  {name} " in ended.output
    assert CliRunner().invoke(root, ["--version"]).exit_code in (0, 1)


async def test_budgets_on_the_command_line(fleet: Any, orki: Any, at: Any) -> None:
    amounts = ("--budget-tokens", "1000", "--budget-cost", "0.5", "--budget-calls", "3")
    task_id = (await orki("submit", "Do", body("x"), "--no-wait", *amounts, **at)).out.strip()
    (row,) = json.loads((await orki("budget", "show", task_id, "--json", **at)).out)
    assert row == {
        "task_id": task_id,
        "tokens": 1000,
        "cost_micros": 500_000,
        "calls": 3,
        "used_tokens": 0,
        "used_cost_micros": 0,
        "used_calls": 0,
    }
    raised = await orki("budget", "raise", task_id, "--cost", "2", **at)
    assert "$0.00 of $2.00" in raised.out
    assert "0 of 1,000" in raised.out
    lower = await orki("budget", "raise", task_id, "--tokens", "5", **at)
    assert (lower.code, "only be raised" in lower.err) == (1, True)
    assert (await orki("budget", "raise", task_id, **at)).code == 2
    assert (await orki("submit", "Do", "--budget-tokens", "0", **at)).code == 2
    assert (await orki("submit", "Do", "--budget-cost", "1e300", **at)).code == 2
    plain = (await orki("submit", "Do", body("x"), "--no-wait", **at)).out.strip()
    assert "no budget limits" in (await orki("budget", "show", plain, **at)).out
    refused = await orki("budget", "raise", plain, "--tokens", "5", **at)
    assert (refused.code, "without a budget" in refused.err) == (1, True)


async def test_a_schedule_takes_the_placement_of_a_submission(fleet: Any, orki: Any, at: Any) -> None:
    placed = ("--label", "gpu=a100", "--limit", "model:small", "--fairness-key", "t1", "--priority", "7")
    budget = ("--budget-tokens", "1000")
    made = await orki("schedule", "add", "each", "* * * * * *", "Do", body("tick"), *placed, *budget, **at)
    assert made.code == 0, made.err
    for _ in range(100):
        (row,) = json.loads((await orki("schedule", "list", "--json", **at)).out)
        if row["last_task_id"]:
            break
        await asyncio.sleep(0.1)
    task = json.loads((await orki("tasks", row["last_task_id"], "--json", **at)).out)
    assert (task["labels"], task["limits"], task["fairness_key"]) == ({"gpu": "a100"}, ["model:small"], "t1")
    assert task["priority"] == 7
    (balance,) = json.loads((await orki("budget", "show", row["last_task_id"], "--json", **at)).out)
    assert balance["tokens"] == 1000
    assert (await orki("schedule", "add", "bad", "* * * * *", "Do", "--label", "gpu", **at)).code == 2
