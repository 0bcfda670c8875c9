"""Each transition table has exactly the moves listed here; every other pair of state and event raises an error."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from orki_contract.errors import LocalProtocolError, OrkiError, RemoteProtocolError
from orki_contract.transitions import Transitions
from orki_control.session import AGENT, ATTEMPT, ORCHESTRATOR

ATTEMPT_PAIRS = """
OFFERED    Accepted            RUNNING
OFFERED    Declined            CLOSED
OFFERED    Cancel              CANCELLING
OFFERED    Refused             CLOSED
OFFERED    OfferWithdrawn      CLOSED
OFFERED    LeaseEnded          CLOSED
OFFERED    Dropped             CLOSED
RUNNING    Progress            RUNNING
RUNNING    ProgressAcknowledged RUNNING
RUNNING CheckpointAcknowledged RUNNING
RUNNING BudgetUpdate RUNNING
RUNNING    Directive           RUNNING
RUNNING    DirectiveAcknowledged RUNNING
RUNNING Checkpoint RUNNING
RUNNING Usage RUNNING
RUNNING    Cancel              CANCELLING
RUNNING    Result              REPORTED
RUNNING    Refused             CLOSED
RUNNING    LeaseEnded          CLOSED
RUNNING    Dropped             CLOSED
CANCELLING Accepted            CANCELLING
CANCELLING Declined            CLOSED
CANCELLING Progress            CANCELLING
CANCELLING ProgressAcknowledged CANCELLING
CANCELLING CheckpointAcknowledged CANCELLING
CANCELLING BudgetUpdate CANCELLING
CANCELLING Directive           CANCELLING
CANCELLING DirectiveAcknowledged CANCELLING
CANCELLING Checkpoint CANCELLING
CANCELLING Usage CANCELLING
CANCELLING Cancel              CANCELLING
CANCELLING CancelAcknowledged  CANCELLING
CANCELLING Result              REPORTED
CANCELLING Refused             CLOSED
CANCELLING LeaseEnded          CLOSED
CANCELLING Dropped             CLOSED
REPORTED   Progress            REPORTED
REPORTED   ProgressAcknowledged REPORTED
REPORTED CheckpointAcknowledged REPORTED
REPORTED BudgetUpdate REPORTED
REPORTED   Directive           REPORTED
REPORTED   DirectiveAcknowledged REPORTED
REPORTED   Cancel              REPORTED
REPORTED   CancelAcknowledged  REPORTED
REPORTED   ResultAcknowledged  CLOSED
REPORTED   Refused             CLOSED
REPORTED   Dropped             CLOSED
"""

AGENT_PAIRS = """
DISCONNECTED  Connected          AWAITING_WELCOME
DISCONNECTED  Disconnected       DISCONNECTED
DISCONNECTED  Stopped            ENDED
AWAITING_WELCOME Welcome            OPEN
AWAITING_WELCOME SessionRefused     DISCONNECTED
AWAITING_WELCOME Replaced           ENDED
AWAITING_WELCOME HelloTimeout       DISCONNECTED
AWAITING_WELCOME Disconnected       DISCONNECTED
AWAITING_WELCOME Stopped            ENDED
OPEN          Accepted           OPEN
OPEN          Declined           OPEN
OPEN          Progress           OPEN
OPEN          Result             OPEN
OPEN          CancelAcknowledged OPEN
OPEN          DirectiveAcknowledged OPEN
OPEN Checkpoint OPEN
OPEN Usage OPEN
OPEN          Heartbeat          OPEN
OPEN          Refused            OPEN
OPEN          Cancel             OPEN
OPEN          Directive          OPEN
OPEN          ResultAcknowledged OPEN
OPEN          ProgressAcknowledged OPEN
OPEN CheckpointAcknowledged OPEN
OPEN BudgetUpdate OPEN
OPEN Chunk OPEN
OPEN ChunkAcknowledged OPEN
OPEN          HeartbeatEcho      OPEN
OPEN          Offer              OPEN
OPEN          AgentDrain         DRAINING
OPEN          OrchestratorDrain  PEER_DRAINING
OPEN          SessionRefused     DISCONNECTED
OPEN          Replaced           ENDED
OPEN          PeerSilent         DISCONNECTED
OPEN          Disconnected       DISCONNECTED
OPEN          Stopped            ENDED
PEER_DRAINING Accepted           PEER_DRAINING
PEER_DRAINING Declined           PEER_DRAINING
PEER_DRAINING Progress           PEER_DRAINING
PEER_DRAINING Result             PEER_DRAINING
PEER_DRAINING CancelAcknowledged PEER_DRAINING
PEER_DRAINING DirectiveAcknowledged PEER_DRAINING
PEER_DRAINING Checkpoint PEER_DRAINING
PEER_DRAINING Usage PEER_DRAINING
PEER_DRAINING Heartbeat          PEER_DRAINING
PEER_DRAINING Refused            PEER_DRAINING
PEER_DRAINING Cancel             PEER_DRAINING
PEER_DRAINING Directive          PEER_DRAINING
PEER_DRAINING ResultAcknowledged PEER_DRAINING
PEER_DRAINING ProgressAcknowledged PEER_DRAINING
PEER_DRAINING CheckpointAcknowledged PEER_DRAINING
PEER_DRAINING BudgetUpdate PEER_DRAINING
PEER_DRAINING Chunk PEER_DRAINING
PEER_DRAINING ChunkAcknowledged PEER_DRAINING
PEER_DRAINING HeartbeatEcho      PEER_DRAINING
PEER_DRAINING OrchestratorDrain  PEER_DRAINING
PEER_DRAINING AgentDrain         DRAINING
PEER_DRAINING SessionRefused     DISCONNECTED
PEER_DRAINING Replaced           ENDED
PEER_DRAINING PeerSilent         DISCONNECTED
PEER_DRAINING Disconnected       DISCONNECTED
PEER_DRAINING Stopped            ENDED
DRAINING      Accepted           DRAINING
DRAINING      Declined           DRAINING
DRAINING      Progress           DRAINING
DRAINING      Result             DRAINING
DRAINING      CancelAcknowledged DRAINING
DRAINING      DirectiveAcknowledged DRAINING
DRAINING Checkpoint DRAINING
DRAINING Usage DRAINING
DRAINING      Heartbeat          DRAINING
DRAINING      Refused            DRAINING
DRAINING      Cancel             DRAINING
DRAINING      Directive          DRAINING
DRAINING      ResultAcknowledged DRAINING
DRAINING      ProgressAcknowledged DRAINING
DRAINING CheckpointAcknowledged DRAINING
DRAINING BudgetUpdate DRAINING
DRAINING Chunk DRAINING
DRAINING ChunkAcknowledged DRAINING
DRAINING      HeartbeatEcho      DRAINING
DRAINING      Offer              DRAINING
DRAINING      OrchestratorDrain  DRAINING
DRAINING      SessionRefused     DISCONNECTED
DRAINING      Replaced           ENDED
DRAINING      PeerSilent         DISCONNECTED
DRAINING      Disconnected       DISCONNECTED
DRAINING      Stopped            ENDED
ENDED         Disconnected       ENDED
ENDED         Stopped            ENDED
"""

ORCHESTRATOR_PAIRS = """
AWAITING_HELLO Hello              CHECKING_HELLO
AWAITING_HELLO SessionRefused     ENDED
AWAITING_HELLO HelloTimeout       ENDED
AWAITING_HELLO Disconnected       ENDED
CHECKING_HELLO Welcome            OPEN
CHECKING_HELLO SessionRefused     ENDED
CHECKING_HELLO Replaced           ENDED
CHECKING_HELLO Disconnected       ENDED
OPEN           Accepted           OPEN
OPEN           Declined           OPEN
OPEN           Progress           OPEN
OPEN           Result             OPEN
OPEN           CancelAcknowledged OPEN
OPEN DirectiveAcknowledged OPEN
OPEN Checkpoint OPEN
OPEN Usage OPEN
OPEN           Heartbeat          OPEN
OPEN           Refused            OPEN
OPEN           Cancel             OPEN
OPEN           Directive          OPEN
OPEN           ResultAcknowledged OPEN
OPEN ProgressAcknowledged OPEN
OPEN CheckpointAcknowledged OPEN
OPEN BudgetUpdate OPEN
OPEN Chunk OPEN
OPEN ChunkAcknowledged OPEN
OPEN           HeartbeatEcho      OPEN
OPEN           Offer              OPEN
OPEN           AgentDrain         AGENT_DRAINING
OPEN           OrchestratorDrain  DRAINING
OPEN           SessionRefused     ENDED
OPEN           Replaced           ENDED
OPEN           PeerSilent         ENDED
OPEN           Disconnected       ENDED
AGENT_DRAINING Accepted           AGENT_DRAINING
AGENT_DRAINING Declined           AGENT_DRAINING
AGENT_DRAINING Progress           AGENT_DRAINING
AGENT_DRAINING Result             AGENT_DRAINING
AGENT_DRAINING CancelAcknowledged AGENT_DRAINING
AGENT_DRAINING DirectiveAcknowledged AGENT_DRAINING
AGENT_DRAINING Checkpoint AGENT_DRAINING
AGENT_DRAINING Usage AGENT_DRAINING
AGENT_DRAINING Heartbeat          AGENT_DRAINING
AGENT_DRAINING Refused            AGENT_DRAINING
AGENT_DRAINING Cancel             AGENT_DRAINING
AGENT_DRAINING Directive          AGENT_DRAINING
AGENT_DRAINING ResultAcknowledged AGENT_DRAINING
AGENT_DRAINING ProgressAcknowledged AGENT_DRAINING
AGENT_DRAINING CheckpointAcknowledged AGENT_DRAINING
AGENT_DRAINING BudgetUpdate AGENT_DRAINING
AGENT_DRAINING Chunk AGENT_DRAINING
AGENT_DRAINING ChunkAcknowledged AGENT_DRAINING
AGENT_DRAINING HeartbeatEcho      AGENT_DRAINING
AGENT_DRAINING OrchestratorDrain  DRAINING
AGENT_DRAINING SessionRefused     ENDED
AGENT_DRAINING Replaced           ENDED
AGENT_DRAINING PeerSilent         ENDED
AGENT_DRAINING Disconnected       ENDED
DRAINING       Accepted           DRAINING
DRAINING       Declined           DRAINING
DRAINING       Progress           DRAINING
DRAINING       Result             DRAINING
DRAINING       CancelAcknowledged DRAINING
DRAINING DirectiveAcknowledged DRAINING
DRAINING Checkpoint DRAINING
DRAINING Usage DRAINING
DRAINING       Heartbeat          DRAINING
DRAINING       Refused            DRAINING
DRAINING       Cancel             DRAINING
DRAINING       Directive          DRAINING
DRAINING       ResultAcknowledged DRAINING
DRAINING ProgressAcknowledged DRAINING
DRAINING CheckpointAcknowledged DRAINING
DRAINING BudgetUpdate DRAINING
DRAINING Chunk DRAINING
DRAINING ChunkAcknowledged DRAINING
DRAINING       HeartbeatEcho      DRAINING
DRAINING       AgentDrain         DRAINING
DRAINING       OrchestratorDrain  DRAINING
DRAINING       SessionRefused     ENDED
DRAINING       Replaced           ENDED
DRAINING       PeerSilent         ENDED
DRAINING       Disconnected       ENDED
ENDED          Refused            ENDED
ENDED          Cancel             ENDED
ENDED          Directive          ENDED
ENDED          ResultAcknowledged ENDED
ENDED ProgressAcknowledged ENDED
ENDED CheckpointAcknowledged ENDED
ENDED BudgetUpdate ENDED
ENDED Chunk ENDED
ENDED ChunkAcknowledged ENDED
ENDED          HeartbeatEcho      ENDED
ENDED          OrchestratorDrain  ENDED
ENDED          SessionRefused     ENDED
ENDED          Replaced           ENDED
ENDED          Disconnected       ENDED
"""

MACHINES: list[tuple[Transitions[Any], str]] = [
    (ATTEMPT, ATTEMPT_PAIRS),
    (AGENT, AGENT_PAIRS),
    (ORCHESTRATOR, ORCHESTRATOR_PAIRS),
]
IDS = ["attempt", "agent", "orchestrator"]


@pytest.mark.parametrize(("machine", "written"), MACHINES, ids=IDS)
def test_the_table_has_exactly_the_listed_moves(machine: Transitions[Any], written: str) -> None:
    table = {
        (state.name, event.__name__, following.name)
        for state, row in machine.rows.items()
        for event, following in row.items()
    }
    assert table == {tuple(line.split()) for line in written.strip().splitlines()}


@pytest.mark.parametrize("error", [LocalProtocolError, RemoteProtocolError])
@pytest.mark.parametrize(("machine", "written"), MACHINES, ids=IDS)
def test_every_other_pair_raises_the_given_error(
    machine: Transitions[Any], written: str, error: type[OrkiError]
) -> None:
    legal = {tuple(line.split()[:2]) for line in written.strip().splitlines()}
    states: type[Enum] = type(machine.initial)
    refused = 0
    for state in states:
        for event in machine.events():
            if (state.name, event.__name__) not in legal:
                with pytest.raises(error, match=rf"{event.__name__} is illegal in state {state.name} \(legal there: "):
                    machine.next(state, event, error)
                refused += 1
    assert refused == len(states) * len(machine.events()) - len(legal)


def test_every_state_is_reachable() -> None:
    for machine, _ in MACHINES:
        reached = {machine.initial} | {following for row in machine.rows.values() for following in row.values()}
        assert reached == set(type(machine.initial))
