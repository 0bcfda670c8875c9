"""The state machines of a tool connection: every pair of state and event, and the rules around the tables."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest

from orki.hotpath.v1.tool_orki import CancelFrame, ErrorFrame, HelloFrame, WelcomeFrame
from orki_agent.hotpath import _machine as machine
from orki_agent.hotpath._machine import (
    BridgeCall,
    BridgeCallState,
    BridgeConnectionState,
    BridgeMachine,
    BridgeStopped,
    CallCancelled,
    CallDeadline,
    CallReceived,
    ClientCall,
    ClientCallState,
    ClientClosed,
    ClientConnectionState,
    ClientMachine,
    ConnectDeadline,
    ConnectionLost,
    DrainStarted,
    FrameDeadline,
    FrameWritten,
    HandlerDetached,
    HandlerReturned,
    HelloDeadline,
    ReplyReceived,
    UnnumberedFrame,
)
from orki_contract.errors import Draining, LocalProtocolError, RemoteProtocolError, TooManyCalls
from orki_contract.transitions import Transitions

ENDS = (HelloDeadline, FrameDeadline, BridgeStopped)
EVENTS: tuple[type, ...] = (
    *ENDS,
    HelloFrame,
    WelcomeFrame,
    ErrorFrame,
    CancelFrame,
    CallReceived,
    ReplyReceived,
    UnnumberedFrame,
    CallDeadline,
    ConnectDeadline,
    DrainStarted,
    ConnectionLost,
    ClientClosed,
    HandlerDetached,
    HandlerReturned,
    CallCancelled,
    FrameWritten,
)

# The expected moves, written as text so that they share no code with the tables.
EXPECTED = {
    machine.BRIDGE_CONNECTION: """
        HANDSHAKE HelloFrame       OPEN
        HANDSHAKE DrainStarted     HANDSHAKE
        HANDSHAKE HelloDeadline    CLOSING
        HANDSHAKE FrameDeadline    CLOSING
        HANDSHAKE BridgeStopped    CLOSING
        HANDSHAKE ConnectionLost   CLOSED
        OPEN      CallReceived     OPEN
        OPEN      CancelFrame      OPEN
        OPEN      DrainStarted     DRAINING
        OPEN      FrameDeadline    CLOSING
        OPEN      BridgeStopped    CLOSING
        OPEN      ConnectionLost   CLOSED
        DRAINING  CallReceived     DRAINING
        DRAINING  CancelFrame      DRAINING
        DRAINING  FrameDeadline    CLOSING
        DRAINING  BridgeStopped    CLOSING
        DRAINING  ConnectionLost   CLOSED
        CLOSING   HelloFrame       CLOSING
        CLOSING   CallReceived     CLOSING
        CLOSING   CancelFrame      CLOSING
        CLOSING   ConnectionLost   CLOSED
    """,
    machine.BRIDGE_CALL: """
        INLINE    HandlerDetached DETACHED
        INLINE    HandlerReturned ENDED
        INLINE    BridgeStopped   INLINE
        DETACHED  HandlerReturned ENDED
        DETACHED  CallDeadline    ABANDONED
        DETACHED  CancelFrame     ABANDONED
        DETACHED  BridgeStopped   ABANDONED
        DETACHED  ConnectionLost  ABANDONED
        ABANDONED HandlerReturned ENDED
    """,
    machine.CLIENT_CONNECTION: """
        HANDSHAKE WelcomeFrame    OPEN
        HANDSHAKE ErrorFrame      CLOSED
        HANDSHAKE ConnectDeadline CLOSED
        HANDSHAKE ConnectionLost  CLOSED
        HANDSHAKE ClientClosed    CLOSED
        OPEN      ReplyReceived   OPEN
        OPEN      ErrorFrame      CLOSED
        OPEN      ConnectionLost  CLOSED
        OPEN      ClientClosed    CLOSED
    """,
    machine.CLIENT_CALL: """
        UNSENT    FrameWritten   SENT
        UNSENT    CallDeadline   ABANDONED
        UNSENT    CallCancelled  ABANDONED
        UNSENT    ConnectionLost ENDED
        SENT      ReplyReceived  ENDED
        SENT      CallDeadline   ABANDONED
        SENT      CallCancelled  ABANDONED
        SENT      ConnectionLost ENDED
        ABANDONED FrameWritten   ABANDONED
        ABANDONED ReplyReceived  ENDED
        ABANDONED ConnectionLost ENDED
    """,
}


def pairs() -> Iterator[tuple[Transitions[Any], Enum, type, str | None]]:
    for table, text in EXPECTED.items():
        lines = (line.split() for line in text.strip().splitlines())
        moves = {(state, event): following for state, event, following in lines}
        assert len(moves) == len(table.pairs())
        for state in type(table.initial):
            for event in EVENTS:
                yield table, state, event, moves.get((state.name, event.__name__))


@pytest.mark.parametrize(
    ("table", "state", "event", "following"),
    [*pairs()],
    ids=lambda value: getattr(value, "name", None) or getattr(value, "__name__", None) or str(value),
)
def test_each_pair_of_state_and_event_moves_as_listed_or_raises(
    table: Transitions[Any], state: Enum, event: type, following: str | None
) -> None:
    for error in (LocalProtocolError, RemoteProtocolError):
        if following is not None:
            assert table.next(state, event, error).name == following
        else:
            with pytest.raises(error, match=f"{event.__name__} is illegal in state {state.name}"):
                table.next(state, event, error)


@pytest.mark.parametrize("table", [*EXPECTED])
def test_each_table_lists_every_state_and_is_reachable_from_its_first(table: Transitions[Any]) -> None:
    states = set(type(table.initial))
    assert set(table.rows) == states
    assert table.events() <= set(EVENTS)
    reached = {table.initial}
    for _ in states:
        reached |= {following for state in reached for following in table.rows[state].values()}
    assert reached == states


def bridge_call(correlation: int) -> BridgeCall:
    call = BridgeCall()
    call.correlation, call.state = correlation, BridgeCallState.INLINE
    return call


def open_bridge(max_calls: int = 2) -> BridgeMachine[BridgeCall]:
    made: BridgeMachine[BridgeCall] = BridgeMachine(max_calls)
    made.receive(HelloFrame)
    return made


def test_a_detached_call_has_one_answer() -> None:
    for event in (CallDeadline, CancelFrame, BridgeStopped, ConnectionLost):
        bridge, call = open_bridge(), bridge_call(7)
        assert bridge.detach(call)
        assert bridge.in_use
        assert bridge.abandon(7, event) is call
        assert bridge.abandon(7, event) is None
        assert not bridge.finish(call)
        assert not bridge.in_use
    bridge, call = open_bridge(), bridge_call(7)
    bridge.detach(call)
    assert bridge.finish(call)
    assert bridge.abandon(7, CallDeadline) is None
    with pytest.raises(LocalProtocolError):
        bridge.finish(call)


def test_a_call_that_has_returned_cannot_be_detached() -> None:
    bridge, call = open_bridge(), bridge_call(7)
    bridge.inline = call
    assert bridge.in_use
    assert bridge.finish(call)
    assert not bridge.detach(call)
    assert bridge.stop_inline() is None
    assert bridge.calls == {}


def test_the_number_of_an_abandoned_call_may_be_used_again() -> None:
    bridge, first, second = open_bridge(), bridge_call(7), bridge_call(7)
    bridge.detach(first)
    bridge.abandon(7, CancelFrame)
    bridge.detach(second)
    assert not bridge.finish(first)
    assert bridge.calls == {7: second}


def test_calls_are_refused_beyond_the_limit_while_draining_and_under_a_number_in_use() -> None:
    bridge = open_bridge(max_calls=1)
    assert bridge.refusal(1) is None
    bridge.detach(bridge_call(1))
    assert isinstance(bridge.refusal(2), TooManyCalls)
    with pytest.raises(RemoteProtocolError, match="call 1 was sent again"):
        bridge.refusal(1)
    bridge.apply(DrainStarted)
    assert isinstance(bridge.refusal(2), Draining)


@pytest.mark.parametrize("event", ENDS)
def test_an_ended_connection_takes_no_frames(event: type) -> None:
    bridge: BridgeMachine[BridgeCall] = BridgeMachine(1)
    bridge.apply(event)
    assert (bridge.state, bridge.reading) == (BridgeConnectionState.CLOSING, False)
    bridge.receive(CallReceived)
    bridge.apply(ConnectionLost)
    assert (bridge.state, bridge.reading) == (BridgeConnectionState.CLOSED, False)


def test_a_reply_ends_its_call_once() -> None:
    client: ClientMachine[ClientCall] = ClientMachine()
    client.receive(WelcomeFrame)
    call = client.calls[1] = ClientCall()
    with pytest.raises(RemoteProtocolError, match="UNSENT"):
        client.receive_reply(1)
    client.written(1)
    assert client.receive_reply(1) is call
    with pytest.raises(RemoteProtocolError, match="reply to unknown call 1"):
        client.receive_reply(1)


@pytest.mark.parametrize("event", [CallDeadline, CallCancelled])
@pytest.mark.parametrize("state", [ClientCallState.UNSENT, ClientCallState.SENT])
def test_the_reply_to_an_abandoned_call_is_dropped(state: ClientCallState, event: type) -> None:
    client: ClientMachine[ClientCall] = ClientMachine()
    client.calls[1] = ClientCall(state)
    assert client.abandon(1, event)
    assert not client.abandon(1, event)
    client.written(1)
    assert client.receive_reply(1) is None
    assert not client.abandon(1, event)


def test_a_lost_connection_reports_the_state_of_each_call() -> None:
    client: ClientMachine[ClientCall] = ClientMachine()
    client.receive(WelcomeFrame)
    for number, state in enumerate((ClientCallState.UNSENT, ClientCallState.SENT, ClientCallState.ABANDONED)):
        client.calls[number] = ClientCall(state)
    client.apply(ConnectionLost)
    assert [before.name for _, before in client.end_all()] == ["UNSENT", "SENT", "ABANDONED"]
    assert client.calls == {}
    assert client.state is ClientConnectionState.CLOSED
