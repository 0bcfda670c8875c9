"""State machines of a tool connection and its calls, at the bridge's end and at the client's end.

They do no I/O and know no clock and no thread. Their owners serialise access: a bridge's connection with a lock, a
client's connection by running in one thread or event loop at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Generic, TypeVar

from orki.hotpath.v1.tool_orki import CancelFrame, ErrorFrame, HelloFrame, WelcomeFrame
from orki_contract.errors import Draining, LocalProtocolError, OrkiError, RemoteProtocolError, TooManyCalls
from orki_contract.transitions import Transitions


class _State(Enum):
    __hash__ = object.__hash__  # Enum.__hash__ is a Python function, too slow for a lookup in every call.


class BridgeConnectionState(_State):
    """States of a connection at the bridge's end."""

    HANDSHAKE = auto()
    OPEN = auto()
    DRAINING = auto()
    """New calls are refused."""
    CLOSING = auto()
    """The bridge has shut the socket down; the reading thread has not seen the end of the stream yet."""
    CLOSED = auto()


class BridgeCallState(_State):
    """States of a call at the bridge's end."""

    INLINE = auto()
    """The handler runs on the connection's reading thread."""
    DETACHED = auto()
    """The handler runs elsewhere while the connection is read on."""
    ABANDONED = auto()
    """The call was answered with an error, or the connection is lost; the handler still runs."""
    ENDED = auto()


class ClientConnectionState(_State):
    """States of a connection at the client's end."""

    HANDSHAKE = auto()
    OPEN = auto()
    CLOSED = auto()


class ClientCallState(_State):
    """States of a call at the client's end."""

    UNSENT = auto()
    """Part of the frame has not been written."""
    SENT = auto()
    ABANDONED = auto()
    """The caller does not wait any more; the bridge still owes a reply."""
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class CallReceived:
    """A call arrived at the bridge."""


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """A reply or an error for one call arrived."""


@dataclass(frozen=True, slots=True)
class UnnumberedFrame:
    """A frame arrived that needs a call number and has none. Legal in no state."""


@dataclass(frozen=True, slots=True)
class HelloDeadline:
    """The client sent no hello within `handshake_timeout`."""


@dataclass(frozen=True, slots=True)
class FrameDeadline:
    """A frame was begun and not finished within `frame_timeout`."""


@dataclass(frozen=True, slots=True)
class CallDeadline:
    """The call's timeout has elapsed."""


@dataclass(frozen=True, slots=True)
class ConnectDeadline:
    """The bridge did not answer the hello within `connect_timeout`."""


@dataclass(frozen=True, slots=True)
class DrainStarted:
    """The bridge is about to stop and takes no new calls."""


@dataclass(frozen=True, slots=True)
class BridgeStopped:
    """The bridge stops now, or has no thread left to read the connection."""


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """The stream ended, an operation on the socket failed, or the peer violated the protocol."""


@dataclass(frozen=True, slots=True)
class ClientClosed:
    """The client closes its end."""


@dataclass(frozen=True, slots=True)
class HandlerDetached:
    """From now on, the handler does not run on the thread that reads the connection."""


@dataclass(frozen=True, slots=True)
class HandlerReturned:
    """The handler returned or raised."""


@dataclass(frozen=True, slots=True)
class CallCancelled:
    """The caller does not want the reply any more."""


@dataclass(frozen=True, slots=True)
class FrameWritten:
    """The last byte of the call's frame was written."""


_B = BridgeConnectionState
BRIDGE_CONNECTION: Final = Transitions(
    "bridge connection",
    _B.HANDSHAKE,
    {
        _B.HANDSHAKE: {
            HelloFrame: _B.OPEN,
            DrainStarted: _B.HANDSHAKE,
            HelloDeadline: _B.CLOSING,
            FrameDeadline: _B.CLOSING,
            BridgeStopped: _B.CLOSING,
            ConnectionLost: _B.CLOSED,
        },
        _B.OPEN: {
            CallReceived: _B.OPEN,
            CancelFrame: _B.OPEN,
            DrainStarted: _B.DRAINING,
            FrameDeadline: _B.CLOSING,
            BridgeStopped: _B.CLOSING,
            ConnectionLost: _B.CLOSED,
        },
        _B.DRAINING: {
            CallReceived: _B.DRAINING,
            CancelFrame: _B.DRAINING,
            FrameDeadline: _B.CLOSING,
            BridgeStopped: _B.CLOSING,
            ConnectionLost: _B.CLOSED,
        },
        # Frames that were received before the shutdown are dropped.
        _B.CLOSING: {
            HelloFrame: _B.CLOSING,
            CallReceived: _B.CLOSING,
            CancelFrame: _B.CLOSING,
            ConnectionLost: _B.CLOSED,
        },
        _B.CLOSED: {},
    },
)

