"""The operations of the store on a real server, one by one."""

from __future__ import annotations

import asyncio

import pytest

from orki.control.v1.attempt_pb2 import TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import InvalidArgument, InvalidSetting, StoreUnavailable, UnknownTask
from orki_contract.model import Backoff, TaskMethod
from orki_contract.trace import Span, new_span
from orki_control.session import AttemptKey
from orki_server._events import Outbox
from orki_server._keys import FleetKeys
from orki_server._store import operations, upkeep
from orki_server._store.operations import (
    OfferedAttempt,
    Recipient,
    Submitted,
    new_task_id,
    shard_of,
    submission_digest,
)
from orki_server._store.replies import Renewed, ReportStatus, TaskView
from orki_server._store.store import Store, read_layout
from orki_server._store.tasks import TaskFilter, list_tasks

METHOD = TaskMethod(
    service="acme.v1.WorkService",
    name="Do",
    request="acme.v1.DoRequest",
    response="acme.v1.DoResponse",
    heartbeat_timeout=5.0,
    backoff=Backoff(initial=0.001),
)
SHARD = 1


async def submit(
    store: Store, *, key: str = "", request: bytes = b"q", method: TaskMethod = METHOD, span: Span | None = None
) -> Submitted:
    return await store.apply(
        operations.submit(
            task_id=new_task_id(SHARD),
            method=method,
            request=request,
            digest=submission_digest(method.full_name, request),
            idempotency_key=key,
            span=span or new_span(),
            actor="tester",
        )
    )


async def take(store: Store, agent: str = "a1", slots: int = 1, accept_timeout: float = 2.0) -> list[OfferedAttempt]:
    recipient = Recipient(agent, f"{agent}-1", slots, (METHOD.full_name,))
    return list((await store.offer(operations.offer(SHARD, accept_timeout, (recipient,)))).offers)


async def started(store: Store, agent: str = "a1", method: TaskMethod = METHOD) -> AttemptKey:
    await submit(store, method=method)
    (offered,) = await take(store, agent)
    answer = await store.apply(operations.accept(agent, offered.attempt))
    assert answer.status is ReportStatus.ACCEPTED
    return offered.attempt


async def look(store: Store, task_id: str, limit: int = 0, after: str = "") -> TaskView:
    seen = await store.apply(operations.read_task(task_id, limit, after))
    assert seen is not None
    return seen


async def kinds(store: Store, task_id: str) -> list[str]:
    records = [record for shard in await Outbox(store).read(1000) for record in shard if record.task_id == task_id]
    assert [record.revision for record in records] == list(range(1, len(records) + 1))
    assert (await look(store, task_id)).task.revision == len(records)
    return [record.kind for record in records]


async def test_a_task_runs_from_submission_to_response(store: Store) -> None:
    parent = new_span()
    submitted = await submit(store, request=b"\x00\xffrequest", span=parent.child())
    assert submitted.status == "new"
    (offered,) = await take(store)
    assert (offered.attempt.attempt, offered.request, offered.lease) == (1, b"\x00\xffrequest", 5.0)
    assert offered.attempt.task_id == submitted.task_id
    assert offered.attempt.fence >> 44 == 1
    assert (await look(store, submitted.task_id)).task.state == TaskState.TASK_STATE_OFFERED
    accepted = await store.apply(operations.accept("a1", offered.attempt))
    assert accepted.state == TaskState.TASK_STATE_RUNNING
    result = await store.apply(operations.succeed("a1", offered.attempt, b"\x00response"))
    assert (result.status, result.state) == (ReportStatus.ACCEPTED, TaskState.TASK_STATE_SUCCEEDED)
    seen = (await look(store, submitted.task_id)).task
    assert seen.response == b"\x00response"
    assert seen.submitted_us == submitted.submitted_us < seen.ended_us
    assert await kinds(store, submitted.task_id) == ["submitted", "offered", "started", "succeeded"]


