"""The page of the machines: `python -m orki_control.diagram` prints `docs/control-states.md`, tables and laws."""

from __future__ import annotations

from typing import Any, Final

from orki_contract.transitions import Transitions
from orki_control.attempt import ATTEMPT
from orki_control.session.states import AGENT, ORCHESTRATOR

__all__ = ["control_states"]

_MACHINES: Final[tuple[tuple[str, str, Transitions[Any]], ...]] = (
    (
        "One attempt",
        "Both ends of a session walk this table, each a little apart in time; `orki_control/attempt.py`.",
        ATTEMPT,
    ),
    (
        "The agent's end of a session",
        "One machine for the life of the process, over as many streams as it takes; `orki_control/session/agent.py`.",
        AGENT,
    ),
    (
        "The orchestrator's end of a session",
        "One machine for each stream; `orki_control/session/orchestrator.py`.",
        ORCHESTRATOR,
    ),
)


_LAWS: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "Hello first",
        "AWAITING_HELLO, JUDGING, GREETING: nothing but the greeting",
        "test_nothing_comes_before_the_hello_and_nothing_before_the_welcome",
    ),
    ("Newest instance wins", "any + Replaced → ENDED", "test_a_newer_instance_replaces_the_older"),
    (
        "Contracts are judged at the hello",
        "JUDGING + SessionRefused → ENDED",
        "test_a_refused_contract_is_fatal_and_named",
    ),
    ("A message is a batch", "none", "test_control_messages_overtake_work_and_batches_are_bounded"),
    ("Slots bound work", "OFFERED, RUNNING, CANCELLING take one", "slots_are_never_exceeded"),
    (
        "An offer is answered",
        "OFFERED + OfferWithdrawn → CLOSED",
        "test_an_offer_that_nobody_answers_is_withdrawn",
    ),
    ("Fences only rise", "any + Refused → CLOSED", "test_reports_about_what_is_not_held_change_nothing"),
    (
        "A stream's end revokes nothing",
        "OPEN + Disconnected → DISCONNECTED; RUNNING + LeaseEnded → CLOSED",
        "test_a_lease_ends_before_the_orchestrator_may_give_it_away",
    ),
    (
        "A result is kept until it is acknowledged",
        "REPORTED + ResultAcknowledged → CLOSED",
        "a_result_is_kept_until_it_is_acknowledged",
    ),
    (
        "The first terminal state wins",
        "CANCELLING + Result → REPORTED; REPORTED + Cancel → REPORTED",
        "one_ending_for_each_task",
    ),
    (
        "A cancel is acknowledged at once",
        "CANCELLING + CancelAcknowledged → CANCELLING",
        "test_a_cancel_is_acknowledged_while_the_thread_is_blocked",
    ),
    ("A reconnect synchronises", "any + Dropped → CLOSED", "test_what_the_welcome_does_not_keep_is_stopped"),
    ("Silence is death", "OPEN + Disconnected", "test_silence_is_a_reason_for_a_new_channel"),
    (
        "An end of stream is a lost connection",
        "OPEN + Disconnected → DISCONNECTED",
        "test_a_cut_stream_loses_and_doubles_nothing",
    ),
    (
        "Drain comes before stop",
        "OPEN + AgentDrain → DRAINING; OPEN + OrchestratorDrain → PEER_DRAINING",
        "test_a_drain_ends_when_the_last_result_is_acknowledged",
    ),
    ("Unknown kinds are ignored", "none", "test_whatever_an_agent_says_the_orchestrator_stands"),
)


def control_states() -> str:
    """The page, as Markdown."""
    parts = [
        "# The control plane's machines",
        "",
        "Drawn from the transition tables by `python -m orki_control.diagram`; a test holds the two equal. Events are",
        "messages of `proto/orki/control/v1/session.proto`, or things that happen without one. What a table does not",
        "list is an illegal move: a `LocalProtocolError` where we made it, a `RemoteProtocolError` where the peer did.",
    ]
    for title, text, machine in _MACHINES:
        parts += ["", f"## {title}", "", text, "", "```mermaid", machine.mermaid().rstrip(), "```"]
    parts += [
        "",
        "## The laws",
        "",
        "Each law of `session.proto` by its number, the rows that hold it, and a test that would fail without them.",
        "",
        "| law | rows | test |",
        "|---|---|---|",
    ]
    parts += [f"| {number}. {law} | {rows} | `{test}` |" for number, (law, rows, test) in enumerate(_LAWS, 1)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(control_states(), end="")
