"""The checker finds each kind of planted violation in an otherwise clean history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chaos.checker import check_charges, check_control, check_events
from chaos.history import Record

Plant = Callable[[list[Record]], None]


def record(event: str, **fields: Any) -> Record:
    return {"t": 0, "actor": "test", "event": event, **fields}


def control_history() -> list[Record]:
    """One task that succeeds at its second attempt and one that fails."""
    history = [
        record("submitted", key="a", task="t-a", expect=["SUCCEEDED"], lines=7),
        record("submitted", key="b", task="t-b", expect=["FAILED"], lines=8),
        record("started", task="t-a", attempt=1, fence=10),
        record("started", task="t-a", attempt=2, fence=11),
        record("started", task="t-b", attempt=1, fence=12),
        record("finished", task="t-a", attempt=2, fence=11),
        record("result", task="t-a", state="SUCCEEDED", attempt=2, fence=11, lines=7),
        record("error", type="HandlerFailed", typed=True),
    ]
    for orchestrator in ("one", "two"):
        outcome = {"orchestrator": orchestrator, "attempt": 2, "fence": 11, "lines": 7}
        history.append(record("final", task="t-a", state="SUCCEEDED", **outcome))
        outcome |= {"attempt": 0, "fence": 0, "lines": 0}
        history.append(record("final", task="t-b", state="FAILED", **outcome))
    return history


def last_final(history: list[Record], task: str) -> Record:
    return [each for each in history if each["event"] == "final" and each["task"] == task][-1]


CONTROL_PLANTS: dict[str, Plant] = {
    "is unknown to": lambda history: history.remove(last_final(history, "t-a")),
    "more than one outcome": lambda history: last_final(history, "t-a").update(fence=10),
    "never ended": lambda history: last_final(history, "t-b").update(state="RUNNING"),
    "not as SUCCEEDED": lambda history: last_final(history, "t-a").update(state="FAILED"),
    "comes from no execution": lambda history: history.remove(next(e for e in history if e["event"] == "finished")),
    "is 9, not 7": lambda history: last_final(history, "t-a").update(lines=9),
    "used by two executions": lambda history: history.append(record("started", task="t-a", attempt=2, fence=11)),
    "do not rise": lambda history: history.append(record("started", task="t-a", attempt=3, fence=9)),
    "gave two tasks": lambda history: history.append(
        record("submitted", key="a", task="t-c", expect=["SUCCEEDED"], lines=7)
    ),
    "untyped error": lambda history: history.append(record("error", type="KeyError()", typed=False)),
}


def test_a_clean_control_history_has_no_violation() -> None:
    report = check_control(control_history())
    assert report.violations == []
    assert (report.published, report.processed, report.dead_lettered) == (2, 1, 1)


@pytest.mark.parametrize("sentence", CONTROL_PLANTS)
def test_a_planted_control_violation_is_found(sentence: str) -> None:
    history = control_history()
    CONTROL_PLANTS[sentence](history)
    assert any(sentence in violation for violation in check_control(history).violations)


def lossy_history() -> list[Record]:
    """A task acknowledged before the last kill of a server without a file, and one acknowledged after it."""
    history = [
        record("server", log="none"),
        record("submitting", key="old") | {"t": 1},
        record("killed", name="redis") | {"t": 2},
        record("submitted", key="old", task="t-old", expect=["SUCCEEDED"], lines=7) | {"t": 3},
        record("submitting", key="new") | {"t": 4},
        record("submitted", key="new", task="t-new", expect=["SUCCEEDED"], lines=7) | {"t": 5},
        record("started", task="t-new", attempt=1, fence=10),
        record("finished", task="t-new", attempt=1, fence=10),
    ]
    outcome = {"orchestrator": "one", "state": "SUCCEEDED", "attempt": 1, "fence": 10, "lines": 7}
    return [*history, record("final", task="t-new", **outcome)]


def test_a_server_without_a_file_may_lose_tasks_acknowledged_before_its_last_kill() -> None:
    report = check_control(lossy_history())
    assert report.violations == []
    assert report.declared_lost == 1


def test_a_server_without_a_file_loses_nothing_after_its_last_kill() -> None:
    history = lossy_history()
    history[2]["t"] = 0
    assert any("t-old was acknowledged and is unknown" in each for each in check_control(history).violations)


@pytest.mark.parametrize("log", ["always", "everysec"])
def test_a_server_with_a_file_loses_nothing(log: str) -> None:
    history = lossy_history()
    history[0]["log"] = log
    assert any("t-old was acknowledged and is unknown" in each for each in check_control(history).violations)


def charged_history(reasons: list[str], *, name: str = "agent-1", at: int = 32, failed: int = 0) -> list[Record]:
    """A task is submitted at 30 s and starts for the last time at 40 s; a process was killed at a time of its own."""
    history = [
        record("submitting", key="a") | {"t": 30},
        record("submitted", key="a", task="t-a", expect=["SUCCEEDED"], lines=7) | {"t": 31},
        record("killed", name=name) | {"t": at},
        record("started", task="t-a", attempt=2, fence=11) | {"t": 40},
        record("final", task="t-a", orchestrator="one", state="SUCCEEDED", reasons=reasons) | {"t": 90},
    ]
    history += [record("failed", task="t-a", attempt=1, fence=10) for _ in range(failed)]
    return [each | {"t": each["t"] * 1_000_000_000} for each in history]


def test_failures_and_kills_of_agents_use_up_attempts() -> None:
    assert check_charges(charged_history([])) == []
    assert check_charges(charged_history(["ABANDONED"] * 5)) == []
    assert check_charges(charged_history(["LEASE_EXPIRED"])) == []
    assert check_charges(charged_history(["HANDLER_FAILED", "LEASE_EXPIRED"], failed=1)) == []


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        (charged_history(["LEASE_EXPIRED"], name="orchestrator-1"), "lost 1 attempts to absent agents; 0 were killed"),
        (charged_history(["LEASE_EXPIRED"], at=19), "lost 1 attempts to absent agents; 0 were killed"),
        (charged_history(["LEASE_EXPIRED"], at=41), "lost 1 attempts to absent agents; 0 were killed"),
        (charged_history(["LEASE_EXPIRED"] * 2), "lost 2 attempts to absent agents; 1 were killed"),
        (charged_history(["HANDLER_FAILED"]), "has 1 failures; its handler failed 0 times"),
        (charged_history(["STALLED"]), "ended as STALLED"),
    ],
)
def test_an_attempt_that_the_infrastructure_used_up_is_found(history: list[Record], sentence: str) -> None:
    assert any(sentence in each for each in check_charges(history))


def events_history(*, lossy: bool = False) -> list[Record]:
    """Ten events, one of them poison, read by two groups; one more was tried and not acknowledged."""
    history = [record("groups", names=["audit", "report"], lossy=lossy)]
    history += [record("publishing", number=number, poison=number == 7) for number in range(11)]
    history += [record("published", number=number) for number in range(10)]
    groups = {}
    for group in ("audit", "report"):
        history += [record("handled", group=group, number=number) for number in range(10) if number != 7]
        history.append(record("letter", group=group, number=7))
        groups[group] = {"processed": 9, "dead_lettered": 1, "declared_lost": 0}
    history.append(record("ledger", published=10, groups=groups))
    return history


def drop(event: str, **fields: Any) -> Plant:
    def plant(history: list[Record]) -> None:
        history[:] = [each for each in history if not (each["event"] == event and fields.items() <= each.items())]

    return plant


EVENTS_PLANTS: dict[str, Plant] = {
    "group audit: 1 acknowledged events are neither handled": drop("handled", group="audit", number=3),
    "group report: 1 acknowledged events are neither handled": drop("letter", group="report"),
    "received events that nobody published": lambda h: h.append(record("handled", group="audit", number=99)),
    "dead-lettered events that never failed": lambda h: h.append(record("letter", group="audit", number=3)),
    "untyped error": lambda h: h.append(record("error", type="KeyError()", typed=False)),
    "the product's ledger has 12 events": lambda h: h[-1].update(published=12),
    "1 events are declared lost, although no fault": lambda h: h.append(
        record("declared", group="audit", count=1, kind="rolled_back")
    ),
    "adds up to 9": lambda h: h[-1]["groups"]["audit"].update(processed=8),
}


def test_a_clean_events_history_has_no_violation() -> None:
    report = check_events(events_history())
    assert report.violations == []
    assert (report.published, report.processed, report.dead_lettered, report.declared_lost) == (10, 18, 2, 0)


def test_a_declared_loss_of_a_group_covers_its_missing_events_alone() -> None:
    history = events_history(lossy=True)
    drop("handled", group="audit", number=3)(history)
    assert check_events(history).violations
    declared = [*history, record("declared", group="audit", count=1, kind="rolled_back")]
    assert check_events(declared).violations == []
    assert check_events(declared).declared_lost == 1
    assert check_events([*history, record("declared", group="audit", count=None, kind="rolled_back")]).violations
    assert check_events([*history, record("declared", group="report", count=1, kind="rolled_back")]).violations


@pytest.mark.parametrize(("lossy", "deliveries", "lost"), [(True, 8, False), (True, 7, True), (False, 8, True)])
def test_a_letter_that_the_server_lost_was_written_after_the_last_delivery(
    lossy: bool, deliveries: int, lost: bool
) -> None:
    history = events_history(lossy=lossy)
    drop("letter", group="audit")(history)
    history.append(record("rejected", group="audit", number=7, deliveries=deliveries))
    assert bool(check_events(history).violations) is lost


@pytest.mark.parametrize("sentence", EVENTS_PLANTS)
def test_a_planted_events_violation_is_found(sentence: str) -> None:
    history = events_history()
    EVENTS_PLANTS[sentence](history)
    assert any(sentence in violation for violation in check_events(history).violations)
