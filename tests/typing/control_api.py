"""The control plane's client, handles and contract objects as users type them; checked, never run.

`assert_type` holds what a type checker must infer. Each `type: ignore` stands on a line that must be refused: strict
checking reports it as unused as soon as the line is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_type

from sourcereview.v1.review_orki import (
    REVIEW_FILE,
    REVIEW_FINDINGS,
    FindingEvent,
    ReviewFileRequest,
    ReviewFileResponse,
    ReviewFindingsGroup,
    ReviewProgress,
    SourceReviewServiceClient,
)

from orki.control.v1.attempt_pb2 import AttemptRef, TaskState
from orki.control.v1.task_pb2 import AgentSnapshot, ServiceSnapshot, TaskSnapshot
from orki_contract import EventStream, Task, TaskChannel, TaskHandle, TaskStub
from orki_contract.errors import HandlerFailed, OrkiError, Reason
from orki_contract.model import Group, Start, Stream, TaskMethod
from orki_contract.trace import Span
from orki_control import Client, ClientOptions, JitterOptions, SubmittedTask

OPTIONS = ClientOptions(patience=5.0, call_timeout=2.0, backoff=JitterOptions(maximum=1.0))
ClientOptions(5.0)  # type: ignore[call-arg]
ClientOptions(patiance=5.0)  # type: ignore[call-arg]
ClientOptions(patience="5 s")  # type: ignore[arg-type]
OPTIONS.patience = 1.0  # type: ignore[misc]


async def calls(orki: Client) -> None:
    """By the client's own methods, with the contract's object."""
    task = await orki.submit(REVIEW_FILE, ReviewFileRequest(path=b"a.py"), idempotency_key="a.py@9f2c")
    assert_type(task, SubmittedTask[ReviewFileResponse, ReviewProgress, None])
    assert_type(task.task_id, str)
    assert_type(task.span, Span | None)
    assert_type(task.snapshot, TaskSnapshot)
    async for news in task.progress():
        assert_type(news, ReviewProgress)
    assert_type(await task.result(timeout=5), ReviewFileResponse)
    assert_type(await task.cancel("not needed any more"), None)
    await task.direct(ReviewProgress())  # type: ignore[arg-type]
    await task.result("5 s")  # type: ignore[arg-type]
    await orki.submit(REVIEW_FILE, ReviewFileResponse())  # type: ignore[misc]
    await orki.submit(REVIEW_FINDINGS, FindingEvent())  # type: ignore[arg-type]
    several = await orki.submit_many(REVIEW_FILE, [ReviewFileRequest()])
    assert_type(several, list[TaskHandle[ReviewFileResponse, ReviewProgress, None]])
    await orki.submit_many(REVIEW_FILE, [ReviewFileResponse()])  # type: ignore[misc]


async def looks(orki: Client, task_id: str) -> None:
    """What there is, by id."""
    assert_type(orki.handle(REVIEW_FILE, task_id), SubmittedTask[ReviewFileResponse, ReviewProgress, None])
    assert_type(await orki.get(task_id), TaskSnapshot)
    assert_type(await orki.cancel(task_id), TaskSnapshot)
    assert_type(await orki.direct(task_id, b""), AttemptRef)
    async for task in orki.list_tasks(states=[TaskState.TASK_STATE_RUNNING], method=REVIEW_FILE.contract.full_name):
        assert_type(task, TaskSnapshot)
    async for other in orki.list_tasks(states=["RUNNING"]):  # type: ignore[list-item]
        del other
    assert_type(await orki.list_agents(), Sequence[AgentSnapshot])
    assert_type(await orki.list_services(), Sequence[ServiceSnapshot])
    await orki.get(7)  # type: ignore[arg-type]


async def generated(channel: TaskChannel) -> None:
    """By the generated client, whatever the channel is."""
    reviews = SourceReviewServiceClient(channel)
    assert_type(reviews.review_file, TaskStub[ReviewFileRequest, ReviewFileResponse, ReviewProgress, None])
    assert_type(await reviews.review_file(ReviewFileRequest(), timeout=5), ReviewFileResponse)
    handle = await reviews.review_file.submit(ReviewFileRequest())
    assert_type(handle, TaskHandle[ReviewFileResponse, ReviewProgress, None])
    await reviews.review_file.submit(ReviewFileResponse())  # type: ignore[arg-type]
    await reviews.review_files(ReviewFileRequest())  # type: ignore[attr-defined]
    SourceReviewServiceClient("127.0.0.1:50051")  # type: ignore[arg-type]


def a_client_is_a_channel(orki: Client) -> TaskChannel:
    """The client fits where a generated client wants a channel; so does a handle where a port wants one."""
    return orki


def contracts() -> None:
    """What a handle knows of its contract."""
    assert_type(REVIEW_FILE, Task[ReviewFileRequest, ReviewFileResponse, ReviewProgress, None])
    assert_type(REVIEW_FILE.contract, TaskMethod)
    assert_type(REVIEW_FILE.request, type[ReviewFileRequest])
    assert_type(REVIEW_FINDINGS, EventStream[FindingEvent, ReviewFindingsGroup])
    assert_type(REVIEW_FINDINGS.contract, Stream)
    assert_type(REVIEW_FINDINGS.message, type[FindingEvent])
    assert_type(REVIEW_FINDINGS.contract.group("report"), Group)
    assert_type(REVIEW_FINDINGS.contract.group("report").start, Start)
    REVIEW_FILE.contract.max_attempts = 7  # type: ignore[misc]


def errors(error: OrkiError) -> None:
    """Errors are told by class or by reason."""
    assert_type(error.reason, Reason.ValueType)
    assert_type(error.message, str)
    assert_type(error.retryable, bool)
    if isinstance(error, HandlerFailed):
        assert_type(error, HandlerFailed)
    print(error.code)  # type: ignore[attr-defined]
