"""The agent's pulse: when the next heartbeat is due, what each one renewed, and since when the peer is silent."""

from __future__ import annotations

from orki_contract.errors import RemoteProtocolError
from orki_control.attempt import AttemptKey
from orki_control.session.options import SILENT_INTERVALS

__all__ = ["Pulse"]

_REMEMBERED_BEATS = 2 * SILENT_INTERVALS


class Pulse:
    """Heartbeats of one stream.

    Attributes:
        beat_at: When the next heartbeat is due.
        silent_at: When the peer counts as gone, unless it is heard before.
    """

    def __init__(self) -> None:
        self.beat_at = 0.0
        self.silent_at = 0.0
        self._interval = 1.0
        self._beats = 0
        self._unechoed: dict[int, tuple[float, list[AttemptKey]]] = {}

    def begin(self, silent_at: float) -> None:
        """A new stream: numbers start anew, and the peer has until `silent_at` for its first word."""
        self.silent_at = silent_at
        self._beats = 0
        self._unechoed.clear()

    def set_interval(self, interval: float, now: float) -> None:
        """The peer has said how often it wants to hear of us; the first heartbeat is due at once."""
        self._interval = interval
        self.beat_at = now

    def heard(self, now: float) -> None:
        """The peer said something."""
        self.silent_at = now + SILENT_INTERVALS * self._interval

    def hurry(self) -> None:
        """There is news that a heartbeat should carry."""
        self.beat_at = 0.0

    def beat(self, now: float, renewed: list[AttemptKey], shortest_lease: float) -> int:
        """Counts a heartbeat; its number. A short lease makes the pulse quicker than the peer asked for."""
        self._beats += 1
        self._unechoed[self._beats] = (now, renewed)
        if len(self._unechoed) > _REMEMBERED_BEATS:
            del self._unechoed[min(self._unechoed)]
        wanted = shortest_lease / SILENT_INTERVALS if shortest_lease else self._interval
        self.beat_at = now + min(self._interval, wanted)
        return self._beats

    def echoed(self, number: int) -> tuple[float, list[AttemptKey]]:
        """When the echoed heartbeat was sent, and which attempts it renewed.

        Raises:
            RemoteProtocolError: No such heartbeat was sent.
        """
        if not 1 <= number <= self._beats:
            raise RemoteProtocolError(f"echo of heartbeat {number}; the last was {self._beats}")
        sent_at, renewed = self._unechoed.get(number, (0.0, []))
        for older in [each for each in self._unechoed if each <= number]:
            del self._unechoed[older]
        return sent_at, renewed
