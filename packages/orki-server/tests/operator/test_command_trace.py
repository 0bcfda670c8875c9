"""`orki trace` as a process, with real entries."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.agent_pb2 import AgentEvent, AgentSpawned
from orki.events.v1.task_orki import TASKS
from orki.events.v1.task_pb2 import TaskAttemptEnded, TaskEvent, TaskOffered, TaskStarted, TaskSubmitted, TaskSucceeded
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki.events.v1.usage_orki import USAGE
from orki.events.v1.usage_pb2 import UsageEvent
from orki_contract.trace import Span, new_span
from orki_events import Events

pytestmark = pytest.mark.timeout(180)


TASK = "t3-01jcabcdefghjkmnpqrstvwxyz"
METHOD = "acme.v1.Review/File"


async def publish_story(events: Events, user: Any, task_id: str = TASK) -> Span:
    """Publish a task with one lost attempt, a tool call, usage and a user's event."""
    root = new_span()
    first, second = root.child(), root.child()
    await events.publish(
        AGENTS, AgentEvent(agent_id="a2", instance_id=f"i2{task_id}", spawned=AgentSpawned(pid=7)), span=new_span()
    )

    async def tell(span: Span, attempt: int, **step: Any) -> None:
        who: dict[str, Any] = {}
        if attempt:
            who = {"fence": 2**44 + attempt, "agent_id": f"a{attempt}", "instance_id": f"i{attempt}{task_id}"}
        await events.publish(
            TASKS, TaskEvent(task_id=task_id, method=METHOD, attempt=attempt, **who, **step), span=span
        )

    await tell(root, 0, submitted=TaskSubmitted(request_bytes=12))
    await tell(first, 1, offered=TaskOffered())
    await tell(first, 1, started=TaskStarted())
    lost = TaskAttemptEnded(reason=Reason.REASON_LEASE_EXPIRED, message="a1 was not heard of", retried=True)
    await tell(first, 1, attempt_ended=lost)
    await tell(second, 2, offered=TaskOffered())
    await tell(second, 2, started=TaskStarted())
    tool = ToolEvent(method="acme.v1.Tools/Read", task_id=task_id, attempt=2, duration_ns=1_000, request_bytes=9)
    await events.publish(TOOLS, tool, span=second.child())
    await events.publish(USAGE, UsageEvent(model="m", task_id=task_id, attempt=2, input_tokens=812), span=second)
    await events.publish(user.stream, user.filled("r"), span=second)
    await tell(root, 2, succeeded=TaskSucceeded(response_bytes=3))
    return root


async def test_a_trace_by_task_by_trace_and_by_prefix(
    events: Events, user: Any, orki: Any, redis_only: Any, canary: str
) -> None:
    root = await publish_story(events, user)
    await publish_story(events, user, "t4-01jcabcdefghjkmnpqrstvwxyz")
    trees = []
    for wanted in ("t3-01", root.trace_id[:12]):
        ended = await orki("trace", wanted, "--json", **redis_only)
        assert ended.code == 0, ended.err
        assert canary not in ended.out
        trees.append(json.loads(ended.out))
    assert trees[0] == trees[1]
    tree = trees[0]
    assert (tree["trace_id"], tree["finished"], tree["possibly_trimmed"]) == (root.trace_id, True, [])
    agent, task = tree["roots"]
    assert (agent["kind"], agent["children"][0]["kind"]) == ("agent", "spawned")
    kinds = ["submitted", "queued", "attempt", "queued", "attempt", "succeeded"]
    assert [each["kind"] for each in task["children"]] == kinds
    lost, done = (each for each in task["children"] if each["kind"] == "attempt")
    assert (lost["status"], lost["details"]["reason"]) == ("lost", "REASON_LEASE_EXPIRED")
    assert [each["kind"] for each in done["children"]] == ["offered", "started", "tool", "usage", "event"]
    assert done["children"][-1]["details"]["event"]["token"] == "[redacted]"
    people = await orki("trace", TASK, **{**redis_only, "COLUMNS": "100"})
    assert all(len(line) <= 100 for line in people.out.splitlines())
    for words in ("lost after", "tool acme.v1.Tools/Read 1 µs", "812 tokens in", "SecretEvent", "succeeded"):
        assert words in people.out
    assert canary not in people.out


async def test_ambiguous_unknown_and_invalid_ids_are_refused(
    events: Events, user: Any, orki: Any, redis_only: Any
) -> None:
    ended = await orki("trace", TASK, **redis_only)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "no streams yet" in ended.err
    await publish_story(events, user, "t4-01jcabcdefghjkmnpqrstvwxyz")
    await publish_story(events, user, "t4-01jcabcdefghjkmnpqrstvwxyy")
    for wanted, says in (
        ("t4-", "use a longer prefix"),
        (TASK, "the streams have no event"),
        ("nonsense!", "nor a trace id"),
    ):
        ended = await orki("trace", wanted, **redis_only)
        assert (ended.code, ended.err.count("\n")) == (1, 1), ended.err
        assert says in ended.err


async def test_trimmed_entries_are_reported(events: Events, user: Any, orki: Any, redis_only: Any, link: Any) -> None:
    await publish_story(events, user)
    for _ in range(3):
        await events.publish(USAGE, UsageEvent(model="later"))
    await link.execute((b"XTRIM", "orki:ev:{usage}", b"MAXLEN", 1))
    ended = await orki("trace", TASK, **redis_only)
    assert ended.code == 0
    assert "may have been trimmed from: usage" in " ".join(ended.err.split())
    assert json.loads((await orki("trace", TASK, "--json", **redis_only)).out)["possibly_trimmed"] == ["usage"]


async def test_following_ends_with_the_trace(events: Events, orki: Any, redis_only: Any) -> None:
    root = new_span()
    await events.publish(TASKS, TaskEvent(task_id=TASK, method=METHOD, submitted=TaskSubmitted()), span=root)
    following = asyncio.create_task(orki("trace", TASK, "--follow", "--json", **redis_only))
    await asyncio.sleep(2)
    assert not following.done()
    await events.publish(TASKS, TaskEvent(task_id=TASK, method=METHOD, succeeded=TaskSucceeded()), span=root)
    tree = json.loads((await following).out)
    assert tree["finished"]
    assert [each["kind"] for each in tree["roots"][0]["children"]] == ["submitted", "succeeded"]


async def test_many_pages_are_scanned(events: Events, user: Any, orki: Any, redis_only: Any) -> None:
    await events.publish_many(USAGE, [UsageEvent(model="before") for _ in range(2500)])
    await publish_story(events, user)
    await events.publish_many(
        TASKS, [TaskEvent(task_id=f"x{number}", submitted=TaskSubmitted()) for number in range(2500)], span=new_span()
    )
    tree = json.loads((await orki("trace", TASK, "--json", **redis_only)).out)
    assert len(tree["roots"]) == 2
