"""The grammar of orki's machines: a literal table of states, events and next states, and nothing that is not in it.

A table maps each state to the events that are legal in it, and each event to the state that follows. Events are
classes: the protocol's own messages, and frozen dataclasses for what happens without a message. What a table does not
list is an illegal move, whose error the caller names: `LocalProtocolError` where we made it, `RemoteProtocolError`
where they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

from orki_contract.errors import OrkiError

__all__ = ["Transitions"]

S = TypeVar("S", bound=Enum)


class Transitions(Generic[S]):
    """A transition table that can be stepped through, listed and drawn.

    Attributes:
        name: Name of the machine, for messages and the diagram.
        initial: The state in which it begins.
        rows: The table.
    """

    __slots__ = ("initial", "name", "rows")

    def __init__(self, name: str, initial: S, rows: Mapping[S, Mapping[type, S]]) -> None:
        self.name = name
        self.initial = initial
        self.rows = rows

    def next(self, state: S, event: type, error: type[OrkiError]) -> S:
        """The state after `event` in `state`.

        Raises:
            OrkiError: Of class `error`: the table has no such move. The message lists those that it has.
        """
        following = self.rows[state].get(event)
        if following is None:
            raise error(self.illegal(state, event))
        return following

    def illegal(self, state: S, event: type) -> str:
        """The sentence that says that `event` has no place in `state`."""
        legal = ", ".join(sorted(each.__name__ for each in self.rows[state])) or "nothing"
        return f"{self.name}: {event.__name__} is illegal in state {state.name} (legal there: {legal})"

    def pairs(self) -> frozenset[tuple[S, type]]:
        """Every legal (state, event) pair."""
        return frozenset((state, event) for state, row in self.rows.items() for event in row)

    def events(self) -> frozenset[type]:
        """Every event that the table knows."""
        return frozenset(event for row in self.rows.values() for event in row)

    def mermaid(self) -> str:
        """The table as a Mermaid state diagram, edges between the same two states joined."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.initial.name}"]
        for state, row in self.rows.items():
            edges: dict[S, list[str]] = {}
            for event, following in row.items():
                edges.setdefault(following, []).append(event.__name__)
            lines += [
                f"    {state.name} --> {following.name}: {', '.join(events)}" for following, events in edges.items()
            ]
        return "\n".join(lines) + "\n"
