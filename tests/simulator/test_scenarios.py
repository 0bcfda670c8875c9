"""Scenarios of a simulated fleet: two orchestrators, two agents with two slots each, leases of 3 s, three attempts."""

from __future__ import annotations

import itertools

import pytest

from simulator.run import Outcome, draw, run, scenario, story


def play(text: str) -> Outcome:
    outcome = run(scenario(text))
    assert not outcome.violations, story(outcome)
    return outcome


def ends(outcome: Outcome) -> list[str]:
    return [each["state"] for each in outcome.history if each["event"] == "result"]


def attempts(outcome: Outcome) -> list[int]:
    return [each["attempt"] for each in outcome.history if each["event"] == "started"]


def test_a_task_of_a_killed_agent_runs_on_the_other() -> None:
    outcome = play(
        """
        at 0.0: submit "sleep:2" by orchestrator-1
        at 0.0: submit "sleep:2" by orchestrator-2
        at 1.0: kill agent-1 for 9.0
        at 1.0: kill agent-2 for 1.0
        """
    )
    assert ends(outcome) == ["SUCCEEDED", "SUCCEEDED"]
    assert attempts(outcome) == [1, 1, 2, 2]


def test_a_cut_does_not_end_an_attempt() -> None:
    outcome = play(
        """
        at 0.0: submit "progress:3 sleep:2 progress:3" by orchestrator-1
        at 0.5: cut agent-1 for 0
        at 0.5: cut agent-2 for 0
        at 1.0: cut orchestrator-1 for 0
        """
    )
    assert attempts(outcome) == [1]
    assert [each["number"] for each in outcome.history if each["event"] == "delta"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fault", ["kill orchestrator-1", "kill orchestrator-2", "stop redis", "pause orchestrator-1"])
def test_the_infrastructure_may_be_away_for_longer_than_a_lease(fault: str) -> None:
    outcome = play(
        f"""
        at 0.0: submit "sleep:8" by orchestrator-1
        at 0.0: submit "sleep:8" by orchestrator-2
        at 1.0: {fault} for 5.0
        """
    )
    assert ends(outcome) == ["SUCCEEDED", "SUCCEEDED"]
    assert attempts(outcome) == [1, 1]


@pytest.mark.parametrize("fault", ["partition agent-1", "partition agent-2", "pause orchestrator-1", "stop redis"])
def test_an_attempt_that_times_out_is_followed_by_one_attempt(fault: str) -> None:
    """The attempt timeout, its report and the next attempt meet a fault; no two attempts run at the same time."""
    outcome = play(
        f"""
        at 0.0: submit "sleep:30 fail" by orchestrator-1
        at 19.9: {fault} for 1.0
        """
    )
    started = [each["t"] for each in outcome.history if each["event"] == "started"]
    assert attempts(outcome) == [1, 2, 3]
    assert all(later - earlier >= 19.9 for earlier, later in itertools.pairwise(started))
    assert ends(outcome) == ["FAILED"]


@pytest.mark.parametrize("step", [60, -60])
def test_a_step_of_the_servers_clock_ends_nothing(step: int) -> None:
    outcome = play(
        f"""
        at 0.0: submit "sleep:4" by orchestrator-1
        at 0.0: submit "flaky sleep:0.1" by orchestrator-1
        at 1.0: step_clock redis for {step}
        """
    )
    assert sorted(ends(outcome)) == ["SUCCEEDED", "SUCCEEDED"]
    assert sorted(attempts(outcome)) == [1, 1, 2]
    assert outcome.history[-1]["t"] - outcome.history[0]["t"] < 20


@pytest.mark.parametrize("fault", ["stop redis", "kill orchestrator-1", "partition orchestrator-1"])
def test_a_cancel_waits_for_what_is_away(fault: str) -> None:
    outcome = play(
        f"""
        at 0.0: submit "sleep:15" by orchestrator-1, cancel after 1.5
        at 1.0: {fault} for 4.0
        """
    )
    assert ends(outcome) == ["CANCELLED"]


def test_a_stubborn_handler_is_given_up() -> None:
    outcome = play('at 0.0: submit "stubborn" by orchestrator-2, cancel after 0.3')
    assert ends(outcome) in (["CANCELLED"], ["SUCCEEDED"])


def test_a_server_that_lost_its_newest_writes_repeats_no_fence() -> None:
    outcome = play(
        """
        at 0.0: submit "sleep:6" by orchestrator-1
        at 1.0: submit "sleep:1" by orchestrator-2
        at 1.5: submit "sleep:1" by orchestrator-1
        at 2.0: lose_tail redis for 1.6
        at 6.0: submit "sleep:1" by orchestrator-1
        """
    )
    fences = [each["fence"] for each in outcome.history if each["event"] == "started"]
    assert len(set(fences)) == len(fences)


@pytest.mark.parametrize("seed", [3, 5, 12, 13, 18])
def test_agents_connect_again_to_a_server_that_lost_their_sessions(seed: int) -> None:
    outcome = play(
        f"""
        seed {seed}
        at 0.095: lose_tail redis for 0.071
        at 0.8: submit "sleep:0.2" by orchestrator-1
        at 0.8: submit "sleep:0.2" by orchestrator-2
        """
    )
    assert ends(outcome) == ["SUCCEEDED", "SUCCEEDED"]


def test_a_full_server_lets_running_tasks_end() -> None:
    outcome = play(
        """
        at 0.0: submit "sleep:2" by orchestrator-1
        at 1.0: fill redis for 10.0
        at 2.0: submit "sleep:0.2" by orchestrator-1
        """
    )
    results = [each["t"] for each in outcome.history if each["event"] == "result"]
    assert results[0] - outcome.history[0]["t"] < 4.0
    assert ends(outcome) == ["SUCCEEDED", "SUCCEEDED"]


def test_a_story_is_a_scenario() -> None:
    for seed in range(20):
        plan = draw(seed)
        text, _, _ = story(Outcome(plan, [])).partition("\n\n")
        assert scenario(text) == plan


@pytest.mark.parametrize(
    "line", ["at 1: kill nobody for 2", "at 1: melt redis for 2", "submit x", 'at 0.0: submit "sleep:1" by me']
)
def test_a_wrong_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not a line of a scenario"):
        scenario(line)
