"""Who has a session here. One agent id, one session: the newest."""

from __future__ import annotations

from collections.abc import Iterator

from orki_server.sessions.live import LiveSession

__all__ = ["Roster"]


class Roster:
    """Sessions by agent id."""

    def __init__(self) -> None:
        self._sessions: dict[str, LiveSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[LiveSession]:
        return iter(list(self._sessions.values()))

    def get(self, agent_id: str) -> LiveSession | None:
        """The agent's session."""
        return self._sessions.get(agent_id)

    def enter(self, session: LiveSession) -> LiveSession | None:
        """Takes in a welcomed session; the one that it replaces, if any.

        The caller has made sure that no newer one is here.
        """
        older = self._sessions.get(session.agent_id)
        self._sessions[session.agent_id] = session
        return older

    def leave(self, session: LiveSession) -> bool:
        """Removes the session if it is still the agent's; a late end of an older one does not touch the newer."""
        if self._sessions.get(session.agent_id) is not session:
            return False
        del self._sessions[session.agent_id]
        return True