_BC = BridgeCallState
BRIDGE_CALL: Final = Transitions(
    "bridge call",
    _BC.INLINE,
    {
        _BC.INLINE: {
            HandlerDetached: _BC.DETACHED,
            HandlerReturned: _BC.ENDED,
            BridgeStopped: _BC.INLINE,
        },
        _BC.DETACHED: {
            HandlerReturned: _BC.ENDED,
            CallDeadline: _BC.ABANDONED,
            CancelFrame: _BC.ABANDONED,
            BridgeStopped: _BC.ABANDONED,
            ConnectionLost: _BC.ABANDONED,
        },
        _BC.ABANDONED: {HandlerReturned: _BC.ENDED},
        _BC.ENDED: {},
    },
)

_C = ClientConnectionState
CLIENT_CONNECTION: Final = Transitions(
    "client connection",
    _C.HANDSHAKE,
    {
        _C.HANDSHAKE: {
            WelcomeFrame: _C.OPEN,
            ErrorFrame: _C.CLOSED,
            ConnectDeadline: _C.CLOSED,
            ConnectionLost: _C.CLOSED,
            ClientClosed: _C.CLOSED,
        },
        _C.OPEN: {
            ReplyReceived: _C.OPEN,
            ErrorFrame: _C.CLOSED,
            ConnectionLost: _C.CLOSED,
            ClientClosed: _C.CLOSED,
        },
        _C.CLOSED: {},
    },
)

_CC = ClientCallState
CLIENT_CALL: Final = Transitions(
    "client call",
    _CC.UNSENT,
    {
        _CC.UNSENT: {
            FrameWritten: _CC.SENT,
            CallDeadline: _CC.ABANDONED,
            CallCancelled: _CC.ABANDONED,
            ConnectionLost: _CC.ENDED,
        },
        _CC.SENT: {
            ReplyReceived: _CC.ENDED,
            CallDeadline: _CC.ABANDONED,
            CallCancelled: _CC.ABANDONED,
            ConnectionLost: _CC.ENDED,
        },
        _CC.ABANDONED: {
            FrameWritten: _CC.ABANDONED,
            ReplyReceived: _CC.ENDED,
            ConnectionLost: _CC.ENDED,
        },
        _CC.ENDED: {},
    },
)


_SENT: Final = ClientCallState.SENT

S = TypeVar("S", bound=_State)


class _ConnectionMachine(Generic[S]):
    """The state of a connection at one end."""

    __slots__ = ("_table", "state")

    def __init__(self, table: Transitions[S]) -> None:
        self._table = table
        self.state = table.initial

    def receive(self, event: type) -> None:
        """Apply a frame of the peer; raise `RemoteProtocolError` if it is illegal in this state."""
        self.state = self._table.next(self.state, event, RemoteProtocolError)

    def apply(self, event: type) -> None:
        """Apply an event of this end or a timer; raise `LocalProtocolError` if it is illegal in this state."""
        self.state = self._table.next(self.state, event, LocalProtocolError)


class BridgeCall:
    """A call as the bridge's machine knows it."""

    __slots__ = ("correlation", "state")

    correlation: int
    state: BridgeCallState


B = TypeVar("B", bound=BridgeCall)


