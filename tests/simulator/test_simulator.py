"""The simulator itself: runs repeat, its server answers as a real one does, and it finds planted faults."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis

from orki.errors.v1.errors_pb2 import Reason
from orki_contract.trace import Span
from orki_control.session import AttemptKey
from orki_events.connection import Script
from orki_server import _sessions
from orki_server._keys import ShardKeys
from orki_server._store import batcher, mail, operations, store, upkeep
from orki_server._store.operations import Operation, Recipient
from orki_server._store.placement import Placement
from orki_server._store.slices import script_for
from orki_server.embedded import EmbeddedOptions, EmbeddedServer
from simulator.contract import contract
from simulator.heart import Heart, Violation
from simulator.redis import Server
from simulator.run import draw, run, scenario

METHOD = contract().task.contract


def digest(seed: int) -> str:
    return hashlib.sha256(json.dumps(run(draw(seed)).history).encode()).hexdigest()


def test_a_seed_repeats_in_another_process() -> None:
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.simulator.test_simulator import digest\n"
        "print(*map(digest, range(12)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == [digest(seed) for seed in range(12)]


# --- The server. ---


@contextmanager
def servers(tmp_path: Path) -> Iterator[tuple[Callable[..., Any], Callable[..., Any], list[float]]]:
    """A real server and the simulated one, as functions that execute a command, and the time of both."""
    now = [1_700_000_000.0]
    simulated = Server(time.time)  # Both expire keys by the real clock.
    with (
        EmbeddedServer(EmbeddedOptions(directory=tmp_path)) as real,
        redis.Redis.from_url(real.url, protocol=2) as client,
    ):
        connection = client.connection_pool.get_connection()

        def execute(*command: Any) -> Any:
            connection.send_command(*command)
            try:
                return connection.read_response(disable_decoding=True)
            except redis.ResponseError as error:
                return error

        yield execute, lambda *command: simulated.execute(command), now
        client.connection_pool.release(connection)


def dump(execute: Callable[..., Any], keys: list[bytes]) -> dict[bytes, Any]:
    found: dict[bytes, Any] = {}
    for key in sorted(keys):
        match bytes(execute("TYPE", key)):
            case b"hash":
                flat = execute("HGETALL", key)
                found[key] = dict(zip(flat[::2], flat[1::2], strict=True))
            case b"zset":
                found[key] = execute("ZRANGE", key, 0, -1, "WITHSCORES")
            case b"stream":
                found[key] = [entry[1] for entry in execute("XRANGE", key, "-", "+")]
            case b"string":
                found[key] = execute("GET", key)
    return found


def random_operation(chance: random.Random, known: list[AttemptKey], tasks: list[str]) -> Operation[Any]:
    attempt = chance.choice(known) if known else AttemptKey("t0-01hf7yatmgdqrjdf85704cjwgt", 1, 1)
    task = chance.choice(tasks) if tasks else attempt.task_id
    agent = chance.choice(["agent-1", "agent-2"])
    recipient = Recipient(agent, f"{agent}-x", chance.randint(1, 2), (METHOD.full_name,))
    reason = Reason.REASON_HANDLER_FAILED
    choices: list[Callable[[], Operation[Any]]] = [
        lambda: operations.offer(0, 1.0, [recipient]),
        lambda: operations.offer(0, 1.0, [recipient]),
        lambda: operations.accept(agent, attempt),
        lambda: operations.accept(agent, attempt),
        lambda: operations.report_progress(agent, attempt, 10, chance.randint(1, 4), b"p", 0),
        lambda: operations.renew(0, agent, known[-3:]),
        lambda: operations.succeed(agent, attempt, b"done"),
        lambda: operations.fail(agent, attempt, reason, "it failed", "ValueError", chance.random() < 0.7),
        lambda: operations.fail(agent, attempt, Reason.REASON_ABANDONED, "it stops", "", True),
        lambda: operations.decline(agent, attempt, Reason.REASON_ABANDONED, "no", True),
        lambda: operations.suspect(agent, attempt),
        lambda: operations.lose(agent, attempt, "gone"),
        lambda: operations.confirm_cancelled(agent, attempt, Reason.REASON_CANCELLED),
        lambda: operations.acknowledge_cancel(agent, attempt),
        lambda: operations.cancel(task, "enough", "me"),
        lambda: operations.read_task(task, 10),
        lambda: operations.resume(0, agent, known[-3:]),
        lambda: upkeep.sweep(0, 10),
        lambda: upkeep.sweep(0, 10),
        lambda: mail.queue_lengths(0, [METHOD.full_name]),
        lambda: upkeep.raise_epoch(0, attempt.fence + chance.randint(-1, 1)),
    ]
    return chance.choice(choices)()


def test_the_simulated_server_answers_as_a_real_one(tmp_path: Path) -> None:
    """Random operations of the store, in batches, leave the same replies and the same data."""
    keys: list[bytes] = []
    with servers(tmp_path) as (real, simulated, now):
        # Both take the time from a key, and number the entries of streams on their own.
        given = "{ redis.call('GET', 's'), redis.call('GET', 'us') }"
        text = batcher.shard_script(3.0).text.replace("redis.call('TIME')", given)
        script = Script(text)
        for seed in range(40):
            chance = random.Random(seed)
            for execute in (real, simulated):
                for key in sorted(real("KEYS", "*")) if execute is real else sorted(keys):
                    execute("DEL", key)
                execute("SCRIPT", "LOAD", script.text)
            known: list[AttemptKey] = []
            tasks: list[str] = []
            for _ in range(60):
                now[0] += chance.choice([0.001, 0.01, 0.3, 0.9, 2.0, 5.0])
                batch = []
                for number in range(chance.randint(1, 4)):
                    if len(tasks) < 6 and chance.random() < 0.2:
                        task = operations.known_task_id(0, chance.getrandbits(100))
                        batch.append(submission(task, f"key-{number}" * chance.randint(0, 1), chance.randint(0, 9)))
                        tasks.append(task)
                    else:
                        batch.append(random_operation(chance, known, tasks))
                arguments = [1, ShardKeys(0).base, chance.choice(["o1", "o2"]), ""]
                for each in batch:
                    arguments += [each.op, len(each.arguments), *each.arguments]
                replies = []
                # A slice does the same as the whole script.
                part = script_for(script, {each.op for each in batch})
                real("SCRIPT", "LOAD", part.text)
                for execute, digest in ((real, part.digest), (simulated, script.digest)):
                    command = ["EVALSHA", digest, *arguments]
                    execute("SET", "s", int(now[0]))
                    execute("SET", "us", int(now[0] * 1e6) % 1_000_000)
                    replies.append(execute(*command))
                assert masked(replies[0]) == masked(replies[1]), [each.op for each in batch]
                # The time until a new timer may follow.
                for operation, reply in zip(batch, replies[0], strict=False):
                    if operation.op == "offer" and reply[0] != b"error":
                        known += [each.attempt for each in operation.outcome(reply).offers]
            keys = real("KEYS", "*")
            assert dump(real, keys) == dump(simulated, keys)


def submission(task: str, key: str, priority: int) -> Operation[Any]:
    return operations.submit(
        task_id=task,
        method=METHOD,
        request=b"request",
        digest=operations.submission_digest(METHOD.full_name, b"request"),
        idempotency_key=key,
        span=Span("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"),
        actor="me",
        placement=Placement(priority=priority),
    )


def masked(reply: Any) -> Any:
    if isinstance(reply, list):
        return [masked(each) for each in reply]
    return re.sub(rb"^\d{13}-\d+$", b"ID", reply) if isinstance(reply, bytes) else reply


# --- Planted faults. ---


def in_script(old: str, new: str) -> Any:
    """Plant a change of the store's script."""
    real = batcher.shard_script

    def changed(*arguments: Any) -> Script:
        text = real(*arguments).text
        assert old in text, old
        return Script(text.replace(old, new))

    return mock.patch.object(store, "shard_script", changed)