async def test_the_spans_of_task_and_attempt_nest(store: Store) -> None:
    parent = new_span()
    span = parent.child()
    await submit(store, span=span)
    (offered,) = await take(store)
    assert offered.traceparent.split("-")[1] == parent.trace_id
    submitted, handed = next(records for records in await Outbox(store).read(10) if records)
    assert (submitted.traceparent, submitted.parent_id) == (span.traceparent, parent.span_id)
    assert (handed.traceparent, handed.parent_id) == (offered.traceparent, span.span_id)


async def test_an_idempotency_key_gives_the_same_task_or_a_conflict(store: Store) -> None:
    first = await submit(store, key="k")
    assert await submit(store, key="k") == Submitted("same", first.task_id, 0)
    assert (await submit(store, key="k", request=b"other")).status == "conflict"
    assert (await submit(store, key="another")).status == "new"


async def test_a_submission_sent_twice_is_one_task(store: Store) -> None:
    span = new_span()
    submission = operations.submit(
        task_id=new_task_id(SHARD),
        method=METHOD,
        request=b"q",
        digest=submission_digest(METHOD.full_name, b"q"),
        idempotency_key="",
        span=span,
        actor="",
    )
    first = await store.apply(submission)
    assert await store.apply(submission) == first
    assert await kinds(store, first.task_id) == ["submitted"]
    assert len(await take(store, slots=5)) == 1


async def test_reports_of_other_agents_and_old_fences_change_nothing(store: Store) -> None:
    attempt = await started(store)
    before = await look(store, attempt.task_id)
    unknown = AttemptKey(new_task_id(SHARD), 1, attempt.fence)
    for agent, key in (("a2", attempt), ("a1", attempt._replace(fence=attempt.fence + 1)), ("a1", unknown)):
        reports = (
            operations.accept(agent, key),
            operations.decline(agent, key, Reason.REASON_DRAINING, "", True),
            operations.report_progress(agent, key, 10, 1, b""),
            operations.succeed(agent, key, b""),
            operations.fail(agent, key, Reason.REASON_HANDLER_FAILED, "", "", True),
            operations.confirm_cancelled(agent, key, Reason.REASON_CANCELLED),
            operations.acknowledge_cancel(agent, key),
        )
        answers = await asyncio.gather(*(store.apply(report) for report in reports))
        assert {answer.status for answer in answers} == {ReportStatus.STALE}
        assert {answer.state for answer in answers} == {TaskState.TASK_STATE_UNSPECIFIED}
        assert await store.apply(operations.renew(SHARD, agent, (key,))) == Renewed((key,))
        assert await store.apply(operations.resume(SHARD, agent, (key,))) == []
    assert await look(store, attempt.task_id) == before


async def test_a_result_is_accepted_once_and_acknowledged_again(store: Store) -> None:
    attempt = await started(store)
    assert (await store.apply(operations.succeed("a1", attempt, b"one"))).status is ReportStatus.ACCEPTED
    assert (await store.apply(operations.succeed("a1", attempt, b"two"))).status is ReportStatus.REPEATED
    assert (await store.apply(operations.succeed("a2", attempt, b"two"))).status is ReportStatus.STALE
    assert (await look(store, attempt.task_id)).task.response == b"one"
    (kept,) = await store.apply(operations.resume(SHARD, "a1", (attempt,)))
    assert kept.state == TaskState.TASK_STATE_SUCCEEDED


