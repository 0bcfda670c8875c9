"""Checks histories. It reads records alone and shares no code with the product.

Each function returns violations as sentences; an empty list means that the run kept its promises.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from chaos.history import Record

_TERMINAL = ("SUCCEEDED", "FAILED", "CANCELLED")
_UNNOTICED = 10_000_000_000
"""Nanoseconds for which an orchestrator may offer tasks to an agent that was killed behind a half-open connection."""
_DELIVERIES = 8
"""Number of deliveries after which an event is dead-lettered."""


@dataclass
class Report:
    """The outcome of a check.

    Attributes:
        published: Acknowledged submissions or distinct acknowledged events.
        processed: Tasks with an accepted result, or deliveries by group and distinct event.
        dead_lettered: Failed tasks, or distinct dead-lettered events.
        declared_lost: Losses that the product declared.
        violations: Broken promises.
    """

    published: int = 0
    processed: int = 0
    dead_lettered: int = 0
    declared_lost: int = 0
    violations: list[str] = field(default_factory=list)


def _by_event(history: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in history:
        found[record["event"]].append(record)
    return found


def check_control(history: list[Record]) -> Report:
    """Check tasks: nothing acknowledged is lost, one result is accepted, fences rise, every error is typed.

    Tasks that a server without an append-only file may have lost (see `_losable`) may be unknown, and may have been
    executed again; if they are unknown, they count as declared lost.

    Records: `submitted` (key, task, lines, and expect: the states in which it may end), `started` and `finished` (task,
    attempt, fence), `result` (task, state, attempt, fence, lines), `final` (task, orchestrator, state, attempt, fence,
    lines), `error` (type, typed), `server` (log), `killed` (name).
    """
    events = _by_event(history)
    report = Report()
    bad = report.violations
    losable = _losable(history)
    tasks: dict[str, Record] = {}
    keys: dict[str, str] = {}
    for record in events["submitted"]:
        tasks[record["task"]] = record
        earlier = keys.setdefault(record["key"], record["task"])
        if earlier != record["task"] and earlier not in losable:
            bad.append(f"idempotency key {record['key']} gave two tasks: {earlier} and {record['task']}")
    report.published = len(tasks)
    bad += [f"untyped error at a submitter: {each['type']}" for each in events["error"] if not each["typed"]]
    bad += _check_fences(events["started"])
    finished = {(each["task"], each["attempt"], each["fence"]) for each in events["finished"]}
    outcomes: dict[str, set[tuple[str, int, int, int]]] = defaultdict(set)
    observed: dict[str, set[str]] = defaultdict(set)
    for record in events["result"] + events["final"]:
        outcomes[record["task"]].add((record["state"], record["attempt"], record["fence"], record["lines"]))
    for record in events["final"]:
        observed[record["task"]].add(record["orchestrator"])
    orchestrators = {name for names in observed.values() for name in names}
    for task, submission in tasks.items():
        seen = outcomes[task]
        if task in losable:
            report.declared_lost += not observed[task]
        elif observed[task] != orchestrators or not orchestrators:
            bad.append(f"task {task} was acknowledged and is unknown to {sorted(orchestrators - observed[task])}")
        if len(seen) > 1 and task not in losable:
            bad.append(f"task {task} has more than one outcome: {sorted(seen)}")
        for state, attempt, fence, lines in seen:
            if state not in _TERMINAL:
                bad.append(f"task {task} never ended: {state}")
            elif state not in submission["expect"]:
                bad.append(f"task {task} ended as {state}, not as {' or '.join(submission['expect'])}")
            elif state == "SUCCEEDED":
                if (task, attempt, fence) not in finished:
                    bad.append(f"the result of task {task} (fence {fence}) comes from no execution")
                if lines != submission["lines"]:
                    bad.append(f"the result of task {task} is {lines}, not {submission['lines']}")
        states = {state for state, *_ in seen}
        report.processed += "SUCCEEDED" in states
        report.dead_lettered += "FAILED" in states
    return report


def _losable(history: list[Record]) -> set[str]:
    """Return the tasks whose submission began before the last kill of a server without an append-only file."""
    if not any(each["event"] == "server" and each["log"] == "none" for each in history):
        return set()
    kills = [each["t"] for each in history if each["event"] == "killed" and each["name"] == "redis"]
    last = max(kills, default=0)
    begun = {each["key"]: each["t"] for each in history if each["event"] == "submitting"}
    return {each["task"] for each in history if each["event"] == "submitted" and begun[each["key"]] <= last}


def check_charges(history: list[Record]) -> list[str]:
    """Check that attempts are used up by failures of their handlers and by kills of their agents alone.

    Faults of connections, orchestrators and the server are not the agent's fault. They may end an attempt as ABANDONED,
    which does not count. Further fields and records: `reasons` of a `final` record (of all its attempts that ended
    without a result), `submitting` (key), `failed` (task, attempt, fence); `killed` has the actor of an agent.
    """
    events = _by_event(history)
    losable = _losable(history)
    kills = [each["t"] for each in events["killed"] if each["name"].startswith("agent")]
    begun = {each["key"]: each["t"] for each in events["submitting"]}
    keys = {each["task"]: each["key"] for each in events["submitted"]}
    failed = Counter(each["task"] for each in events["failed"])
    ended: dict[str, int] = {}
    for record in events["started"]:
        ended[record["task"]] = max(record["t"], ended.get(record["task"], 0))
    bad = []
    for record in events["final"]:
        task = record["task"]
        if task in losable or task not in keys:
            continue
        reasons: Counter[str] = Counter(record["reasons"])
        last = ended.get(task, record["t"])
        excused = sum(begun[keys[task]] - _UNNOTICED <= at <= last for at in kills)
        if reasons["LEASE_EXPIRED"] > excused:
            bad.append(f"task {task} lost {reasons['LEASE_EXPIRED']} attempts to absent agents; {excused} were killed")
        if reasons["HANDLER_FAILED"] > failed[task]:
            bad.append(f"task {task} has {reasons['HANDLER_FAILED']} failures; its handler failed {failed[task]} times")
        for other in sorted(reasons.keys() - {"LEASE_EXPIRED", "HANDLER_FAILED", "ABANDONED"}):
            bad.append(f"an attempt of task {task} ended as {other}, which no fault causes")
    return bad


def _check_fences(started: list[Record]) -> list[str]:
    bad = []
    used: set[tuple[str, int]] = set()
    attempts: dict[str, dict[int, int]] = defaultdict(dict)
    for record in started:
        task, attempt, fence = record["task"], record["attempt"], record["fence"]
        if (task, fence) in used:
            bad.append(f"fence {fence} of task {task} was used by two executions")
        used.add((task, fence))
        attempts[task][attempt] = fence
    for task, fences in attempts.items():
        ordered = [fence for _, fence in sorted(fences.items())]
        if any(later <= earlier for earlier, later in pairwise(ordered)):
            bad.append(f"fences of task {task} do not rise: {ordered}")
    return bad


def check_events(history: list[Record]) -> Report:
    """Check events: each acknowledged event is handled by every group, dead-lettered, or declared lost.

    A loss that nobody declared is a violation, and so is a declared loss if no fault loses anything.

    A server that lost its data also lost dead letters; an event that failed for the last time was dead-lettered then.

    Records: `publishing` (number), `published` (number), `handled` (group, number), `letter` (group, number),
    `rejected` (group, number, deliveries), `declared` (group, count, kind), `groups` (names, lossy), `ledger`
    (published, groups), `error` (type, typed).
    """
    events = _by_event(history)
    report = Report()
    bad = report.violations
    tried = {each["number"] for each in events["publishing"]}
    published = {each["number"] for each in events["published"]}
    poisoned = {each["number"] for each in events["publishing"] if each["poison"]}
    report.published = len(published)
    bad += [f"untyped error: {each['type']}" for each in events["error"] if not each["typed"]]
    for group in events["groups"][0]["names"]:
        handled = {each["number"] for each in events["handled"] if each["group"] == group}
        letters = {each["number"] for each in events["letter"] if each["group"] == group}
        report.processed += len(handled)
        report.dead_lettered += len(letters)
        if invented := (handled | letters) - tried:
            bad.append(f"group {group}: received events that nobody published: {sorted(invented)[:5]}")
        if wrong := letters - poisoned:
            bad.append(f"group {group}: dead-lettered events that never failed: {sorted(wrong)[:5]}")
        declared = [each for each in events["declared"] if each["group"] == group]
        lost = sum(each["count"] or 0 for each in declared)
        report.declared_lost += lost
        settled = handled | letters
        if events["groups"][0]["lossy"]:
            failed = [each for each in events["rejected"] if each["group"] == group]
            settled |= {each["number"] for each in failed if each["deliveries"] >= _DELIVERIES}
        bad += _check_losses(group, sorted(published - settled), lost, declared)
        if lost and not events["groups"][0]["lossy"]:
            bad.append(f"group {group}: {lost} events are declared lost, although no fault loses any")
    for ledger in events["ledger"]:
        bad += _check_ledger(ledger, len(published), len(tried), events["groups"][0]["lossy"])
    return report


def _check_losses(group: str, missing: list[int], lost: int, declared: list[Record]) -> list[str]:
    if len(missing) <= lost:
        return []
    kinds = ", ".join(sorted({each["kind"] for each in declared})) or "none"
    words = f"group {group}: {len(missing)} acknowledged events are neither handled nor dead-lettered"
    return [f"{words}, {lost} are declared lost ({kinds}); first missing: {missing[:5]}"]


def _check_ledger(ledger: Record, published: int, tried: int, lossy: bool) -> list[str]:
    bad = []
    # A server that lost its records counts events again, and one that lost entries counts those whose loss it knows.
    if not lossy and not published <= ledger["published"] <= tried:
        bad.append(f"the product's ledger has {ledger['published']} events; acknowledged {published}, tried {tried}")
    for name, group in ledger["groups"].items():
        total = group["processed"] + group["dead_lettered"] + group["declared_lost"]
        if total != ledger["published"]:
            bad.append(f"the product's ledger of group {name} adds up to {total}, not to {ledger['published']}")
    return bad
