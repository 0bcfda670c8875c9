"""Literal transition tables of state machines.

A table maps each state to its legal events, and each event to the next state. Events are classes: protocol messages, or
frozen dataclasses for events without a message. A transition that the table does not list is illegal. The caller
chooses the error: `LocalProtocolError` if this side caused it, `RemoteProtocolError` if the peer did.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

from orki_contract.errors import OrkiError

__all__ = ["Transitions"]

S = TypeVar("S", bound=Enum)


class Transitions(Generic[S]):
    """A transition table that can be executed and listed; messages and the diagram show the machine's name."""

    __slots__ = ("initial", "name", "rows")

    def __init__(self, name: str, initial: S, rows: Mapping[S, Mapping[type, S]]) -> None:
        self.name = name
        self.initial = initial
        self.rows = rows

    def next(self, state: S, event: type, error: type[OrkiError]) -> S:
        """Return the state after `event` in `state`.

        Raises:
            OrkiError: Of class `error`: the table has no such transition. The message lists the legal events.
        """
        following = self.rows[state].get(event)
        if following is None:
            raise error(self.illegal(state, event))
        return following

    def illegal(self, state: S, event: type) -> str:
        """Return the error message for an illegal `event` in `state`."""
        legal = ", ".join(sorted(each.__name__ for each in self.rows[state])) or "nothing"
        return f"{self.name}: {event.__name__} is illegal in state {state.name} (legal there: {legal})"

    def pairs(self) -> frozenset[tuple[S, type]]:
        """Return every legal (state, event) pair."""
        return frozenset((state, event) for state, row in self.rows.items() for event in row)

    def events(self) -> frozenset[type]:
        """Return every event of the table."""
        return frozenset(event for row in self.rows.values() for event in row)
