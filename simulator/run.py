"""One run: a plan of tasks and faults, drawn from a seed or written by hand, and the check of its history."""

from __future__ import annotations

import logging
import random
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from chaos.checker import check_control
from chaos.history import Record
from chaos.schedule import Fault
from orki_contract.errors import UnknownTask
from orki_control import Client
from simulator.fleet import Fleet, submit
from simulator.planes import REDIS
from simulator.world import World

SETTLED_WITHIN: Final = 150.0
"""Seconds after the last fault in which every task ends."""
_AGENTS: Final = ("agent-1", "agent-2")
_ORCHESTRATORS: Final = ("orchestrator-1", "orchestrator-2")
_TERMINAL_EVENTS: Final = {"SUCCEEDED": "succeeded", "FAILED": "failed", "CANCELLED": "cancelled"}
_PUBLISHED_WITHIN: Final = 15.0
"""Seconds in which the events of ended tasks are published."""
_STEPS: Final = (
    *("sleep:0.2", "sleep:1.5", "sleep:6", "progress:3 sleep:0.5 progress:3", "flaky sleep:0.1", "fail", "stubborn"),
)
_ABOUT_AGENTS: Final = frozenset({"kill", "pause", "partition"})

# Kind: targets, longest duration in seconds, weight.
KINDS: Final[dict[str, tuple[tuple[str, ...], float, int]]] = {
    "kill": (_AGENTS + _ORCHESTRATORS, 4.0, 4),
    "pause": (_AGENTS + _ORCHESTRATORS, 8.0, 3),
    "cut": (_AGENTS + _ORCHESTRATORS, 0.0, 3),
    "partition": (_AGENTS + _ORCHESTRATORS + (REDIS,), 6.0, 3),
    "slow": (_AGENTS + _ORCHESTRATORS + (REDIS,), 4.0, 2),
    "stop": ((REDIS,), 6.0, 2),
    "lose_replies": ((REDIS,), 3.0, 2),
    "lose_tail": ((REDIS,), 2.0, 1),
    "step_clock": ((REDIS,), 0.0, 1),
    "fill": ((REDIS,), 5.0, 1),
}
"""Kinds of faults. `lose_tail` restarts the server with the data that it had `duration` seconds before."""


@dataclass(frozen=True)
class Work:
    """A task of a plan.

    Attributes:
        at: Seconds after the start of its submission.
        plan: Steps of its handler; see `SimulatedAgent`.
        first: Number of the orchestrator that its client tries first.
        cancel_after: Seconds after the submission of a cancel; None for none.
    """

    at: float
    plan: str
    first: int = 0
    cancel_after: float | None = None

    @property
    def expect(self) -> list[str]:
        """The states in which it may end."""
        ends = ["FAILED" if "fail" in self.plan.split() else "SUCCEEDED"]
        return ends if self.cancel_after is None else [*ends, "CANCELLED"]


@dataclass(frozen=True)
class Plan:
    """What happens in a run.

    Attributes:
        seed: Seed of delays and of the order of what happens at the same time.
        tasks: The tasks.
        faults: The faults.
    """

    seed: int
    tasks: tuple[Work, ...]
    faults: tuple[Fault, ...]


@dataclass
class Outcome:
    """The outcome of a run.

    Attributes:
        plan: The plan.
        violations: Broken promises, as sentences.
        history: What happened.
        steps: Number of steps.
    """

    plan: Plan
    violations: list[str]
    history: list[Record] = field(default_factory=list)
    steps: int = 0


def draw(seed: int) -> Plan:
    """Return the plan of a seed: one to three tasks, and up to four faults, which may overlap."""
    chance = random.Random(f"plan {seed}")
    tasks: list[Work] = []
    for _ in range(chance.randint(1, 3)):
        steps = chance.choice(
            [
                "sleep:0.2",
                "sleep:1.5",
                "sleep:6",
                "progress:3 sleep:0.5 progress:3",
                "flaky sleep:0.1",
                "fail",
                "stubborn",
            ]
        )
        if random.Random(f"use {seed} {len(tasks)}").random() < 0.2:
            steps = f"use:10 {steps} use:20"
        cancel = round(chance.uniform(0.0, 2.0), 3) if chance.random() < 0.25 else None
        tasks.append(Work(round(chance.uniform(0.0, 3.0), 3), steps, chance.randrange(2), cancel))
    faults = []
    names = sorted(KINDS)
    for _ in range(chance.randint(0, 4)):
        (kind,) = chance.choices(names, [KINDS[name][2] for name in names])
        targets, longest, _ = KINDS[kind]
        duration = chance.uniform(-90.0, 90.0) if kind == "step_clock" else chance.uniform(0.0, longest)
        faults.append(Fault(round(chance.uniform(0.0, 6.0), 3), kind, chance.choice(targets), round(duration, 3)))
    return Plan(seed, tuple(tasks), tuple(sorted(faults, key=lambda fault: fault.at)))