async def test_a_failed_attempt_is_followed_by_another_under_a_higher_fence(store: Store) -> None:
    first = await started(store)
    failed = await store.apply(
        operations.fail("a1", first, Reason.REASON_HANDLER_FAILED, "it broke", "ValueError", True)
    )
    assert (failed.status, failed.state, failed.retry_after) == (
        ReportStatus.ACCEPTED,
        TaskState.TASK_STATE_QUEUED,
        0.001,
    )
    assert (
        await store.apply(operations.fail("a1", first, Reason.REASON_HANDLER_FAILED, "", "", True))
    ).status is ReportStatus.REPEATED
    await asyncio.sleep(0.005)
    swept = await store.apply(upkeep.sweep(SHARD, 10))
    assert [each.kind for each in swept.expired] == ["retry"]
    (second,) = await take(store, "a2")
    assert (second.attempt.attempt, second.attempt.task_id) == (2, first.task_id)
    assert second.attempt.fence > first.fence
    # The first attempt's failure was accepted, so further reports under its fence change nothing.
    assert (await store.apply(operations.succeed("a1", first, b""))).status is ReportStatus.REPEATED
    seen = (await look(store, first.task_id)).task
    assert seen.state == TaskState.TASK_STATE_OFFERED
    assert [(each.message, each.error_type) for each in seen.earlier_failures] == [("it broke", "ValueError")]


async def test_the_failure_of_the_last_attempt_is_the_task_s_failure(store: Store) -> None:
    attempt = await started(store)
    rejected = await store.apply(operations.fail("a1", attempt, Reason.REASON_HANDLER_REJECTED, "never", "E", False))
    assert (rejected.state, rejected.retry_after) == (TaskState.TASK_STATE_FAILED, None)
    seen = (await look(store, attempt.task_id)).task
    assert (seen.failure.reason, seen.failure.message) == (Reason.REASON_HANDLER_REJECTED, "never")
    assert await kinds(store, attempt.task_id) == ["submitted", "offered", "started", "failed"]


async def test_attempts_run_out(store: Store) -> None:
    await submit(store)
    states = []
    for number in (1, 2, 3):
        await asyncio.sleep(0.005)
        await store.apply(upkeep.sweep(SHARD, 10))
        (offered,) = await take(store)
        await store.apply(operations.accept("a1", offered.attempt))
        answer = await store.apply(
            operations.fail("a1", offered.attempt, Reason.REASON_HANDLER_FAILED, f"{number}", "", True)
        )
        states.append(answer.state)
    assert states == [TaskState.TASK_STATE_QUEUED, TaskState.TASK_STATE_QUEUED, TaskState.TASK_STATE_FAILED]
    (task,), _ = await list_tasks(store, TaskFilter(), 10, "")
    seen = (await look(store, task.task_id)).task
    assert [each.message for each in seen.earlier_failures] == ["1", "2"]
    assert seen.failure.message == "3"


async def test_an_unanswered_offer_costs_no_attempt(store: Store) -> None:
    await submit(store)
    fences, next_timers = [], []
    for _ in range(4):
        (offered,) = await take(store, accept_timeout=0)
        fences.append(offered.attempt.fence)
        await asyncio.sleep(0.002)
        swept = await store.apply(upkeep.sweep(SHARD, 10))
        assert [each.kind for each in swept.expired] == ["offer"]
        next_timers.append(swept.next_timer)
    assert fences == sorted(set(fences))
    # The fourth unanswered offer in a row is followed by a wait, which prevents a busy loop.
    assert await take(store) == []
    assert 0 < next_timers[-1] <= 0.8


async def test_a_declined_task_goes_to_another_agent(store: Store) -> None:
    await submit(store)
    (offered,) = await take(store)
    answer = await store.apply(operations.decline("a1", offered.attempt, Reason.REASON_DRAINING, "bye", True))
    assert (answer.status, answer.retry_after) == (ReportStatus.ACCEPTED, 0)
    (again,) = await take(store, "a2")
    assert again.attempt.attempt == 2
    accepted = await store.apply(operations.accept("a2", again.attempt))
    assert accepted.status is ReportStatus.ACCEPTED
    assert (
        await store.apply(operations.decline("a2", again.attempt, Reason.REASON_DRAINING, "", True))
    ).status is ReportStatus.STALE