class BridgeMachine(_ConnectionMachine[BridgeConnectionState], Generic[B]):
    """The bridge's end of a connection and its calls.

    Attributes:
        inline: The last call that ran on the reading thread; it still runs there while its state is INLINE.
        calls: Detached calls by correlation.
    """

    __slots__ = ("_max_calls", "calls", "inline")

    def __init__(self, max_calls: int) -> None:
        super().__init__(BRIDGE_CONNECTION)
        self.inline: B | None = None
        self.calls: dict[int, B] = {}
        self._max_calls = max_calls

    @property
    def in_use(self) -> bool:
        inline = self.inline
        return bool(self.calls) or (inline is not None and inline.state is BridgeCallState.INLINE)

    @property
    def reading(self) -> bool:
        return self.state is not BridgeConnectionState.CLOSING and self.state is not BridgeConnectionState.CLOSED

    def refusal(self, correlation: int) -> OrkiError | None:
        """Return the error that refuses a received call; None if the call may run.

        Raises:
            RemoteProtocolError: An earlier call of this number has not been answered.
        """
        if correlation in self.calls:
            raise RemoteProtocolError(f"call {correlation} was sent again before it was answered")
        if self.state is BridgeConnectionState.DRAINING:
            return Draining("the bridge is stopping and takes no new calls")
        if len(self.calls) >= self._max_calls:
            return TooManyCalls(f"{self._max_calls} calls are in flight on this connection, which is the maximum")
        return None

    def detach(self, call: B) -> bool:
        """Move a call off the reading thread; return False if its handler has returned already."""
        if call.state is not BridgeCallState.INLINE:
            return False
        call.state = BRIDGE_CALL.next(call.state, HandlerDetached, LocalProtocolError)
        self.calls[call.correlation] = call
        return True

    def finish(self, call: B) -> bool:
        """Record that a handler has returned; return whether its answer must still be sent."""
        before = call.state
        call.state = BRIDGE_CALL.next(before, HandlerReturned, LocalProtocolError)
        if before is BridgeCallState.DETACHED:
            del self.calls[call.correlation]
        return before is not BridgeCallState.ABANDONED

    def abandon(self, correlation: int, event: type) -> B | None:
        """Abandon a detached call because of `event`; return None if no such call is unanswered."""
        call = self.calls.pop(correlation, None)
        if call is not None:
            call.state = BRIDGE_CALL.next(call.state, event, LocalProtocolError)
        return call

    def abandon_all(self, event: type) -> list[B]:
        return [call for correlation in tuple(self.calls) if (call := self.abandon(correlation, event)) is not None]

    def stop_inline(self) -> B | None:
        """Return the call whose handler runs on the reading thread and must be cancelled because the bridge stops."""
        call = self.inline
        if call is None or call.state is not BridgeCallState.INLINE:
            return None
        call.state = BRIDGE_CALL.next(call.state, BridgeStopped, LocalProtocolError)
        return call


class ClientCall:
    """A call as the client's machine knows it."""

    __slots__ = ("state",)

    def __init__(self, state: ClientCallState = CLIENT_CALL.initial) -> None:
        self.state = state


C = TypeVar("C", bound=ClientCall)


class ClientMachine(_ConnectionMachine[ClientConnectionState], Generic[C]):
    """The client's end of a connection and its calls.

    Attributes:
        calls: Calls to which the bridge owes a reply, by correlation.
    """

    __slots__ = ("calls",)

    def __init__(self) -> None:
        super().__init__(CLIENT_CONNECTION)
        self.calls: dict[int, C] = {}

    def receive_reply(self, correlation: int) -> C | None:
        """End the call that a reply belongs to; return None if its caller does not wait any more.

        Raises:
            RemoteProtocolError: No call of this number awaits a reply, or the call's frame is not completely written.
        """
        call = self.calls.get(correlation)
        if call is None:
            raise RemoteProtocolError(f"reply to unknown call {correlation}")
        before = call.state
        call.state = CLIENT_CALL.next(before, ReplyReceived, RemoteProtocolError)
        del self.calls[correlation]
        return call if before is _SENT else None

    def written(self, correlation: int) -> None:
        call = self.calls[correlation]
        call.state = CLIENT_CALL.next(call.state, FrameWritten, LocalProtocolError)

    def abandon(self, correlation: int, event: type) -> bool:
        """Abandon a call because of `event`; return False if its caller does not wait."""
        call = self.calls.get(correlation)
        if call is None or call.state is ClientCallState.ABANDONED:
            return False
        call.state = CLIENT_CALL.next(call.state, event, LocalProtocolError)
        return True

    def end_all(self) -> list[tuple[C, ClientCallState]]:
        """End every call because the connection is lost; return each with the state that it was in."""
        ended = [(call, call.state) for call in self.calls.values()]
        self.calls.clear()
        for call, before in ended:
            call.state = CLIENT_CALL.next(before, ConnectionLost, LocalProtocolError)
        return ended
