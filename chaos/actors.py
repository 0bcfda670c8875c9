"""The processes that use the product: agent, submitter, publisher and consumer. Each writes what it did to the history.

    python -m chaos.actors ROLE JSON

JSON holds the role's settings, `history` and `name` among them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sourcereview.v1.review_orki import REVIEW_FINDINGS, SourceReviewServiceBase, SourceReviewServiceClient
from sourcereview.v1.review_pb2 import EmptyFile, FindingEvent, ReviewFileRequest, ReviewFileResponse

from chaos.history import History
from orki_agent import Agent
from orki_contract.errors import OrkiError, WaitTimeout
from orki_contract.model import Backoff
from orki_control import Client, ClientOptions
from orki_events import ConsumeOptions, Delivery, EventOptions, Gap, connect, consumer

Settings = dict[str, Any]


def lines_of(path: bytes) -> int:
    """Return the answer that a correct handler gives for a path."""
    return sum(path) % 1_000


class Reviewer(SourceReviewServiceBase):
    """Answers after a short time. `fail-…` always fails, `flaky-…` fails at the first attempt."""

    def __init__(self, history: History) -> None:
        self._history = history

    async def review_file(self, request: Any, ctx: Any) -> ReviewFileResponse:
        attempt = {"task": ctx.task_id, "attempt": ctx.attempt, "fence": ctx.fence}
        self._history.add("started", **attempt)
        await asyncio.sleep(random.uniform(0.01, 0.15))
        if request.path.startswith(b"fail-") or (request.path.startswith(b"flaky-") and ctx.attempt == 1):
            self._history.add("failed", **attempt)
            raise ValueError(f"{request.path.decode()} fails by intent")
        self._history.add("finished", **attempt)
        return ReviewFileResponse(lines=lines_of(request.path), attempt=ctx.attempt, fence=ctx.fence)


async def agent(settings: Settings, history: History) -> None:
    """Run an agent until SIGTERM drains it."""
    reviewer = Agent("chaos", Reviewer(history), slots=8)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, reviewer.drain)
    await reviewer.run(settings["target"], agent_id=settings["name"], drain_grace=5.0)


async def submitter(settings: Settings, history: History) -> None:
    """Submit tasks at a steady rate and wait for each result."""
    chance = random.Random(settings["seed"])
    options = ClientOptions(patience=settings["patience"])
    async with Client(settings["target"], options) as orki, asyncio.TaskGroup() as group:
        reviews = SourceReviewServiceClient(orki)
        for number in range(settings["count"]):
            kind = chance.choices(("ok", "flaky", "fail"), (90, 7, 3))[0]
            path = f"{kind}-{settings['name']}-{number}".encode()
            group.create_task(_submit_one(reviews, path, settings["patience"], history))
            await asyncio.sleep(settings["interval"])
    history.add("done")


async def _submit_one(reviews: Any, path: bytes, patience: float, history: History) -> None:
    request, key = ReviewFileRequest(path=path), path.decode()
    expect = ["FAILED" if path.startswith(b"fail-") else "SUCCEEDED"]
    history.add("submitting", key=key)
    try:
        handle = await reviews.review_file.submit(request, idempotency_key=key)
    except OrkiError as error:
        history.add("error", type=type(error).__name__, typed=True)
        return
    except Exception as error:
        history.add("error", type=repr(error), typed=False)
        return
    history.add("submitted", key=key, task=handle.task_id, expect=expect, lines=lines_of(path))
    try:
        response = await handle.result(timeout=patience)
    except WaitTimeout:
        history.add("waited", task=handle.task_id)
    except OrkiError as error:
        history.add("error", type=type(error).__name__, typed=True)
    except Exception as error:
        history.add("error", type=repr(error), typed=False)
    else:
        outcome = {"attempt": response.attempt, "fence": response.fence, "lines": response.lines}
        history.add("result", task=handle.task_id, state="SUCCEEDED", **outcome)


def number_of(event: FindingEvent) -> int:
    """Return the number that a publisher gave to an event."""
    return int(event.path.decode().split("#")[1])


async def publisher(settings: Settings, history: History) -> None:
    """Publish numbered events in small batches until `count` are acknowledged."""
    number, last = settings["first"], settings["first"] + settings["count"]
    if settings["progress"].exists():  # A publisher that was killed goes on after the last number that it tried.
        number = int(settings["progress"].read_text() or number)
    async with connect(settings["redis"], producer=settings["name"]) as events:
        while number < last:
            numbers = range(number, min(number + settings["batch"], last))
            number = numbers.stop
            settings["progress"].write_text(str(number))
            for each in numbers:
                history.add("publishing", number=each, poison=each % 50 == 7)
            batch = [FindingEvent(path=b"f%d#%d#" % (each % 13, each), empty=EmptyFile()) for each in numbers]
            try:
                await events.publish_many(REVIEW_FINDINGS, batch)
            except OrkiError as error:
                history.add("error", type=type(error).__name__, typed=True)
            except Exception as error:
                history.add("error", type=repr(error), typed=False)
            else:
                for each in numbers:
                    history.add("published", number=each)
            await asyncio.sleep(settings["interval"])
    history.add("done")


async def consume(settings: Settings, history: History) -> None:
    """Handle the events of one group until SIGTERM; every fiftieth event fails."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    group = settings["group"]

    def on_gap(gap: Gap) -> None:
        history.add("gap", group=gap.group, count=gap.count, possible=gap.possible, kind=gap.kind.value)

    # Eight deliveries of an event that fails take about a second.
    options = ConsumeOptions(backoff=Backoff(initial=0.02, maximum=0.2))

    @consumer(REVIEW_FINDINGS, group=group, concurrency=8, options=options)
    async def on_finding(event: FindingEvent, delivery: Delivery[FindingEvent]) -> None:
        number = number_of(event)
        await asyncio.sleep(random.uniform(0, 0.01))
        if number % 50 == 7:
            history.add("rejected", group=group, number=number, deliveries=delivery.deliveries)
            raise ValueError(f"event {number} fails by intent")
        history.add("handled", group=group, number=number)

    async with connect(settings["redis"], producer=settings["name"], options=EventOptions(on_gap=on_gap)) as events:
        await events.run(on_finding, stop=stop)


_ROLES: dict[str, Callable[[Settings, History], Coroutine[Any, Any, None]]] = {
    "agent": agent,
    "submitter": submitter,
    "publisher": publisher,
    "consumer": consume,
}


def main() -> None:
    """Run one role."""
    role, settings = sys.argv[1], json.loads(sys.argv[2])
    settings["progress"] = Path(settings["history"]).with_name(f"{settings['name']}.progress")
    history = History(Path(settings["history"]), f"{settings['name']}@{os.getpid()}")
    asyncio.run(_ROLES[role](settings, history))


if __name__ == "__main__":
    main()
