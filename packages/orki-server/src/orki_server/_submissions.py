"""Submissions: their checks, their operation, and the snapshot of a new task.

Calls and sessions share this code. A session may find a submission's method and message class in the cache; then the
check needs no coroutine.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki_contract.errors import IdempotencyConflict, InvalidArgument, Overloaded, StaleFence
from orki_contract.model import TaskMethod
from orki_contract.trace import Span, new_span, parse_traceparent
from orki_control.session import AttemptKey
from orki_server._fields import MAX_LANES
from orki_server._registry import ContractRegistry, PayloadCheck
from orki_server._store import operations
from orki_server._store.budget import lineage, open_budget, own_budget
from orki_server._store.family import adopt
from orki_server._store.operations import (
    NO_LINEAGE,
    Operation,
    Submitted,
    known_task_id,
    new_task_id,
    shard_of,
    shard_of_key,
    submission_digest,
)
from orki_server._store.placement import ANYWHERE, COUNTING_SHARD, Placement
from orki_server._store.replies import BULK_BYTES
from orki_server._store.server import Durability
from orki_server._store.store import Store

SUBMISSION_ID_BYTES: Final = 16
"""Length of a submission id: 6 bytes of milliseconds, then random bytes."""


@dataclass(slots=True)
class Pending:
    """A submission on its way to the store.

    Attributes:
        submission: The submission.
        task_id: Id of the task, if it is new.
        shard: Shard of the task.
        span: The task's span.
        operation: The operation of the store.
        durability: Durability that its method declares; empty for none.
        expected: Whether the batch of the operation also asks for the task.
    """

    submission: pb.Submission
    task_id: str
    shard: int
    span: Span
    operation: Operation[Submitted]
    durability: str = ""
    expected: bool = False


class Submissions:
    """Checks submissions, by `rules` first, and gives them their task ids.

    It calls `on_new` with a new task. It calls `expect` with shard and method of a submission on its way, which returns
    whether its batch asks for the task. A task that must be durable before it runs is not asked for.
    """

    def __init__(
        self,
        store: Store,
        registry: ContractRegistry,
        payloads: PayloadCheck,
        rules: Callable[[pb.Submission], None],
        on_new: Callable[[Pending], None],
        expect: Callable[[int, str], bool],
    ) -> None:
        self._expect = expect
        self._waits = store.connection.durability.waits
        self._durable = store.durable
        self._shards = store.shards
        self._registry = registry
        self._payloads = payloads
        self._rules = rules
        self._on_new = on_new
        self._apply = store.apply
        self._numbers = itertools.count()

    async def check(self, submission: pb.Submission) -> TaskMethod:
        """Check a submission and return its method.

        Raises:
            InvalidArgument, TooLarge: A field is invalid.
            UnknownMethod: The method is not registered.
            StoreUnavailable: The contract is not cached, and the store is down.
        """
        self._rules(submission)
        method = await self._registry.method(submission.method)
        await self._payloads.request(method, submission.request)
        return method

    def check_cached(self, submission: pb.Submission) -> TaskMethod | None:
        """Check a submission by the cache; None if `check` and `prepare` must read the store. Raises as `check`."""
        self._rules(submission)
        method = self._registry.cached(submission.method)
        if (
            method is None
            or submission.HasField("parent")
            or submission.HasField("submitter")
            or submission.durability
            or method.durability
            or not self._payloads.request_cached(method, submission.request)
        ):
            return None
        return method

    def pending(self, submission: pb.Submission, method: TaskMethod, actor: str, submission_id: bytes = b"") -> Pending:
        """Return the operation of a checked submission.

        The submission id, the method and the request determine the task id, so that a repeated submission finds its
        task. An idempotency key does the same across submission ids, and costs the store an entry.
        """
        parent = parse_traceparent(submission.traceparent)
        span = parent.child() if parent else new_span()
        key = submission.idempotency_key
        digest = submission_digest(submission.method, submission.request)
        placement = Placement.of(submission)
        if key or not submission_id:
            shard = shard_of_key(key, self._shards) if key else next(self._numbers) % self._shards
            shard = COUNTING_SHARD if placement.is_counted else shard
            task_id = new_task_id(shard)
        elif len(submission_id) != SUBMISSION_ID_BYTES:
            raise InvalidArgument(f"submission_id: {SUBMISSION_ID_BYTES} bytes, not {len(submission_id)}")
        else:
            # Submissions of the same millisecond share a shard, so that a batch needs few script calls.
            shard = COUNTING_SHARD if placement.is_counted else zlib.crc32(submission_id[:6]) % self._shards
            drawn = hashlib.sha256(submission_id + digest.encode()).digest()[:10]
            task_id = known_task_id(shard, int.from_bytes(submission_id[:6] + drawn))
        operation = operations.submit(
            task_id=task_id,
            method=method,
            request=submission.request,
            digest=digest,
            idempotency_key=key,
            span=span,
            actor=actor,
            contract=self._registry.leading(method.service),
            placement=placement,
            lineage=("", "", "", own) if (own := own_budget(submission, method)) else NO_LINEAGE,
        )
        return Pending(submission, task_id, shard, span, operation, method.durability)

    def send(self, pending: Pending) -> asyncio.Future[Submitted]:
        """Enqueue the operation of a submission. Raises as `Batcher.apply`.

        If an agent has a free slot, the same batch also assigns the task.
        """
        submitted = self._apply(pending.operation)
        submission = pending.submission
        waits = self._waits or (submission.durability or pending.durability or "memory") != "memory"
        if not waits and len(submission.request) < BULK_BYTES and Placement.of(submission) is ANYWHERE:
            pending.expected = self._expect(pending.shard, submission.method)
        return submitted

    async def store(self, pending: Pending) -> Submitted:
        """Store a submission, and wait until it is as durable as it asks for. Raises as `prepare`, and:

        Raises:
            NotDurable: The store cannot keep the durability.
        """
        wanted = Durability.parse(pending.submission.durability or pending.durability or "memory")
        await self._durable.check(pending.shard, wanted)
        prepared = await self.prepare(pending)
        submitted = await self.send(prepared)
        pending.expected = prepared.expected
        await self._durable.confirm(shard_of(submitted.task_id), wanted)
        return submitted

    async def prepare(self, pending: Pending) -> Pending:
        """Note a child at its parent, before it exists, and open its budget. Returns it with its place in the tree.

        Raises:
            StaleFence: The attempt that submits it does not run, or no longer.
            Overloaded: The parent has too many children.
            UnknownTask: The parent's id is malformed.
            StoreUnavailable: The store is down.
        """
        if pending.submission.HasField("submitter"):
            pending = await self._find_lineage(pending)
        if not pending.submission.HasField("parent"):
            return pending
        parent = AttemptKey.of(pending.submission.parent)
        status = await self._apply(adopt(parent, pending.task_id))
        if status == "stale":
            raise StaleFence(f"parent: {parent} does not run, and its handler may submit no further tasks")
        if status == "full":
            raise Overloaded(f"parent: task {parent.task_id} has 10,000 children that end with it")
        return pending

    async def _find_lineage(self, pending: Pending) -> Pending:
        submission = pending.submission
        parent = AttemptKey.of(submission.submitter)
        found = await self._apply(lineage(parent))
        if found is None:
            return pending  # It was forgotten long ago.
        if found.accounts and not found.runs:
            raise StaleFence(f"submitter: {parent} does not run, and can charge nothing to its budget")
        *arguments, _, _, _, own = pending.operation.arguments
        accounts = found.accounts
        if accounts and own:
            status = await self._apply(open_budget(accounts[0], pending.task_id, str(own)))
            if status == "full":
                raise Overloaded(f"submitter: the budget of task {accounts[0]} has too many tasks")
            if status == "gone":
                accounts = ()
        arguments += [parent.task_id, found.root, ",".join(accounts), own]
        return replace(pending, operation=replace(pending.operation, arguments=arguments))

    def accepted(self, pending: Pending, submitted: Submitted) -> pb.TaskSnapshot | None:
        """Return the snapshot of a new task; None for a task that was found and must be read.

        Raises:
            IdempotencyConflict: The key belongs to another request.
        """
        submission = pending.submission
        if submitted.status == "conflict":
            raise IdempotencyConflict(
                f"idempotency_key {submission.idempotency_key[:64]!r} belongs to task {submitted.task_id}, "
                "which has another method or request"
            )
        if submitted.status == "lanes":
            raise Overloaded(
                f"tasks with {MAX_LANES} combinations of method, labels, limits and fairness key are queued, and this "
                "is a further one; submit again later"
            )
        if submitted.status != "new":
            return None
        self._on_new(pending)
        task = pb.TaskSnapshot(
            task_id=submitted.task_id,
            method=submission.method,
            state=TaskState.TASK_STATE_QUEUED,
            submitted_us=submitted.submitted_us,
            traceparent=pending.span.traceparent,
            revision=1,
        )
        Placement.of(submission).show(task)
        return task
