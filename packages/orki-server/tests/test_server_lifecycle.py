"""The table of a task's life against the real script: every (state, event) pair, legal and illegal."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis import Redis

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import new_span
from orki_control.session import AttemptKey
from orki_server._fields import SPEC_FIELDS, STATE_FIELDS, pack, unpack
from orki_server._keys import ShardKeys
from orki_server._store import budget, lifecycle, operations, suspension, upkeep
from orki_server._store.batcher import shard_script
from orki_server._store.lifecycle import TASK_LIFE, TIMERS, VISIBLE, Life
from orki_server._store.operations import Operation, Recipient, new_task_id
from orki_server._store.placement import ANYWHERE, Placement
from orki_server._store.store import Store

METHOD = TaskMethod(service="acme.v1.WorkService", name="Do", request="q", response="r", backoff=Backoff(initial=60.0))
KEYS = ShardKeys(0)
EVENTS = sorted(TASK_LIFE.events(), key=lambda event: event.__name__)


def stored_state(redis: Redis, name: str) -> dict[str, str]:
    """Return the packed state of the task under this key."""
    packed: Any = redis.hget(name, "state")
    return unpack(STATE_FIELDS, packed) if packed else {"state": "ABSENT"}


def change_state(redis: Redis, name: str, **fields: str | int) -> None:
    """Change fields of the packed state of the task under this key."""
    redis.hset(name, "state", pack({**stored_state(redis, name), **fields}))


class Subject:
    """One task in the store, and the operations that cause the table's events."""

    def __init__(self, store: Store, redis: Redis) -> None:
        self.store = store
        self.redis = redis
        self.task_id = new_task_id(0)
        self.agent = ""
        self.attempt = AttemptKey(self.task_id, 0, 0)

    async def apply(self, operation: Operation[Any]) -> None:
        await self.store.apply(operation)

    def hash(self, **fields: Any) -> None:
        change_state(self.redis, KEYS.task(self.task_id), **fields)

    def state(self) -> Life:
        return Life[stored_state(self.redis, KEYS.task(self.task_id))["state"]]

    def dump(self) -> dict[bytes, Any]:
        """Return the whole shard."""
        names = self.redis.scan_iter(f"{KEYS.base}*", count=1000)
        # The clock goes on with every batch.
        return {name: self.redis.dump(name) for name in names if not name.endswith(b":clock")}

    async def submitted(self, placement: Placement = ANYWHERE) -> None:
        operation = operations.submit(
            task_id=self.task_id,
            method=METHOD,
            request=b"q",
            digest="0" * 64,
            idempotency_key="",
            span=new_span(),
            actor="t",
            placement=placement,
        )
        await self.apply(operation)

    async def delayed(self) -> None:
        await self.submitted(Placement(delay_ms=3_600_000))

    async def offered(self) -> None:
        recipient = Recipient("a1", "i1", 1, (METHOD.full_name,))
        for offered in (await self.store.offer(operations.offer(0, 60.0, (recipient,)))).offers:
            self.agent, self.attempt = "a1", offered.attempt

    async def cancel(self) -> None:
        await self.apply(operations.cancel(self.task_id, "", "t"))

    async def fail(self, retryable: bool) -> None:
        await self.apply(operations.fail(self.agent, self.attempt, Reason.REASON_HANDLER_FAILED, "", "", retryable))

    async def bring_to(self, state: Life) -> None:
        """Bring a new task to a state by legal operations."""
        steps: dict[Life, list[Callable[[], Awaitable[None]]]] = {
            Life.ABSENT: [],
            Life.QUEUED: [self.submitted],
            Life.OFFERED: [self.submitted, self.offered],
            Life.CANCELLING_OFFER: [self.submitted, self.offered, self.cancel],
            Life.CANCELLED: [self.submitted, self.cancel],
        }
        running = [self.submitted, self.offered, lambda: self.apply(operations.accept(self.agent, self.attempt))]
        steps[Life.RUNNING] = running
        steps[Life.WAITING] = [*running, lambda: self.fail(True)]
        steps[Life.FAILED] = [*running, lambda: self.fail(False)]
        steps[Life.SUSPENDED] = [*running, lambda: self.apply(suspension.suspend(self.agent, self.attempt, "why?", 0))]
        steps[Life.CANCELLING] = [*running, self.cancel]
        steps[Life.SUCCEEDED] = [*running, lambda: self.apply(operations.succeed(self.agent, self.attempt, b""))]
        for step in steps[state]:
            await step()
        assert self.state() is state

    def prepare(self, event: type) -> None:
        """Make the timer of an event due, if it has one."""
        for timer, timer_event in TIMERS.items():
            if timer_event is event and self.state() is not Life.ABSENT:
                # Without a number of refused offers, an offer that times out is queued again at once.
                self.hash(**{timer: 1, "timer": 1, "refused_offers": 3})
                self.redis.zadd(f"{KEYS.base}timers", {self.task_id: 1})
        if event is lifecycle.BudgetRaised and self.state() is Life.SUSPENDED:
            self.redis.hset(KEYS.task(self.task_id), "more", "over_budget=1")
        if event is lifecycle.Renewed and self.state() is not Life.ABSENT:
            self.hash(lease_due=9_999_999_999_999)

    async def cause(self, event: type) -> None:
        """Send the operation that causes an event in the states in which it is legal."""
        agent, key = self.agent, self.attempt
        causes: dict[type, Callable[[], Awaitable[None]]] = {
            lifecycle.Submitted: self.submitted,
            lifecycle.Delayed: self.delayed,
            lifecycle.Offered: self.offered,
            lifecycle.Started: lambda: self.apply(operations.accept(agent, key)),
            lifecycle.OfferDeclined: lambda: self.apply(
                operations.decline(agent, key, Reason.REASON_DRAINING, "", False)
            ),
            lifecycle.Progressed: lambda: self.apply(operations.report_progress(agent, key, 10, 1, b"p")),
            lifecycle.Checkpointed: lambda: self.apply(suspension.save_checkpoint(agent, key, 1, b"c")),
            lifecycle.AttemptSuspended: lambda: self.apply(suspension.suspend(agent, key, "why?", 0)),
            lifecycle.Answered: lambda: self.apply(suspension.answer(self.task_id, 0, b"a", "t")),
            lifecycle.BudgetRaised: lambda: self.apply(budget.resume_budget(budget.Admitted("", self.task_id, 0))),
            lifecycle.Renewed: lambda: self.apply(operations.renew(0, agent, (key,))),
            lifecycle.Directed: lambda: self.apply(operations.direct(key, 1, "t")),
            lifecycle.AttemptSucceeded: lambda: self.apply(operations.succeed(agent, key, b"r")),
            lifecycle.AttemptFailed: lambda: self.fail(True),
            lifecycle.AttemptsExhausted: lambda: self.fail(False),
            lifecycle.OfferSuspected: lambda: self.apply(operations.suspect(agent, key)),
            lifecycle.OfferLost: lambda: self.apply(operations.lose(agent, key, "gone")),
            lifecycle.AttemptAbandoned: lambda: self.apply(
                operations.fail(agent, key, Reason.REASON_ABANDONED, "", "", True)
            ),
            lifecycle.AttemptCancelled: lambda: self.apply(
                operations.confirm_cancelled(agent, key, Reason.REASON_CANCELLED)
            ),
            lifecycle.CancelAcknowledged: lambda: self.apply(operations.acknowledge_cancel(agent, key)),
            lifecycle.CancelRequested: self.cancel,
            **{event: lambda: self.apply(upkeep.sweep(0, 10)) for event in TIMERS.values()},
        }
        await causes[event]()


