"""The store compared with a model in any order of events: one result, rising fences, one record per transition."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_server import _keys as keys
from orki_server._events import Outbox
from orki_server._fields import STATE_FIELDS, pack, unpack
from orki_server._keys import ShardKeys
from orki_server._store import operations, upkeep
from orki_server._store.operations import (
    Operation,
    Recipient,
    new_task_id,
    shard_of,
    shard_of_key,
    submission_digest,
)
from orki_server._store.replies import ReportStatus
from orki_server._store.store import Store
from orki_server.embedded import EmbeddedServer

METHOD = TaskMethod(
    service="acme.v1.WorkService",
    name="Do",
    request="q",
    response="r",
    backoff=Backoff(initial=60.0),
)
AGENTS = ("a", "b")
STRANGER = st.sampled_from([False] * 5 + [True])
Held: TypeAlias = tuple[AttemptKey, str]
"""An attempt and the agent to which it was offered."""


def named(held: Held, stranger: bool) -> Held:
    """Return the attempt with its agent, or with another agent."""
    key, agent = held
    return key, AGENTS[AGENTS.index(agent) ^ stranger]


SHARDS = 2
ENDS = {"succeeded": TaskState.TASK_STATE_SUCCEEDED, "failed": TaskState.TASK_STATE_FAILED}
QUEUED, OFFERED, RUNNING = TaskState.TASK_STATE_QUEUED, TaskState.TASK_STATE_OFFERED, TaskState.TASK_STATE_RUNNING
CANCELLING, CANCELLED = TaskState.TASK_STATE_CANCELLING, TaskState.TASK_STATE_CANCELLED
SUCCEEDED, FAILED = TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED
TERMINAL = (SUCCEEDED, FAILED, CANCELLED)


@dataclass
class Model:
    """The expected state of one task."""

    task_id: str
    most: int
    state: TaskState.ValueType = QUEUED
    attempt: int = 0
    fence: int = 0
    agent: str = ""
    started: int = 0
    waiting: bool = False
    unanswered: bool = False
    progress_index: int = 0
    taken: tuple[int, str] = (0, "")
    acknowledged: bool = False
    kinds: list[str] = field(default_factory=lambda: ["submitted"])

    def holds(self, agent: str, key: AttemptKey) -> bool:
        return self.state in (OFFERED, RUNNING, CANCELLING) and (self.fence, self.agent) == (key.fence, agent)

    def start(self) -> None:
        if self.unanswered:
            self.unanswered, self.started = False, self.started + 1
            self.state = RUNNING if self.state == OFFERED else self.state
            self.kinds.append("started")

    def end(self, kind: str) -> None:
        self.state = ENDS.get(kind, CANCELLED)
        self.waiting = self.unanswered = False
        self.kinds.append(kind)

    def again(self, waiting: bool) -> None:
        self.state, self.waiting, self.unanswered = QUEUED, waiting, False
        self.kinds.append("attempt_ended")

    def attempt_failed(self, retryable: bool) -> None:
        if self.state == CANCELLING:
            self.end("cancelled")
        elif retryable and self.started < self.most:
            self.again(waiting=True)
        else:
            self.end("failed")

    def report(self, agent: str, key: AttemptKey) -> ReportStatus:
        """Return the expected status of a result."""
        if self.taken == (key.fence, agent):
            return ReportStatus.REPEATED
        return ReportStatus.ACCEPTED if self.holds(agent, key) else ReportStatus.STALE


def stored_state(redis: Redis, name: str) -> dict[str, str]:
    """Return the packed state of the task under this key."""
    packed: Any = redis.hget(name, "state")
    return unpack(STATE_FIELDS, packed) if packed else {"state": "ABSENT"}


def change_state(redis: Redis, name: str, **fields: str | int) -> None:
    """Change fields of the packed state of the task under this key."""
    redis.hset(name, "state", pack({**stored_state(redis, name), **fields}))


class StoreLaws(RuleBasedStateMachine):
    """Applies each step to the store and to the model."""

    url: ClassVar[str]
    tasks = Bundle("tasks")
    attempts: Bundle[Held] = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.redis = Redis.from_url(self.url)
        self.redis.flushall()
        self.runner = asyncio.Runner()
        self.store = Store(self.url, shards=SHARDS)
        self.run(self.store.open())
        self.models: dict[str, Model] = {}
        self.by_key: dict[str, tuple[str, bytes]] = {}
        self.last_fence = [0] * SHARDS

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def apply(self, transition: Operation[Any]) -> Any:
        async def applied() -> Any:
            return await self.store.apply(transition)

        return self.run(applied())

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()
        self.redis.close()

    @initialize(target=attempts)
    def unknown_attempt(self) -> Held:
        """An attempt that does not exist."""
        return AttemptKey(new_task_id(0), 1, 1), "a"

    # --- submitters ---

    @precondition(lambda self: len(self.models) < 4)
    @rule(
        target=tasks,
        key=st.sampled_from(["", "k1", "k2"]),
        request=st.sampled_from([b"x", b"y"]),
        most=st.integers(1, 2),
    )
    def submit(self, key: str, request: bytes, most: int) -> str:
        shard = shard_of_key(key, SHARDS) if key else len(self.models) % SHARDS
        task_id = new_task_id(shard)
        submitted = self.apply(
            operations.submit(
                task_id=task_id,
                method=replace(METHOD, max_attempts=most),
                request=request,
                digest=submission_digest(METHOD.full_name, request),
                idempotency_key=key,
                span=new_span(),
                actor="t",
            )
        )
        if key in self.by_key and key:
            known, known_request = self.by_key[key]
            assert submitted.task_id == known
            assert submitted.status == ("same" if request == known_request else "conflict")
            return known
        assert (submitted.status, submitted.task_id) == ("new", task_id)
        self.by_key[key] = (task_id, request)
        self.models[task_id] = Model(task_id, most)
        return task_id

    @rule(task_id=tasks)
    def cancel(self, task_id: str) -> None:
        asked, model = self.apply(operations.cancel(task_id, "why", "t")), self.models[task_id]
        if model.state in TERMINAL:
            assert asked.status == "ended"
        elif model.state == CANCELLING:
            assert asked.status == "repeated"
        else:
            model.kinds.append("cancel_requested")
            if model.state == QUEUED:
                assert asked.status == "done"
                model.end("cancelled")
            else:
                assert (asked.status, asked.agent_id, asked.attempt.fence) == ("requested", model.agent, model.fence)
                model.state = CANCELLING

    @rule(held=attempts)
    def direct(self, held: Held) -> None:
        key, _ = held
        asked, model = self.apply(operations.direct(key, 3, "t")), self.models.get(key.task_id)
        if model is None:
            assert asked.status == "unknown"
        elif model.state in TERMINAL:
            assert asked.status == "ended"
        elif model.state == RUNNING and model.fence == key.fence:
            assert asked.status == "running"
            model.kinds.append("directed")
        else:
            assert asked.status == "idle"

    # --- dispatch ---

    @rule(target=attempts, shard=st.integers(0, SHARDS - 1), agent=st.sampled_from(AGENTS))
    def offer(self, shard: int, agent: str) -> Any:
        recipient = Recipient(agent, agent + "-1", 1, (METHOD.full_name,))

        async def applied() -> Any:
            return (await self.store.offer(operations.offer(shard, 60.0, (recipient,)))).offers

        offered = self.run(applied())
        queued = [
            each
            for each in self.models.values()
            if shard_of(each.task_id) == shard and each.state == QUEUED and not each.waiting
        ]
        assert len(offered) == min(1, len(queued))
        if not offered:
            return multiple()
        key = offered[0].attempt
        model = self.models[key.task_id]
        assert model in queued
        assert key.fence > self.last_fence[shard]
        assert key.attempt == model.attempt + 1
        self.last_fence[shard] = key.fence
        model.state, model.attempt, model.fence, model.agent = OFFERED, key.attempt, key.fence, agent
        model.unanswered, model.progress_index, model.acknowledged = True, 0, False
        model.kinds.append("offered")
        return key, agent

    # --- agents: the holder, the other one, and holders of old ---

    @rule(held=attempts, stranger=STRANGER)
    def accept(self, held: Held, stranger: bool) -> None:
        key, agent = named(held, stranger)
        answer, model = self.apply(operations.accept(agent, key)), self.models.get(key.task_id)
        if model is None or not model.holds(agent, key):
            assert answer.status is ReportStatus.STALE
            return
        assert answer.status is (ReportStatus.ACCEPTED if model.unanswered else ReportStatus.REPEATED)
        model.start()

    @rule(held=attempts, stranger=STRANGER)
    def decline(self, held: Held, stranger: bool) -> None:
        key, agent = named(held, stranger)
        answer = self.apply(operations.decline(agent, key, Reason.REASON_DRAINING, "no", True))
        model = self.models.get(key.task_id)
        if model is None or not model.holds(agent, key) or not model.unanswered:
            assert answer.status is ReportStatus.STALE
        elif model.state == CANCELLING:
            model.end("cancelled")
        else:
            model.again(waiting=answer.retry_after > 0)

    @rule(held=attempts, stranger=STRANGER, index=st.integers(1, 4), missing=st.integers(0, 2))
    def progress(self, held: Held, stranger: bool, index: int, missing: int) -> None:
        key, agent = named(held, stranger)
        answer, model = (
            self.apply(operations.report_progress(agent, key, 100, index, b"p", missing)),
            self.models.get(key.task_id),
        )
        expected = model.report(agent, key) if model else ReportStatus.STALE
        if model is None or expected is not ReportStatus.ACCEPTED:
            assert answer.status is expected
        elif index <= model.progress_index:
            assert answer.status is ReportStatus.REPEATED
        elif index - model.progress_index - 1 > missing:
            assert answer.status is ReportStatus.GAP
        else:
            assert answer.status is ReportStatus.ACCEPTED
            model.start()
            model.progress_index = index

    @rule(held=attempts, stranger=STRANGER)
    def acknowledge_cancel(self, held: Held, stranger: bool) -> None:
        key, agent = named(held, stranger)
        answer, model = self.apply(operations.acknowledge_cancel(agent, key)), self.models.get(key.task_id)
        if model is None or not model.holds(agent, key) or model.state != CANCELLING:
            assert answer.status is ReportStatus.STALE
        elif model.acknowledged:
            assert answer.status is ReportStatus.REPEATED
        else:
            model.acknowledged = True
            model.kinds.append("cancel_acknowledged")

    @rule(
        held=attempts,
        stranger=STRANGER,
        outcome=st.sampled_from(["response", "failure", "rejected", "cancelled"]),
    )
    def result(self, held: Held, stranger: bool, outcome: str) -> None:
        key, agent = named(held, stranger)
        transition: Operation[Any]
        if outcome == "response":
            transition = operations.succeed(agent, key, b"r%d" % key.fence)
        elif outcome == "cancelled":
            transition = operations.confirm_cancelled(agent, key, Reason.REASON_CANCELLED)
        else:
            transition = operations.fail(agent, key, Reason.REASON_HANDLER_FAILED, "m", "E", outcome == "failure")
        model = self.models.get(key.task_id)
        expected = model.report(agent, key) if model else ReportStatus.STALE
        answer = self.apply(transition)
        assert answer.status is expected
        if model is None or expected is not ReportStatus.ACCEPTED:
            return
        model.taken = (key.fence, agent)
        if outcome == "cancelled":
            model.end("cancelled")
            return
        model.start()
        if outcome == "response":
            model.end("succeeded")
        else:
            model.attempt_failed(outcome == "failure")

    @rule(held=attempts, stranger=STRANGER)
    def renew(self, held: Held, stranger: bool) -> None:
        key, agent = named(held, stranger)
        stale = self.apply(operations.renew(shard_of(key.task_id), agent, (key,))).stale
        model = self.models.get(key.task_id)
        assert stale == (() if model is not None and model.holds(agent, key) else (key,))

    @rule(held=attempts, stranger=STRANGER)
    def come_back(self, held: Held, stranger: bool) -> None:
        key, agent = named(held, stranger)
        kept = self.apply(operations.resume(shard_of(key.task_id), agent, (key,)))
        model = self.models.get(key.task_id)
        if model is not None and model.holds(agent, key):
            model.start()
            assert [each.attempt for each in kept] == [key]
        else:
            mine = model is not None and model.taken == (key.fence, agent)
            assert len(kept) == int(mine)

    # --- time ---

    @rule(task_id=tasks)
    def time_is_up(self, task_id: str) -> None:
        """The task's next timer is due now."""
        names, model = ShardKeys(shard_of(task_id)), self.models[task_id]
        if model.state in TERMINAL or (model.state == QUEUED and not model.waiting):
            return
        timer = "retry_due" if model.waiting else "offer_due" if model.unanswered else "lease_due"
        change_state(self.redis, names.task(task_id), **{timer: 1, "timer": 1})
        self.redis.zadd(f"{names.base}timers", {task_id: 1})
        swept = self.apply(upkeep.sweep(shard_of(task_id), 100))
        (expired,) = [each for each in swept.expired if each.attempt.task_id == task_id]
        if timer == "retry_due":
            assert expired.kind == "retry"
            model.waiting = False
        elif timer == "offer_due":
            assert expired.kind == "offer"
            if model.state == CANCELLING:
                model.end("cancelled")
            else:
                model.again(waiting=int(stored_state(self.redis, names.task(task_id))["retry_due"]) > 0)
        else:
            assert expired.kind == "attempt"
            model.attempt_failed(True)

    # --- what always holds ---

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        records = [record for shard in self.run(Outbox(self.store).read(10_000)) for record in shard]
        by_task: dict[str, list[str]] = {}
        for record in records:
            by_task.setdefault(record.task_id, []).append(record.kind)
            assert record.revision == len(by_task[record.task_id])
        for task_id, model in self.models.items():
            task = self.apply(operations.read_task(task_id)).task
            assert (task.state, task.revision) == (model.state, len(model.kinds))
            assert (task.attempt.attempt, task.attempt.fence, task.agent_id) == (
                model.attempt,
                model.fence,
                model.agent,
            )
            assert by_task[task_id] == model.kinds
            assert sum(kind in ("succeeded", "failed", "cancelled") for kind in model.kinds) == (
                model.state in TERMINAL
            )
            assert bool(task.response) == (model.state == SUCCEEDED)

    @invariant()
    def the_keys_are_those_of_the_table(self) -> None:
        names = [name.decode() for name in self.redis.scan_iter(count=1000)]
        assert [name for name in names if keys.match(name) is None] == []
        unfinished = Counter(shard_of(each.task_id) for each in self.models.values() if each.state not in TERMINAL)
        for shard in range(SHARDS):
            assert int(self.redis.hget(ShardKeys(shard).open, METHOD.service) or 0) == unfinished[shard]


@pytest.mark.timeout(300)
def test_the_store_agrees_with_its_model_in_any_order_of_events(valkey: EmbeddedServer) -> None:
    StoreLaws.url = valkey.url
    run_state_machine_as_test(
        StoreLaws,
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            # A failing run of 50 steps against a real server is short enough to read; shrinking it takes minutes.
            phases=(Phase.generate,),
        ),
    )
