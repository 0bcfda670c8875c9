"""The page that shows the machines' tables: `python -m orki_control.diagram` prints `docs/control-states.md`."""

from __future__ import annotations

from typing import Any, Final

from orki_control.attempt import ATTEMPT
from orki_control.session.states import AGENT, ORCHESTRATOR
from orki_control.table import Transitions

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
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(control_states(), end="")
