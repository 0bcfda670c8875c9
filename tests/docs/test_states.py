"""docs/states.md is drawn from the transition tables; `python tests/docs/test_states.py` writes it."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any, Final

from orki_agent.hotpath._machine import BRIDGE_CALL, BRIDGE_CONNECTION, CLIENT_CALL, CLIENT_CONNECTION
from orki_contract.transitions import Transitions
from orki_control.session import AGENT, ATTEMPT, ORCHESTRATOR
from orki_control.submitter import CLIENT, REQUEST, SERVING
from orki_events._delivery_table import TRANSITIONS as DELIVERY
from orki_events._ownership import LEASE_TRANSITIONS as LEASE
from orki_events._position_table import TRANSITIONS as POSITION
from orki_server._store.lifecycle import TASK_LIFE

ROOT = Path(__file__).resolve().parents[2]

MACHINES: Final[tuple[tuple[str, str, Transitions[Any]], ...]] = (
    (
        "A task",
        "The store's scripts take the legal moves of a task from this table. `orki_server/_store/lifecycle.py`",
        TASK_LIFE,
    ),
    (
        "One attempt",
        "Both ends of a session step through this table, each at its own time. `orki_control/session/_tables.py`",
        ATTEMPT,
    ),
    (
        "The agent's end of a session",
        "One machine for the life of the agent's process. `orki_control/session/_agent.py`",
        AGENT,
    ),
    (
        "The orchestrator's end of a session",
        "One machine for each gRPC stream of an agent. `orki_control/session/_orchestrator.py`",
        ORCHESTRATOR,
    ),
    (
        "One request of a submitter",
        "Each request of a client's session passes through these states. `orki_control/submitter/_tables.py`",
        REQUEST,
    ),
    (
        "The client's end of a submitters' session",
        "One machine for each client. `orki_control/submitter/_client_end.py`",
        CLIENT,
    ),
    (
        "The orchestrator's end of a submitters' session",
        "One machine for each gRPC stream of a client. `orki_control/submitter/_serving_end.py`",
        SERVING,
    ),
    (
        "The delivery of events",
        "One machine for each consumer of a group. `orki_events/_delivery_table.py`",
        DELIVERY,
    ),
    (
        "The ownership of a partition",
        "Each partition of an ordered stream, as one consumer sees it. `orki_events/_ownership.py`",
        LEASE,
    ),
    (
        "The position of a group",
        "One machine for each partition, and for each group, that a process knows. `orki_events/_position_table.py`",
        POSITION,
    ),
    (
        "A tool connection at the bridge",
        "One machine for each connection. `orki_agent/hotpath/_machine.py`",
        BRIDGE_CONNECTION,
    ),
    ("A tool call at the bridge", "Each call of a connection passes through these states.", BRIDGE_CALL),
    ("A tool connection at the client", "One machine for each connection.", CLIENT_CONNECTION),
    ("A tool call at the client", "Each call of a connection passes through these states.", CLIENT_CALL),
)

_LAWS: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "Hello first",
        "AWAITING_HELLO, CHECKING_HELLO, AWAITING_WELCOME: nothing but hello and welcome",
        "test_other_messages_before_the_hello_or_the_welcome_are_refused",
    ),
    ("Newest instance wins", "any + Replaced → ENDED", "test_a_newer_instance_replaces_the_older"),
    (
        "Contracts are checked at the hello",
        "CHECKING_HELLO + SessionRefused → ENDED",
        "test_a_refused_contract_is_fatal_and_named",
    ),
    (
        "A gRPC message is a batch of session messages",
        "none",
        "test_control_messages_overtake_work_and_batches_are_bounded",
    ),
    ("Slots limit the attempts", "OFFERED, RUNNING and CANCELLING occupy a slot", "slots_are_never_exceeded"),
    (
        "An offer is answered",
        "OFFERED + OfferWithdrawn → CLOSED",
        "test_an_unanswered_offer_is_withdrawn",
    ),
    ("Fences only rise", "any + Refused → CLOSED", "test_reports_about_attempts_that_are_not_held_are_refused"),
    (
        "Attempts continue when the session's gRPC stream ends",
        "OPEN + Disconnected → DISCONNECTED; RUNNING + LeaseEnded → CLOSED",
        "test_an_attempt_stops_before_its_lease_ends",
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
    ("A reconnect synchronises", "any + Dropped → CLOSED", "test_attempts_that_the_welcome_does_not_keep_are_stopped"),
    ("Silence ends a session", "OPEN + PeerSilent → DISCONNECTED", "test_a_silent_orchestrator_loses_the_session"),
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
    ("Unknown kinds are ignored", "none", "test_the_orchestrator_survives_any_messages_of_an_agent"),
    (
        "Progress is kept until it is stored",
        "RUNNING + ProgressAcknowledged → RUNNING; REPORTED + ProgressAcknowledged → REPORTED",
        "test_no_delta_is_lost_or_doubled_whatever_happens",
    ),
    (
        "No delta is lost silently",
        "RUNNING + Progress → RUNNING; REPORTED + Progress → REPORTED",
        "test_a_gap_without_a_count_is_refused_until_it_is_explicit",
    ),
    (
        "The contract decides about a full window",
        "RUNNING + Progress → RUNNING",
        "test_a_full_window_follows_the_policy",
    ),
    (
        "A directive is acknowledged",
        "RUNNING + DirectiveAcknowledged → RUNNING; REPORTED + DirectiveAcknowledged → REPORTED",
        "test_a_directive_that_a_cut_swallows_is_reported_to_its_sender",
    ),
    (
        "Bulk waits for what is small",
        "OPEN + Chunk → OPEN; OPEN + ChunkAcknowledged → OPEN",
        "test_small_messages_overtake_a_transfer",
    ),
    ("Reassembly is bounded", "OPEN + Chunk → OPEN", "test_a_transfer_above_the_limit_is_refused"),
    (
        "A checkpoint is kept until it is stored",
        "RUNNING + CheckpointAcknowledged → RUNNING; REPORTED + CheckpointAcknowledged → REPORTED",
        "test_a_checkpoint_is_sent_again_until_it_is_stored",
    ),
    (
        "A suspension is a result",
        "RUNNING + Result → REPORTED",
        "test_a_suspended_task_holds_no_slot_and_goes_on_with_its_answer",
    ),
    (
        "Usage is reported as totals",
        "RUNNING + Usage → RUNNING; CANCELLING + Usage → CANCELLING",
        "test_the_newest_total_is_sent_again_after_a_cut_and_with_the_result",
    ),
    (
        "A used-up budget pauses",
        "RUNNING + BudgetUpdate → RUNNING; RUNNING + Result → REPORTED",
        "test_a_budget_pauses_a_tree_over_two_orchestrators_until_it_is_raised",
    ),
)


def diagram(machine: Transitions[Any]) -> str:
    """Return the table as a Mermaid state diagram; edges between the same two states are joined."""
    lines = ["stateDiagram-v2", f"    [*] --> {machine.initial.name}"]
    for state, row in machine.rows.items():
        edges: dict[Enum, list[str]] = {}
        for event, following in row.items():
            edges.setdefault(following, []).append(event.__name__)
        lines += [f"    {state.name} --> {following.name}: {', '.join(events)}" for following, events in edges.items()]
    return "\n".join(lines)


def page() -> str:
    """Return the page as Markdown."""
    parts = [
        "# State machines",
        "",
        "`tests/docs/test_states.py` draws this page from the transition tables and compares the two. Events are",
        "protocol messages, timers and calls. A move that a table does not list is illegal: a `LocalProtocolError` if",
        "this end made it, a `RemoteProtocolError` if the other end did.",
    ]
    for title, text, machine in MACHINES:
        parts += ["", f"## {title}", "", text, "", "```mermaid", diagram(machine), "```"]
    parts += [
        "",
        "## Laws of the session",
        "",
        "Each law of `proto/orki/control/v1/session.proto`, the table rows that enforce it, and a test that fails",
        "without these rows.",
        "",
        "| law | rows | test |",
        "|---|---|---|",
    ]
    parts += [f"| {number}. {law} | {rows} | `{test}` |" for number, (law, rows, test) in enumerate(_LAWS, 1)]
    return "\n".join(parts) + "\n"


def test_the_page_is_drawn_from_the_tables() -> None:
    assert (ROOT / "docs/states.md").read_text() == page(), "run `python tests/docs/test_states.py`"


def test_every_law_names_an_existing_test() -> None:
    rows = re.findall(r"^\| (\d+)\. .* \| `(\w+)` \|$", page(), re.MULTILINE)
    laws = re.findall(r"^// +(\d+)\. ", (ROOT / "proto/orki/control/v1/session.proto").read_text(), re.MULTILINE)
    assert laws
    assert [number for number, _ in rows] == laws
    written = "\n".join(path.read_text() for path in ROOT.glob("packages/orki-*/tests/test_*.py"))
    assert [name for _, name in rows if f"def {name}(" not in written] == []


if __name__ == "__main__":
    (ROOT / "docs/states.md").write_text(page())