async def test_a_cancel_before_the_start_ends_the_task(store: Store) -> None:
    submitted = await submit(store)
    assert (await store.apply(operations.cancel(submitted.task_id, "no need", "me"))).status == "done"
    assert (await store.apply(operations.cancel(submitted.task_id, "again", "me"))).status == "ended"
    assert await take(store) == []
    seen = (await look(store, submitted.task_id)).task
    assert (seen.state, seen.failure.message) == (TaskState.TASK_STATE_CANCELLED, "no need")
    assert await kinds(store, submitted.task_id) == ["submitted", "cancel_requested", "cancelled"]


async def test_a_cancel_of_a_running_task_is_requested_acknowledged_and_confirmed(store: Store) -> None:
    attempt = await started(store)
    asked = await store.apply(operations.cancel(attempt.task_id, "stop", "me"))
    assert (asked.status, asked.agent_id, asked.attempt, asked.cancel_grace) == ("requested", "a1", attempt, 5.0)
    assert (await store.apply(operations.cancel(attempt.task_id, "stop", "me"))).status == "repeated"
    assert (await store.apply(operations.acknowledge_cancel("a1", attempt))).status is ReportStatus.ACCEPTED
    assert (await store.apply(operations.acknowledge_cancel("a1", attempt))).status is ReportStatus.REPEATED
    ended = await store.apply(operations.confirm_cancelled("a1", attempt, Reason.REASON_CANCELLED))
    assert ended.state == TaskState.TASK_STATE_CANCELLED
    assert (await store.apply(operations.succeed("a1", attempt, b""))).status is ReportStatus.REPEATED
    assert await kinds(store, attempt.task_id) == [
        "submitted",
        "offered",
        "started",
        "cancel_requested",
        "cancel_acknowledged",
        "cancelled",
    ]


async def test_a_result_after_a_cancel_request_is_accepted(store: Store) -> None:
    attempt = await started(store)
    await store.apply(operations.cancel(attempt.task_id, "", "me"))
    assert (await store.apply(operations.succeed("a1", attempt, b"r"))).state == TaskState.TASK_STATE_SUCCEEDED
    assert (await store.apply(operations.cancel(attempt.task_id, "", "me"))).status == "ended"


async def test_a_cancelled_attempt_that_fails_is_not_retried(store: Store) -> None:
    attempt = await started(store)
    await store.apply(operations.cancel(attempt.task_id, "", "me"))
    answer = await store.apply(operations.fail("a1", attempt, Reason.REASON_HANDLER_FAILED, "broke", "", True))
    assert (answer.state, answer.retry_after) == (TaskState.TASK_STATE_CANCELLED, None)


async def test_progress_is_stored_once_and_in_order(store: Store) -> None:
    attempt = await started(store)
    for index in (1, 2, 2, 1, 3):
        await store.apply(operations.report_progress("a1", attempt, 1000, index, b"p%d" % index))
    seen = await look(store, attempt.task_id, 100)
    assert [(each.index, each.payload, each.attempt) for each in seen.progress] == [
        (1, b"p1", 1),
        (2, b"p2", 1),
        (3, b"p3", 1),
    ]
    rest = await look(store, attempt.task_id, 100, seen.progress[0].cursor)
    assert rest.progress == seen.progress[1:]
    assert await kinds(store, attempt.task_id) == ["submitted", "offered", "started"]


async def test_directives_go_to_the_running_attempt_only(store: Store) -> None:
    attempt = await started(store)
    assert (await store.apply(operations.direct(attempt, 7, "me"))).status == "running"
    assert (await store.apply(operations.direct(attempt._replace(fence=1), 7, "me"))).status == "idle"
    await store.apply(operations.succeed("a1", attempt, b""))
    assert (await store.apply(operations.direct(attempt, 7, "me"))).status == "ended"
    assert (
        await store.apply(operations.direct(attempt._replace(task_id=new_task_id(SHARD)), 7, "me"))
    ).status == "unknown"