def run(plan: Plan) -> Outcome:
    """Run a plan and check its history."""
    world = World(plan.seed)
    # One way of events for each half of the seeds.
    fleet = Fleet(world, outbox=plan.seed % 2 == 1)
    defects = _Defects(world)
    with fleet.product(), defects:
        fleet.start()
        for number, work in enumerate(plan.tasks, 1):
            key = f"key-{number}"
            main = submit(fleet, key, work.plan, work.expect, work.cancel_after)
            world.call_at(world.now + work.at, fleet.start_client, f"client-{number}", main, work.first)
        for fault in plan.faults:
            if fault.kind == "lose_tail":
                world.call_at(world.now + max(0.0, fault.at - fault.duration), _snapshot, fleet, fault)
            world.call_at(world.now + fault.at, _inject, fleet, fault)
        end = world.now + max((fault.at + abs(fault.duration) for fault in plan.faults), default=0.0) + SETTLED_WITHIN
        clients = [f"client-{number}" for number in range(1, len(plan.tasks) + 1)]

        def ended() -> bool:
            while clients and (found := fleet.processes.get(clients[-1])) is not None and found.ended:
                clients.pop()
            return not clients

        late = not world.run(end, ended)
        _read_finals(fleet)
        world.run(world.now + _PUBLISHED_WITHIN, lambda: _published(fleet))
        world.run(world.now + 1.0)  # No event follows.
    violations = [*world.problems, *_check(fleet, plan, late)]
    world.close()
    return Outcome(plan, violations, fleet.history, world.steps)