def acknowledge_at_once() -> Any:
    """Acknowledge results before they are stored."""
    real = _sessions.Reports.ended

    def ended(self: Any, session: Any, results: Any) -> None:
        for key, _ in results:
            session.machine.acknowledge(key)
        real(self, session, results)

    return mock.patch.object(_sessions.Reports, "ended", ended)


BY_HEART = {
    "any fence may report": ("task.fence == fence and task.agent_id == agent_id", "task.agent_id == agent_id"),
    "any agent may report": ("task.fence == fence and task.agent_id == agent_id", "task.fence == fence"),
    "an end is forgotten": ("  move(task, 'AttemptSucceeded')\n", "  move(task, 'Started')\n"),
    "fences stand still": ("fence = after(fence or last_fence())", "fence = fence or last_fence()"),
    "progress may skip": ("missing > tonumber(a[7]) and 'gap'", "false"),
}
BY_SCENARIO: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a result is acknowledged before it is stored": (
        acknowledge_at_once,
        """
        at 0.0: submit "sleep:2" by orchestrator-1
        at 1.0: stop redis for 4.0
        at 3.0: kill orchestrator-1 for 1.0
        at 3.0: kill orchestrator-2 for 1.0
        """,
        "was acknowledged, and is not its outcome",
    ),
    "fences stand still": (
        lambda: in_script("fence = after(fence or last_fence())", "fence = fence or last_fence()"),
        'at 0.0: submit "flaky" by orchestrator-1',
        "do not rise",
    ),
}


def test_the_heart_keeps_its_promises() -> None:
    heart = Heart()
    heart.explore(4)
    assert heart.states > 1_000


@pytest.mark.parametrize("name", BY_HEART)
def test_the_heart_finds_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = batcher.shard_script(3600.0).text
    old, new = BY_HEART[name]
    assert text.count(old) >= 1
    monkeypatch.setattr("simulator.heart.shard_script", lambda *_: Script(text.replace(old, new)))
    with pytest.raises(Violation):
        Heart().explore(5)


@pytest.mark.parametrize("name", BY_SCENARIO)
def test_a_scenario_finds_a_planted_fault(name: str) -> None:
    plant, text, sign = BY_SCENARIO[name]
    assert not run(scenario(text)).violations
    with plant():
        violations = run(scenario(text)).violations
    assert any(sign in each for each in violations), violations