@pytest.mark.parametrize(
    ("timers", "reason"),
    [
        ({"heartbeat_timeout": 0.001}, Reason.REASON_LEASE_EXPIRED),
        ({"attempt_timeout": 0.001}, Reason.REASON_ATTEMPT_TIMEOUT),
        ({"stall_timeout": 0.001}, Reason.REASON_STALLED),
    ],
)
async def test_each_timer_ends_the_attempt_with_its_reason(
    store: Store, timers: dict[str, int], reason: Reason.ValueType
) -> None:
    values = {"service": METHOD.service, "name": "Do", "request": "q", "response": "r"}
    method = TaskMethod(**values, **timers, backoff=Backoff(initial=0.001))  # type: ignore[arg-type]
    attempt = await started(store, method=method)
    await asyncio.sleep(0.01)
    (expired,) = (await store.apply(upkeep.sweep(SHARD, 10))).expired
    assert (expired.kind, expired.agent_id, expired.attempt) == ("attempt", "a1", attempt)
    seen = (await look(store, attempt.task_id)).task
    assert (seen.state, seen.earlier_failures[0].reason) == (TaskState.TASK_STATE_QUEUED, reason)
    assert (await store.apply(operations.succeed("a1", attempt, b""))).status is ReportStatus.STALE


async def test_the_total_timeout_ends_a_queued_task(store: Store) -> None:
    method = TaskMethod(service=METHOD.service, name="Do", request="q", response="r", total_timeout=0.001)
    waiting = (await submit(store, method=method)).task_id
    await asyncio.sleep(0.01)
    (expired,) = (await store.apply(upkeep.sweep(SHARD, 10))).expired
    assert expired.kind == "task"
    seen = (await look(store, waiting)).task
    assert (seen.state, seen.failure.reason) == (TaskState.TASK_STATE_FAILED, Reason.REASON_TOTAL_TIMEOUT)
    assert await take(store) == []


async def test_a_lease_is_renewed_by_heartbeats_and_by_resuming(store: Store) -> None:
    method = TaskMethod(
        service=METHOD.service, name="Do", request="q", response="r", heartbeat_timeout=0.4, backoff=METHOD.backoff
    )
    attempt = await started(store, method=method)
    for _ in range(4):
        await asyncio.sleep(0.15)
        assert await store.apply(operations.renew(SHARD, "a1", (attempt,))) == Renewed()
        assert (await store.apply(upkeep.sweep(SHARD, 10))).expired == ()
    (kept,) = await store.apply(operations.resume(SHARD, "a1", (attempt,)))
    assert (kept.attempt, kept.state) == (attempt, TaskState.TASK_STATE_RUNNING)
    assert kept.traceparent


async def test_finished_tasks_are_removed_with_all_their_keys(redis_url: str) -> None:
    store = Store(redis_url, shards=4, retention=0.001)
    await store.open()
    submitted = await submit(store, key="k")
    (offered,) = await take(store)
    await store.apply(operations.report_progress("a1", offered.attempt, 10, 1, b""))
    await store.apply(operations.succeed("a1", offered.attempt, b""))
    await asyncio.sleep(0.01)
    await store.apply(upkeep.sweep(SHARD, 10))
    assert await store.apply(operations.read_task(submitted.task_id)) is None
    assert await list_tasks(store, TaskFilter(), 10, "") == ([], "")
    assert (await submit(store, key="k")).status == "new"
    await store.close()


async def test_tasks_go_to_recipients_in_turn_oldest_first(store: Store) -> None:
    ids = [(await submit(store)).task_id for _ in range(5)]
    recipients = tuple(Recipient(name, f"{name}-1", 2, (METHOD.full_name,)) for name in ("a", "b"))
    offered = (await store.offer(operations.offer(SHARD, 1.0, recipients))).offers
    assert [(each.recipient, each.attempt.task_id) for each in offered] == [
        (0, ids[0]),
        (1, ids[1]),
        (0, ids[2]),
        (1, ids[3]),
    ]
    other = Recipient("c", "c-1", 9, ("other.v1.Service/Do",))
    assert (await store.offer(operations.offer(SHARD, 1.0, (other,)))).offers == ()