class _Defects(logging.Handler):
    """Turns log records about defects into violations."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world
        self._log = logging.getLogger("orki")

    def __enter__(self) -> None:
        self._log.addHandler(self)
        self._log.propagate = False

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)
        self._log.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "defect" in text:
            error = record.exc_info[1] if record.exc_info else None
            self._world.failed(f"{text}: {error!r}", error)


# --- Faults. ---


def _snapshot(fleet: Fleet, fault: Fault) -> None:
    fleet.snapshots[fault.at] = fleet.redis.snapshot()


def _inject(fleet: Fleet, fault: Fault) -> None:
    fleet.add("fault", kind=fault.kind, target=fault.target, duration=fault.duration)
    heal: Callable[[], object] = lambda: None  # noqa: E731
    target = fault.target
    match fault.kind:
        case "kill":
            fleet.kill(target)
            start = fleet.start_agent if target.startswith("agent") else fleet.start_orchestrator
            heal = lambda: None if fleet.processes[target].alive else start(target)  # noqa: E731
        case "pause":
            fleet.processes[target].paused = True

            def heal() -> None:
                fleet.processes[target].paused = False
        case "cut":
            fleet.network.cut(target)
            fleet.cut_store(target)
        case "partition":
            fleet.network.block(target)
            heal = lambda: fleet.network.heal(target)  # noqa: E731
        case "slow":
            fleet.network.slow.add(target)
            heal = lambda: fleet.network.slow.discard(target)  # noqa: E731
        case "stop":
            fleet.stop_redis()
            heal = lambda: setattr(fleet, "redis_up", True)  # noqa: E731
        case "lose_tail":
            fleet.stop_redis()
            fleet.redis.restore(fleet.snapshots[fault.at])
            fleet.lost_tail = True
            heal = lambda: setattr(fleet, "redis_up", True)  # noqa: E731
        case "lose_replies":
            fleet.lose_replies = 0.5
            heal = lambda: setattr(fleet, "lose_replies", 0.0)  # noqa: E731
        case "step_clock":
            fleet.skew += fault.duration
        case "fill":
            fleet.redis.full = True
            heal = lambda: setattr(fleet.redis, "full", False)  # noqa: E731
        case _:
            raise ValueError(f"there is no fault {fault.kind!r}")
    fleet.world.call_at(fleet.world.now + max(0.0, fault.duration), heal)


# --- The end. ---


def _read_finals(fleet: Fleet) -> None:
    """Read each acknowledged task through each orchestrator."""
    tasks = [each["task"] for each in fleet.history if each["event"] == "submitted"]
    readers = []
    for number, name in enumerate(_ORCHESTRATORS):

        async def read(client: Client, name: str = name) -> None:
            for task in tasks:
                try:
                    found = await client.get(task)
                except UnknownTask:
                    continue
                fleet.add("final", task=task, orchestrator=name, **fleet.outcome(found))
                for balance in await client.budgets(task):
                    fleet.add("charged", task=task, tokens=balance.used.tokens)

        readers.append(fleet.start_client(f"reader-{number}", read, number, alone=True))
    fleet.world.run(fleet.world.now + 60.0, lambda: all(each.ended for each in readers))


def _check(fleet: Fleet, plan: Plan, late: bool) -> list[str]:
    history = fleet.history
    agent_faults = sum(fault.kind in _ABOUT_AGENTS and fault.target in _AGENTS for fault in plan.faults)
    bad = []
    if late:
        open_tasks = {each["task"] for each in history if each["event"] == "submitted"}
        open_tasks -= {each["task"] for each in history if each["event"] in ("result", "forgotten")}
        if not fleet.lost_tail or not open_tasks:
            bad.append(f"{len(open_tasks)} acknowledged tasks, or their submitters, did not end: {sorted(open_tasks)}")
    known = {each["task"] for each in history if each["event"] == "final"}
    submitted = [each for each in history if each["event"] == "submitted"]
    if agent_faults > 1 or fleet.lost_tail:
        # An attempt of a lost agent counts, so such a task may have used up its attempts.
        history = [_may_fail(each) if each["event"] == "submitted" else each for each in history]
    if fleet.lost_tail:
        history = [each for each in history if each["event"] != "submitted" or each["task"] in known]
        history = [each for each in history if each["event"] != "result" or each["task"] in known]
        # A task that was forgotten is submitted again under the same key.
        keys = Counter(each["key"] for each in submitted)
        bad += [f"key {key} has {count} tasks" for key, count in keys.items() if count > 2]
    report = check_control(history)
    bad += [each for each in report.violations if not (fleet.lost_tail and _is_of_tail(each))]
    bad += _check_order(history)
    bad += _check_progress(history)
    if not fleet.lost_tail:
        bad += _check_lifecycle(fleet, history)
        bad += _check_acknowledgements(history)
        bad += _check_charges(history)
    return bad


def _published(fleet: Fleet) -> bool:
    ended = {each["task"] for each in fleet.history if each["event"] == "final" and each["state"] in _TERMINAL_EVENTS}
    return ended <= {task for task, kind in fleet.lifecycle() if kind in _TERMINAL_EVENTS.values()}


def _may_fail(record: Record) -> Record:
    return {**record, "expect": [*record["expect"], "FAILED"]}


def _is_of_tail(violation: str) -> bool:
    """Whether a lost tail excuses a violation. Fences still rise, but attempts of a task have their numbers again."""
    return "was used by two executions" not in violation


def _check_order(history: Iterable[Record]) -> list[str]:
    """Check that the fences of a task rise in the order of its executions."""
    last: dict[str, int] = {}
    bad = []
    for each in history:
        if each["event"] == "started":
            if each["fence"] <= last.get(each["task"], 0):
                bad.append(f"fence {each['fence']} of task {each['task']} follows {last[each['task']]}")
            last[each["task"]] = each["fence"]
    return bad


def _check_progress(history: Iterable[Record]) -> list[str]:
    bad = []
    expected: dict[str, int] = defaultdict(lambda: 1)
    missing: Counter[str] = Counter()
    for each in history:
        if each["event"] == "gap":
            missing[each["task"]] += each["count"]
        elif each["event"] == "delta":
            task, number = each["task"], each["number"]
            if not number <= expected[task] + missing[task]:
                bad.append(f"progress {expected[task]} to {number - 1} of task {task} is missing without a gap")
            expected[task], missing[task] = number + 1, 0
    return bad


def _check_acknowledgements(history: Iterable[Record]) -> list[str]:
    history = list(history)
    finished = {(each["task"], each["fence"]) for each in history if each["event"] == "finished"}
    final = {each["task"]: each for each in history if each["event"] == "final"}
    return [
        f"the result of task {each['task']} under fence {each['fence']} was acknowledged, and is not its outcome"
        for each in history
        if each["event"] == "acknowledged" and (each["task"], each["fence"]) in finished and each["task"] in final
        if (final[each["task"]]["state"], final[each["task"]]["fence"]) != ("SUCCEEDED", each["fence"])
    ]


def _check_charges(history: Iterable[Record]) -> list[str]:
    """Check that budgets are charged once with what was used, at least by attempts with an acknowledged result."""
    history = list(history)
    acknowledged = {(each["task"], each["fence"]) for each in history if each["event"] == "acknowledged"}
    used: dict[tuple[str, int], int] = {}
    for each in history:
        if each["event"] == "used":
            used[each["task"], each["fence"]] = each["tokens"]
    bad = []
    for each in history:
        if each["event"] == "charged":
            most = sum(tokens for (task, _), tokens in used.items() if task == each["task"])
            least = sum(tokens for key, tokens in used.items() if key[0] == each["task"] and key in acknowledged)
            if not least <= each["tokens"] <= most:
                bad.append(f"task {each['task']} was charged {each['tokens']} tokens, not {least} to {most}")
    return bad


def _check_lifecycle(fleet: Fleet, history: Iterable[Record]) -> list[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for task, kind in fleet.lifecycle():
        kinds[task].append(kind)
    bad = [f"{fleet.doubles} lifecycle events were published twice"] if fleet.doubles else []
    for each in history:
        if each["event"] == "final" and each["orchestrator"] == _ORCHESTRATORS[0]:
            found = Counter(kinds[each["task"]])
            ends = [kind for kind in found.elements() if kind in _TERMINAL_EVENTS.values()]
            if found["submitted"] != 1 or ends != [_TERMINAL_EVENTS.get(each["state"], "")]:
                bad.append(f"lifecycle events of task {each['task']}, which ended as {each['state']}: {dict(found)}")
    return bad


@dataclass
class Chunk:
    """The outcome of some seeds.

    Attributes:
        runs: Number of runs.
        steps: Number of steps.
        failures: Violations by seed; a traceback if the run itself failed.
    """

    runs: int = 0
    steps: int = 0
    failures: dict[int, list[str]] = field(default_factory=dict)


def run_chunk(first: int, end: int) -> Chunk:
    """Run the seeds from `first` up to `end`."""
    chunk = Chunk()
    for seed in range(first, end):
        try:
            outcome = run(draw(seed))
            chunk.steps += outcome.steps
            if outcome.violations:
                chunk.failures[seed] = outcome.violations
        except Exception:
            chunk.failures[seed] = [traceback.format_exc()]
        chunk.runs += 1
    return chunk


# --- Shrinking. ---


def shrink(outcome: Outcome) -> Outcome:
    """Return the shortest plan that was found to break the same kind of promise."""
    kind = _kind(outcome.violations[0])
    shrunk = True
    while shrunk:
        shrunk = False
        for smaller in _smaller(outcome.plan):
            tried = run(smaller)
            if tried.violations and _kind(tried.violations[0]) == kind:
                outcome, shrunk = tried, True
                break
    return outcome


def _smaller(plan: Plan) -> Iterable[Plan]:
    for at in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:at] + plan.faults[at + 1 :])
    for at in range(len(plan.tasks)):
        if len(plan.tasks) > 1:
            yield replace(plan, tasks=plan.tasks[:at] + plan.tasks[at + 1 :])


def _kind(violation: str) -> str:
    words = [word for word in violation.split() if not any(letter.isdigit() for letter in word)]
    return " ".join(words[:8])


def story(outcome: Outcome) -> str:
    """Return what was planned, as `scenario` reads it, what happened, and the violations."""
    began = outcome.history[0]["t"] if outcome.history else 0.0
    lines = [f"seed {outcome.plan.seed}", *_lines(outcome.plan), "", "What happened:"]
    for record in outcome.history:
        fields = " ".join(f"{key}={value}" for key, value in record.items() if key not in ("t", "actor", "event"))
        lines.append(f"  {record['t'] - began:9.3f}  {record['actor']:15} {record['event']:10} {fields}")
    lines += [f"Violation: {each}" for each in outcome.violations]
    return "\n".join(lines)


def _lines(plan: Plan) -> list[str]:
    lines = []
    for work in plan.tasks:
        cancel = f", cancel after {work.cancel_after:.3f}" if work.cancel_after is not None else ""
        lines.append(f'at {work.at:.3f}: submit "{work.plan}" by orchestrator-{work.first + 1}{cancel}')
    return lines + [f"at {each.at:.3f}: {each.kind} {each.target} for {each.duration:.3f}" for each in plan.faults]


_SEED: Final = re.compile(r"seed (\d+)")
_SUBMIT: Final = re.compile(r'at ([\d.]+): submit "([^"]+)" by orchestrator-([12])(?:, cancel after ([\d.]+))?')
_FAULT: Final = re.compile(r"at ([\d.]+): (\w+) ([\w-]+) for (-?[\d.]+)")


def scenario(text: str) -> Plan:
    """Read a plan: a line for each task and each fault, times in seconds, and the seed if it matters.

    ```
    at 0.0: submit "sleep:2" by orchestrator-1
    at 1.0: kill agent-1 for 3.0
    ```

    Raises:
        ValueError: A line is malformed, or names an unknown fault or target.
    """
    seed, tasks, faults = 0, [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        if found := _SEED.fullmatch(line):
            seed = int(found[1])
        elif found := _SUBMIT.fullmatch(line):
            cancel_after = float(found[4]) if found[4] else None
            tasks.append(Work(float(found[1]), found[2], int(found[3]) - 1, cancel_after))
        elif (found := _FAULT.fullmatch(line)) and found[3] in KINDS.get(found[2], ((),))[0]:
            faults.append(Fault(float(found[1]), found[2], found[3], float(found[4])))
        else:
            raise ValueError(f"not a line of a scenario: {line}")
    return Plan(seed, tuple(tasks), tuple(faults))
