"""The control plane: submitters, orchestrators and agents of two versions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from actors.values import bed, watering
from stage import Actor, CaseFailed, Stage

TASKS = 24
LINGER = 0.05
PATIENCE = 60.0


def fleet(stage: Stage, *, server: str, agents: Mapping[str, str], submitters: Sequence[str]) -> str:
    """Agents join in turn and all submitters use them; check every response and every event of the agents."""
    redis = stage.redis()
    _, address = stage.server(server, redis)
    for name, environment in agents.items():
        start_agent(stage, address, name, environment)
    told = []
    submitted = [
        (environment, number * TASKS, submit(stage, environment, address, agents, first=number * TASKS))
        for number, environment in enumerate(submitters)
    ]
    workers: set[str] = set()
    for environment, first, submitter in submitted:
        done = submitter.expect("done", seconds=PATIENCE + 30)
        workers |= check_responses(done["responses"], range(first, first + TASKS), agents, environment)
        told.append(check_prune(done["pruned"], environment, agents))
    if workers != {*agents}:
        raise CaseFailed(f"of the agents {', '.join(agents)} only {', '.join(sorted(workers))} received tasks")
    published = check_events(stage, redis, TASKS * len(submitters))
    return f"{TASKS * len(submitters)} tasks by {' and '.join(sorted(workers))}; {published}; {'; '.join(told)}"


def refused(stage: Stage, *, server: str, standing: str, newcomer: str, rule: str) -> str:
    """An agent with an incompatible contract gets no session, and the fleet continues."""
    redis = stage.redis()
    _, address = stage.server(server, redis)
    start_agent(stage, address, "standing", standing)
    error = stage.actor(newcomer, "agent", orchestrator=address, agent_id="newcomer").expect("refused")
    words = check_mismatch(error, rule)
    done = submit(stage, standing, address, {"standing": standing}, first=0, count=3).expect("done")
    check_responses(done["responses"], range(3), {"standing": standing}, standing)
    return words


def rolling_upgrade(stage: Stage) -> str:
    """Run old and new agents, replace the orchestrator under running tasks, then stop the old agents."""
    redis = stage.redis()
    old_server, address = stage.server("published-v1", redis)
    first = {"old": "published-v1", "moved": "head-v1"}
    old_agents = [start_agent(stage, address, name, environment) for name, environment in first.items()]
    running = submit(stage, "published-v1", address, first, first=0, linger=0.4)
    running.expect("ready")
    old_server.terminate()
    stage.server("head-v2", redis, listen=address)
    start_agent(stage, address, "new", "head-v2")
    done = running.expect("done", seconds=PATIENCE + 30)
    everyone = {**first, "new": "head-v2"}
    workers = check_responses(done["responses"], range(TASKS), everyone, "published-v1")
    again = sum(response["attempt"] > 1 for response in done["responses"])
    mixed = submit(stage, "head-v2", address, everyone, first=TASKS).expect("done", seconds=PATIENCE + 30)
    workers |= check_responses(mixed["responses"], range(TASKS, 2 * TASKS), everyone, "head-v2")
    for agent in old_agents:
        agent.end()
        agent.expect("done")
    last = submit(stage, "head-v2", address, {"new": "head-v2"}, first=2 * TASKS).expect("done")
    check_responses(last["responses"], range(2 * TASKS, 3 * TASKS), {"new": "head-v2"}, "head-v2")
    if workers != {*everyone}:
        raise CaseFailed(f"only {', '.join(sorted(workers))} received tasks")
    # An attempt whose agent was lost has also published, and is repeated.
    published = check_events(stage, redis, 3 * TASKS, attempts_may_repeat=True)
    return f"{3 * TASKS} tasks, {again} of them attempted again; {published}"


def side_by_side(stage: Stage) -> str:
    """Run orchestrators of both versions on one store, each with an agent and a submitter of its own."""
    redis = stage.redis()
    agents = {"old": "published-v1", "new": "head-v2"}
    addresses = {name: stage.server(environment, redis)[1] for name, environment in agents.items()}
    for name, environment in agents.items():
        start_agent(stage, addresses[name], name, environment)
    submitted = [
        (environment, number * TASKS, submit(stage, environment, addresses[name], agents, first=number * TASKS))
        for number, (name, environment) in enumerate(agents.items())
    ]
    workers: set[str] = set()
    for environment, first, submitter in submitted:
        done = submitter.expect("done", seconds=PATIENCE + 30)
        workers |= check_responses(done["responses"], range(first, first + TASKS), agents, environment)
    if workers != {*agents}:
        raise CaseFailed(f"only {', '.join(sorted(workers))} received tasks")
    return f"{2 * TASKS} tasks by {' and '.join(sorted(workers))}; {check_events(stage, redis, 2 * TASKS)}"


def start_agent(stage: Stage, address: str, name: str, environment: str) -> Actor:
    """Start an agent and wait for its session.

    Raises:
        CaseFailed: It is refused, or has no session in time.
    """
    agent = stage.actor(environment, "agent", orchestrator=address, agent_id=name)
    try:
        stage.settled(address, name)
    except CaseFailed as late:
        agent.end()
        error = agent.expect("refused", "done")
        raise CaseFailed(f"{late}; {name} ({environment}) reports {error}") from None
    return agent


def submit(
    stage: Stage,
    environment: str,
    address: str,
    agents: Mapping[str, str],
    *,
    first: int,
    count: int = TASKS,
    linger: float = LINGER,
) -> Actor:
    """Start a submitter that waits for the agents."""
    wanted: dict[str, Any] = {"orchestrator": address, "agents": [*agents], "first": first, "count": count}
    return stage.actor(environment, "submitter", **wanted, linger=linger, patience=PATIENCE, prune=True)


def check_responses(
    responses: Sequence[Mapping[str, Any]], numbers: range, agents: Mapping[str, str], submitter: str
) -> set[str]:
    """Check that shared fields arrived and unknown ones have their default; return the agents that answered.

    Raises:
        CaseFailed: A value differs, or a response is missing.
    """
    if len(responses) != len(numbers):
        raise CaseFailed(f"{len(responses)} responses to {len(numbers)} tasks")
    for number, response in zip(numbers, responses, strict=True):
        sent = watering(number)
        if response["agent"] not in agents:
            raise CaseFailed(f"task {number} was answered by {response['agent']!r}")
        wanted = {"bed": sent["bed"], "poured": sent["millilitres"]}
        if knows_v2(submitter):
            wanted["because"] = sent["reason"] if knows_v2(agents[response["agent"]]) else ""
        found = {name: response.get(name) for name in wanted}
        if found != wanted or ("because" in response) != knows_v2(submitter) or response["attempt"] < 1:
            raise CaseFailed(f"task {number}: sent {wanted}, got {dict(response)}")
    return {response["agent"] for response in responses}


def check_prune(pruned: Any, submitter: str, agents: Mapping[str, str]) -> str:
    """Check that the task added in v2 runs if an agent serves it, and is refused otherwise."""
    if not knows_v2(submitter):
        wanted, words = None, "v1 submits nothing of v2"
    elif any(knows_v2(each) for each in agents.values()):
        wanted, words = len(bed(1)), "the added task runs on agents that serve it"
    else:
        wanted, words = "UnknownMethod", "the added task is refused as UnknownMethod"
    if pruned != wanted:
        raise CaseFailed(f"the task that v2 added gave {pruned!r} to {submitter}, not {wanted!r}")
    return words


def check_events(stage: Stage, redis: str, least: int, *, attempts_may_repeat: bool = False) -> str:
    """Check that both groups of v2 processed the events of the agents."""
    groups = [("MoistureEvent", "dashboard"), ("MoistureEvent", "alerts")]
    consumer = stage.actor("head-v2", "consumer", redis=redis, groups=groups)
    ledger = stage.actor("head-v2", "ledger", redis=redis, groups=groups, least=least, patience=30.0).expect("done")
    consumer.end()
    consumer.expect("done")
    for group, row in ledger.items():
        fits = row["published"] >= least if attempts_may_repeat else row["published"] == least
        if not fits or row["processed"] != row["published"]:
            raise CaseFailed(f"the agents published {row['published']} events of {least}: {group} {row}")
    return f"{least} events published and processed"


def check_mismatch(error: Mapping[str, str], rule: str) -> str:
    """Check that a refusal names both versions and the rule.

    Raises:
        CaseFailed: It is another error, or a name is missing.
    """
    words = error["message"]
    named = {*re.findall(r"sha256:[0-9a-f]{6,64}", words), *re.findall(r"\b[0-9]+\.[0-9]+(?:\.[0-9]+)?\b", words)}
    if error["type"] != "ContractMismatch" or rule not in words or len(named) < 2:
        raise CaseFailed(f"not a ContractMismatch that names both versions and {rule}: {error['type']}: {words}")
    return f"{error['type']}: {words}"


def knows_v2(environment: str) -> bool:
    """Return whether an environment has a contract from v2 on."""
    return not environment.endswith("-v1")
