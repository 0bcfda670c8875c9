"""The client for submitters. It gives typed values and typed errors.

Submissions, watches, cancels and directives share one stream, the submitters' session (`submitter.proto`). Reads and
lists are gRPC calls; with an orchestrator that serves no sessions, everything is.

What fails because the orchestrator is unavailable is repeated, with full jitter, for as long as `patience` allows.
Repeating is safe: each submission has an id or an idempotency key, so a repeated one finds the task of the first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Final, Self, TypeVar, Unpack

from google.protobuf.message import Message

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef, TaskState
from orki_contract import SubmitSettings, Task, TaskHandle
from orki_contract.backoff import Jitter
from orki_contract.errors import (
    InvalidArgument,
    InvalidSetting,
    NotDirectable,
    OrchestratorUnavailable,
    OrkiError,
    TooLarge,
    error_for,
)
from orki_control._links import Link, Links
from orki_control._operator import OperatorCalls
from orki_control._options import ROOM, ClientOptions
from orki_control._schedules import ClientSchedules
from orki_control._submissions import submission_of, tasks_of
from orki_control._submitter import SessionUnsupported, SubmitterSession, Ticket, new_submission_id
from orki_control._task_handle import SubmittedTask, watch_task
from orki_control.submitter._requests import seen
from orki_control.transport import check_targets, typed_error

A = TypeVar("A")
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
P = TypeVar("P")
D = TypeVar("D")

_MOST_SUBMISSIONS: Final = 1000


class Client(OperatorCalls):
    """A client of a fleet: an async context manager, and the `TaskChannel` of generated clients.

    ```python
    async with Client("127.0.0.1:50051") as orki:
        response = await ReviewServiceClient(orki).review_file(request)
    ```

    With several addresses, such as `Client("10.0.0.1:50051,10.0.0.2:50051")`, a call that fails because an orchestrator
    is unavailable goes on at the next one. So does a name that resolves to several addresses.

    A client belongs to the event loop in which it was entered.

    Attributes:
        target: The addresses, separated by commas.
        schedules: The schedules of the fleet.
    """

    def __init__(self, target: str | Sequence[str], options: ClientOptions | None = None) -> None:
        """Create a client.

        Args:
            target: `HOST:PORT` of the orchestrator; several separated by commas, or a sequence.
            options: Settings.

        Raises:
            InvalidSetting: An address is invalid, or is on another host without TLS or `insecure`.
        """
        self._options = options or ClientOptions()
        self._targets = check_targets(target, insecure=self._options.insecure, credentials=self._options.credentials)
        self.target = ",".join(self._targets)
        self._links: Links | None = None
        self.schedules = ClientSchedules(self._call, self._options.call_timeout)

    async def __aenter__(self) -> Self:
        if self._links is not None:
            raise InvalidSetting("the client is open already; create another one for another `async with`")
        options = self._options
        self._links = Links(self._targets, options.max_message_bytes, options.credentials)
        self._session = SubmitterSession(
            self.target,
            self._links,
            patience=options.patience,
            call_timeout=options.call_timeout,
            max_message_bytes=options.max_message_bytes,
            backoff=options.backoff,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._links is not None:
            await self._session.close()
            links, self._links = self._links, None
            await links.close()

    # --- Submitting. ---

    async def submit(
        self, task: Task[Q, R, P, D], request: Q, *, idempotency_key: str = "", **settings: Unpack[SubmitSettings]
    ) -> SubmittedTask[R, P, D]:
        """Submit one task. When this returns, the task survives the death of the orchestrator.

        Args:
            task: The method.
            request: Its request.
            idempotency_key: Submitting the same request again with the same key returns the same task.
            **settings: When the task may run: `priority`, `delay` or `start_at`; see `SubmitSettings`.

        Raises:
            InvalidArgument: A setting is out of its range.
            IdempotencyConflict: The key was used with another request.
            UnknownMethod: No agent has registered this method yet.
            TooLarge: The request exceeds the maximum message size.
            OrchestratorUnavailable: The orchestrator was unavailable for longer than `patience`.
        """
        handle, _ = await self._submit_one(task, request, idempotency_key, settings, watched=False)
        return handle

    async def call(
        self,
        task: Task[Q, R, P, D],
        request: Q,
        *,
        idempotency_key: str = "",
        timeout: float | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> R:
        """Submit a task and wait for its response: `submit` and `SubmittedTask.result` in one request.

        Args:
            task: The method.
            request: Its request.
            idempotency_key: As for `submit`.
            timeout: Maximum wait for the response in seconds after the submission; None for no limit.
            **settings: As for `submit`.

        Raises:
            WaitTimeout: The task did not end within `timeout`.
            OrkiError: As for `submit`, or the typed error of a task that failed or was cancelled.
        """
        handle, ticket = await self._submit_one(task, request, idempotency_key, settings, watched=True)
        try:
            return await handle.result(timeout)
        finally:
            if ticket is not None:
                self._session.abandon([ticket])

    async def _submit_one(
        self, task: Task[Q, R, P, D], request: Q, idempotency_key: str, settings: SubmitSettings, *, watched: bool
    ) -> tuple[SubmittedTask[R, P, D], Ticket | None]:
        submission = submission_of(task, request, idempotency_key, settings)
        ((outcome, ticket),) = await self._outcomes([submission], watched=watched)
        (snapshot,) = tasks_of([outcome])
        return SubmittedTask(self, task, snapshot, ticket.ended if ticket else None), ticket

    async def submit_many(
        self,
        task: Task[Q, R, P, D],
        requests: Sequence[Q],
        *,
        idempotency_keys: Sequence[str] | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> list[TaskHandle[R, P, D]]:
        """Submit many tasks of one method, in as few calls as count and size allow.

        Args:
            task: The method.
            requests: Any number of requests.
            idempotency_keys: One key for each request; an empty key makes the task new.
            **settings: As for `submit`, for all of them.

        Returns:
            Handles in the order of the requests.

        Raises:
            OrkiError: The error of the first refused submission, as for `submit`. The others are accepted.
        """
        keys = [""] * len(requests) if idempotency_keys is None else idempotency_keys
        if len(keys) != len(requests):
            raise InvalidArgument(f"{len(keys)} idempotency keys for {len(requests)} requests: give one for each")
        submissions = [submission_of(task, request, key, settings) for request, key in zip(requests, keys, strict=True)]
        snapshots = await self.submit_raw(submissions)
        return [SubmittedTask(self, task, snapshot) for snapshot in snapshots]

    async def submit_each(
        self,
        task: Task[Q, R, P, D],
        requests: Sequence[Q],
        *,
        idempotency_keys: Sequence[str] | None = None,
        **settings: Unpack[SubmitSettings],
    ) -> list[SubmittedTask[R, P, D] | OrkiError]:
        """Submit many tasks of one method, each with its own outcome.

        Args:
            task: The method.
            requests: Any number of requests.
            idempotency_keys: One key for each request; an empty key makes the task new.
            **settings: As for `submit`, for all of them.

        Returns:
            For each request, in their order, the handle of its task or the error of its refusal. After a retryable
            error the task may exist if it has no idempotency key of its own.

        Raises:
            InvalidArgument: There is not one key for each request.
        """
        keys = [""] * len(requests) if idempotency_keys is None else idempotency_keys
        if len(keys) != len(requests):
            raise InvalidArgument(f"{len(keys)} idempotency keys for {len(requests)} requests: give one for each")
        outcomes: list[SubmittedTask[R, P, D] | OrkiError | None] = []
        submissions = []
        for request, key in zip(requests, keys, strict=True):
            try:
                submission = submission_of(task, request, key, settings)
                list(self._chunks([submission]))
            except OrkiError as error:
                outcomes.append(error)
                continue
            submissions.append(submission)
            outcomes.append(None)
        answers: list[pb.TaskSnapshot | OrkiError] = []
        for chunk in self._chunks(submissions):
            try:
                answers += [answer for answer, _ in await self._outcomes(chunk, watched=False)]
            except OrkiError as error:
                answers += [error] * len(chunk)
        found = iter(
            answer if isinstance(answer, OrkiError) else SubmittedTask(self, task, answer) for answer in answers
        )
        return [next(found) if outcome is None else outcome for outcome in outcomes]

    async def submit_raw(self, submissions: Sequence[pb.Submission]) -> list[pb.TaskSnapshot]:
        """Submit serialised requests, for callers that know a method only by its name.

        Raises:
            OrkiError: The error of the first refused submission. The others are accepted.
        """
        return tasks_of([outcome for outcome, _ in await self._outcomes(submissions, watched=False)])

    async def _outcomes(
        self, submissions: Sequence[pb.Submission], *, watched: bool
    ) -> list[tuple[pb.TaskSnapshot | OrkiError, Ticket | None]]:
        """Submit by the session, or by calls if the orchestrator serves none."""
        self._opened()
        chunks = list(self._chunks(submissions))
        if self._session.supported:
            with contextlib.suppress(SessionUnsupported):
                return list(await self._session.submit_all(submissions, watched=watched))
        outcomes: list[tuple[pb.TaskSnapshot | OrkiError, Ticket | None]] = []
        for chunk in chunks:
            request = pb.SubmitRequest(submissions=chunk)
            for submission in request.submissions:
                # A call that is repeated finds its task by the key.
                submission.idempotency_key = submission.idempotency_key or f"once-{new_submission_id().hex()}"
            answer = await self._submit(request)
            if len(answer.outcomes) != len(chunk):
                raise OrkiError(f"{self.target} answered {len(chunk)} submissions with {len(answer.outcomes)} outcomes")
            for each in answer.outcomes:
                refused = each.WhichOneof("outcome") != "task"
                outcomes.append((error_for(each.failure.reason, each.failure.message) if refused else each.task, None))
        return outcomes

    # --- Tasks by id. ---

    def handle(self, task: Task[Q, R, P, D], task_id: str) -> SubmittedTask[R, P, D]:
        """Return a handle of a task that was submitted earlier or elsewhere, without a call."""
        return SubmittedTask(self, task, pb.TaskSnapshot(task_id=task_id, method=task.contract.full_name))

    async def get(self, task_id: str) -> pb.TaskSnapshot:
        """Return the task.

        Raises:
            UnknownTask: No task has this id.
        """
        answer = await self._call(lambda link: link.tasks.Get(pb.GetRequest(task_id=task_id), timeout=self._timeout))
        return answer.task

    def watch(self, task_id: str, *, after: str = "") -> AsyncGenerator[pb.WatchResponse, None]:
        """Follow a task to its end, over lost connections: snapshots and progress, with a terminal snapshot last.

        Args:
            task_id: The task.
            after: Cursor of the last received progress; empty for the beginning.

        Raises:
            UnknownTask: No task has this id.
        """
        return self._watch(self._opened(), task_id, after)

    async def _watch(self, links: Links, task_id: str, after: str) -> AsyncGenerator[pb.WatchResponse, None]:
        position: pb.ProgressPosition | None = None
        if self._session.supported:
            with contextlib.suppress(SessionUnsupported):
                async with aclosing(self._session.follow(task_id, after)) as updates:
                    async for update in updates:
                        after, position = seen(update) or (after, position)
                        yield update
                return
        calls = watch_task(links, task_id, after=after, position=position, backoff=self._options.backoff)
        async with aclosing(calls) as updates:
            async for update in updates:
                yield update

    async def wait_end(self, task_id: str) -> pb.TaskSnapshot:
        """Wait for a task's end, over lost connections, and return its terminal snapshot.

        Raises:
            UnknownTask: No task has this id.
        """
        links = self._opened()
        if self._session.supported:
            with contextlib.suppress(SessionUnsupported):
                return await self._session.wait_end(task_id)
        task = pb.TaskSnapshot()
        calls = watch_task(links, task_id, after="", backoff=self._options.backoff)
        async with aclosing(calls) as updates:
            async for update in updates:
                if update.WhichOneof("news") == "task":
                    task = update.task
        return task

    async def cancel(self, task_id: str, message: str = "") -> pb.TaskSnapshot:
        """Cancel a task. Cancelling a task again, or one that has ended, has no effect.

        Returns:
            The task.

        Raises:
            UnknownTask: No task has this id.
        """
        request = pb.CancelRequest(task_id=task_id, message=message)
        self._opened()
        if self._session.supported:
            with contextlib.suppress(SessionUnsupported):
                return await self._session.cancel(request)
        answer = await self._call(lambda link: link.tasks.Cancel(request, timeout=self._timeout))
        return answer.task

    async def answer(self, task_id: str, answer: Message | bytes, *, suspension: int = 0) -> pb.TaskSnapshot:
        """Answer a suspended task, which goes on. The same answer again has no effect.

        Args:
            task_id: The task.
            answer: The method's answer message; bytes if the method declares none.
            suspension: Number of the suspension, from `TaskSnapshot.suspension`; 0 for the current one.

        Returns:
            The task.

        Raises:
            NotSuspended: The task is not suspended, or not by this suspension.
            AlreadyAnswered: It was answered before, with another answer.
            TaskEnded: It has ended.
            UnknownTask: No task has this id.
            TooLarge: The answer is larger than 192 KiB.
        """
        payload = answer if isinstance(answer, bytes) else answer.SerializeToString()
        request = pb.AnswerRequest(task_id=task_id, payload=payload, suspension=suspension)
        answered = await self._call(lambda link: link.tasks.Answer(request, timeout=self._timeout))
        return answered.task

    async def direct(self, task_id: str, directive: Message | bytes) -> AttemptRef:
        """Send a directive to a running task. A call that may have arrived is not repeated, to deliver it only once.

        Returns:
            The attempt that receives the directive.

        Raises:
            NotDirectable: The task is not running, or its method declares no directive.
            UnknownTask: No task has this id.
        """
        payload = directive if isinstance(directive, bytes) else directive.SerializeToString()
        request = pb.DirectRequest(task_id=task_id, payload=payload)
        self._opened()
        if self._session.supported:
            with contextlib.suppress(SessionUnsupported):
                return await self._session.direct(request)

        async def once(link: Link) -> pb.DirectResponse | None:
            if not await link.connected():
                raise OrchestratorUnavailable(f"{link.peer}: no connection")
            try:
                return await link.tasks.Direct(request, timeout=self._timeout)
            except Exception as raised:
                failures.append(typed_error(raised, str(link.peer)))
                return None

        failures: list[OrkiError] = []
        answer = await self._call(once)
        if answer is None:
            raise failures[0]
        if not answer.HasField("attempt"):
            raise NotDirectable(f"task {task_id}: the directive reached no attempt")
        return answer.attempt

    async def list_tasks(
        self,
        *,
        states: Sequence[TaskState.ValueType] = (),
        method: str = "",
        agent_id: str = "",
        labels: Mapping[str, str] | None = None,
        page_size: int = 0,
    ) -> AsyncIterator[pb.TaskSnapshot]:
        """Yield tasks, newest first, fetched page by page.

        Args:
            states: Only tasks in one of these states; empty for all.
            method: Only tasks of this `package.Service/Method`; empty for all.
            agent_id: Only tasks whose current attempt this agent holds; empty for all.
            labels: Only tasks that ask for all of these labels.
            page_size: Tasks in one page, 1 to 1000; 0 for the orchestrator's default.
        """
        request = pb.ListRequest(states=states, method=method, agent_id=agent_id, labels=labels, page_size=page_size)
        while True:
            answer = await self._call(lambda link: link.tasks.List(request, timeout=self._timeout))
            for task in answer.tasks:
                yield task
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def explain(self, task_id: str) -> pb.ExplainResponse:
        """Return what a task waits for, and who has its attempt. Raises UnknownTask if it does not exist."""
        request = pb.ExplainRequest(task_id=task_id)
        return await self._call(lambda link: link.tasks.Explain(request, timeout=self._timeout))

    # --- The fleet. ---

    async def list_agents(self) -> Sequence[pb.AgentSnapshot]:
        """Return the agents that have a session or lost one recently, by agent id."""
        answer = await self._call(lambda link: link.fleet.ListAgents(pb.ListAgentsRequest(), timeout=self._timeout))
        return answer.agents

    async def list_services(self, service: str = "") -> Sequence[pb.ServiceSnapshot]:
        """Return the registered task services with their contracts, by full name; only `service` if it is given."""
        request = pb.ListServicesRequest(service=service)
        answer = await self._call(lambda link: link.fleet.ListServices(request, timeout=self._timeout))
        return answer.services

    async def _submit(self, request: pb.SubmitRequest) -> pb.SubmitResponse:
        return await self._call(lambda link: link.tasks.Submit(request, timeout=self._timeout))

    @property
    def _timeout(self) -> float:
        return self._options.call_timeout

    def _opened(self) -> Links:
        if self._links is None:
            raise OrchestratorUnavailable(f"the client of {self.target} is not open: use it inside `async with`")
        return self._links

    async def _call(self, once: Callable[[Link], Awaitable[A]]) -> A:
        """Make a call; repeat it, at each address and as long as `patience` allows, while it is unavailable."""
        links = self._opened()
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._options.patience
        jitter: Jitter | None = None
        while True:
            with await links.current() as link:
                try:
                    return await once(link)
                except Exception as raised:
                    error = typed_error(raised, str(link.peer))
                    jitter = jitter or Jitter(self._options.backoff)
                    wait = jitter.failed()
                    enough = loop.time() + wait >= give_up_at and jitter.failures >= links.count
                    if not error.retryable or enough:
                        raise error from None
                    links.failed(link)
            await asyncio.sleep(wait)

    def _chunks(self, submissions: Sequence[pb.Submission]) -> Iterator[list[pb.Submission]]:
        room = self._options.max_message_bytes - ROOM
        chunk: list[pb.Submission] = []
        size = 0
        for submission in submissions:
            weight = submission.ByteSize() + 16
            if weight > room:
                found = len(submission.request)
                raise TooLarge(f"{submission.method}: the request has {found} bytes; the maximum is {room}")
            if chunk and (len(chunk) == _MOST_SUBMISSIONS or size + weight > room):
                yield chunk
                chunk, size = [], 0
            chunk.append(submission)
            size += weight
        if chunk:
            yield chunk