@pytest.fixture
async def subject(redis_url: str) -> AsyncIterator[Subject]:
    store = Store(redis_url, shards=1)
    await store.open()
    with Redis.from_url(redis_url) as redis:
        yield Subject(store, redis)
    await store.close()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("state", Life, ids=lambda state: state.name)
async def test_each_event_moves_the_task_as_listed_or_changes_nothing(
    subject: Subject, state: Life, event: type
) -> None:
    await subject.bring_to(state)
    subject.prepare(event)
    before = subject.dump()
    await subject.cause(event)
    following = TASK_LIFE.rows[state].get(event)
    if following is None:
        assert subject.dump() == before
    else:
        assert subject.state() is following
        assert subject.dump() != before


@pytest.mark.parametrize("state", Life, ids=lambda state: state.name)
def test_move_refuses_what_the_table_does_not_list_before_any_write(redis_url: str, state: Life) -> None:
    bare = """
      OPS.move = function(a)
        local task = load(a[1])
        if not task then
          task = create(a[1])
          task.method = 'acme.v1.WorkService/Do'
        end
        move(task, a[2])
        return { task.state }
      end
    """
    text = shard_script(60.0).text.replace("local replies, at = {}, 3", f"{bare}\nlocal replies, at = {{}}, 3")
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        for event in EVENTS:
            task_id = new_task_id(0)
            if state is not Life.ABSENT:
                spec = dict.fromkeys(SPEC_FIELDS, "") | {"method": METHOD.full_name, "options": "1,1,1,1,1,1,1,1,1"}
                fields = dict.fromkeys(STATE_FIELDS, "") | {"state": state.name}
                redis.hset(KEYS.task(task_id), mapping={"state": pack(fields), "spec": pack(spec)})
            before = redis.hgetall(KEYS.task(task_id))
            following = TASK_LIFE.rows[state].get(event)
            (reply, *_) = redis.eval(text, 1, KEYS.base, "test", "", "move", 2, task_id, event.__name__)  # type: ignore[misc]
            if following is None:
                assert reply == ["error", f"ERR {event.__name__} is illegal in state {state.name}"]
                assert redis.hgetall(KEYS.task(task_id)) == before
            else:
                assert reply == [following.name]


def test_only_move_assigns_the_state() -> None:
    assert len(re.findall(r"\.state\b[^=\n]*[^=~<>\n]=[^=]", _lua())) == 1


def _lua() -> str:
    text = shard_script(60.0).text
    return "\n".join(line.partition("--")[0] for line in text.splitlines())


@pytest.mark.parametrize("state", VISIBLE, ids=lambda state: state.name)
async def test_submitters_see_a_task_state_for_each_state(subject: Subject, state: Life) -> None:
    await subject.bring_to(state)
    view = await subject.store.apply(operations.read_task(subject.task_id))
    assert (view.task.state if view else TaskState.TASK_STATE_UNSPECIFIED) == VISIBLE[state]


def test_every_state_is_reached_and_left() -> None:
    assert set(TASK_LIFE.rows) == set(VISIBLE) == set(Life)
    assert {following for row in TASK_LIFE.rows.values() for following in row.values()} == set(Life)
    assert set(TIMERS.values()) < TASK_LIFE.events()