async def test_lists_are_paged_newest_first_and_filtered(store: Store) -> None:
    ids = []
    for number in range(10):
        task_id = new_task_id(number % 4)
        ids.append(task_id)
        await store.apply(
            operations.submit(
                task_id=task_id,
                method=METHOD,
                request=b"",
                digest="0" * 64,
                idempotency_key="",
                span=new_span(),
                actor="",
            )
        )
    found: list[str] = []
    token = ""
    for _ in range(10):
        page, token = await list_tasks(store, TaskFilter(), 3, token)
        found += [task.task_id for task in page]
        if not token:
            break
    assert found == ids[::-1]
    await store.apply(operations.cancel(ids[0], "", ""))
    only = await list_tasks(store, TaskFilter(states=frozenset({TaskState.TASK_STATE_CANCELLED})), 3, "")
    assert [task.task_id for task in only[0]] == [ids[0]]
    assert (await list_tasks(store, TaskFilter(method="x/y"), 3, ""))[0] == []
    assert (await list_tasks(store, TaskFilter(agent_id="x"), 3, ""))[0] == []


@pytest.mark.parametrize("token", ["!", "bm9wZQ==", "MTIzIG5vcGU=", "é"])
async def test_a_foreign_page_token_is_refused(store: Store, token: str) -> None:
    with pytest.raises(InvalidArgument, match="page_token"):
        await list_tasks(store, TaskFilter(), 3, token)


@pytest.mark.parametrize("task_id", ["", "t1", "t1-xyz", "x1-" + "0" * 26, "t01-" + "0" * 26, "t1-" + "U" * 26])
def test_a_malformed_task_id_is_unknown(task_id: str) -> None:
    with pytest.raises(UnknownTask):
        shard_of(task_id)


async def test_an_unknown_fence_raises_the_epoch(store: Store) -> None:
    attempt = await started(store)
    assert not await store.check_fence(attempt)
    lost = attempt._replace(fence=attempt.fence + 1000)
    assert await store.check_fence(lost)
    await submit(store)
    (offered,) = await take(store)
    assert offered.attempt.fence > lost.fence
    assert offered.attempt.fence >> 44 == 2


async def test_a_store_of_another_layout_is_refused(redis_url: str, store: Store) -> None:
    other = Store(redis_url, shards=5)
    with pytest.raises(InvalidSetting, match="has 4 shards, this orchestrator is set to 5"):
        await other.open()
    await other.close()


@pytest.mark.parametrize("field", ["version", "shards"])
@pytest.mark.parametrize("value", [b"x", b"", b"-1", b"0", b"1.5", b"\xff", b"9" * 5000])
async def test_a_damaged_layout_is_one_sentence(redis_url: str, store: Store, field: str, value: bytes) -> None:
    await store.connection.call("HSET", FleetKeys.LAYOUT, field, value)
    other = Store(redis_url, shards=store.shards)
    with pytest.raises(InvalidSetting, match="has a damaged layout: its key orki:{of}:layout was changed"):
        await other.open()
    with pytest.raises(InvalidSetting, match="has a damaged layout"):
        await read_layout(other.connection)
    await other.close()


async def test_a_store_that_does_not_answer_is_unavailable() -> None:
    store = Store("redis://127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1 does not answer"):
        await store.open()
    await store.close()


@pytest.mark.parametrize("url", ["http://x", "127.0.0.1:6379", "redis://x:port/0", "redis://h/0?unknown=1&"])
def test_a_malformed_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Store(url.replace("://", "://user:secret@"))
    assert "secret" not in caught.value.message
