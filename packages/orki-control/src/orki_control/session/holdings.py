"""What an agent holds: its attempts with their leases, the slots that they take, and cancels that came too early."""

from __future__ import annotations

from collections.abc import ItemsView
from typing import Final

from orki.control.v1.session_pb2 import Result
from orki_contract.errors import RemoteProtocolError
from orki_control.attempt import AttemptKey, AttemptState

__all__ = ["LEASE_SHARE", "Holding", "Holdings"]

LEASE_SHARE: Final = 0.9
"""Part of a lease after which the agent stops by itself, so that it has stopped when the lease ends (law 8)."""
_REMEMBERED_CANCELS: Final = 1024
_REMEMBERED_FENCES: Final = 8192
_OCCUPYING: Final = frozenset({AttemptState.OFFERED, AttemptState.RUNNING, AttemptState.CANCELLING})


class Holding:
    """One attempt at the agent.

    Attributes:
        state: Where it stands.
        traceparent: Of its task's span.
        lease: Time in seconds that it survives without a renewal.
        renewed_at: When the lease was last renewed, as the orchestrator can have seen it at the earliest.
        index: Number of its last progress.
        result: Its result, once there is one.
    """

    __slots__ = ("index", "lease", "renewed_at", "result", "state", "traceparent")

    def __init__(self, state: AttemptState, traceparent: str, lease: float, renewed_at: float) -> None:
        self.state = state
        self.traceparent = traceparent
        self.lease = lease
        self.renewed_at = renewed_at
        self.index = 0
        self.result: Result | None = None

    @property
    def stops_at(self) -> float:
        """When the agent stops the attempt by itself."""
        return self.renewed_at + self.lease * LEASE_SHARE


class Holdings:
    """All attempts of an agent, within its slots.

    Attributes:
        leases_end_at: When the next lease may be over, or None; never too late, sometimes too early.
        shortest_lease: Of the attempts held, in seconds; 0 for none.
    """

    def __init__(self, slots: int) -> None:
        self.leases_end_at: float | None = None
        self.shortest_lease = 0.0
        self._slots = slots
        self._held: dict[AttemptKey, Holding] = {}
        self._fences: dict[str, int] = {}
        self._occupied = 0
        self._blocked: set[AttemptKey] = set()
        self._cancelled: dict[AttemptKey, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._held

    def __getitem__(self, key: AttemptKey) -> Holding:
        return self._held[key]

    def get(self, key: AttemptKey) -> Holding | None:
        """The attempt, or None when it is not held."""
        return self._held.get(key)

    def items(self) -> ItemsView[AttemptKey, Holding]:
        """All that is held."""
        return self._held.items()

    @property
    def free_slots(self) -> int:
        """Slots that nothing takes."""
        return max(0, self._slots - self._occupied - len(self._blocked))

    def add(self, key: AttemptKey, holding: Holding) -> bool:
        """Takes an offered attempt in; False when handlers that were given up leave it no slot.

        Raises:
            RemoteProtocolError: It is held already, a fence of the task as high or higher was held not long ago, or the
                orchestrator offers more than the slots.
        """
        if key in self._held:
            raise RemoteProtocolError(f"offer: {key} is held already")
        if self._fences.get(key.task_id, 0) >= key.fence:
            raise RemoteProtocolError(f"offer: {key} came after fence {self._fences[key.task_id]} of the task")
        if self._occupied >= self._slots:
            raise RemoteProtocolError(f"offer: {key} is more than the {self._slots} slots of the hello")
        if not self.free_slots:
            return False
        self._held[key] = holding
        self._fences.pop(key.task_id, None)
        self._fences[key.task_id] = key.fence
        if len(self._fences) > _REMEMBERED_FENCES:
            del self._fences[next(iter(self._fences))]
        self._occupied += 1
        self.lease_changed(holding)
        return True

    def change(self, key: AttemptKey, holding: Holding, state: AttemptState) -> None:
        """Moves an attempt on; a closed one is not held any more."""
        if holding.state in _OCCUPYING and state not in _OCCUPYING:
            self._occupied -= 1
        holding.state = state
        if state is AttemptState.CLOSED:
            del self._held[key]

    def block(self, key: AttemptKey) -> None:
        """The attempt's handler still runs, though the attempt takes no slot any more: let the handler take it."""
        self._blocked.add(key)

    def release(self, key: AttemptKey) -> bool:
        """The handler has ended; whether it took a slot."""
        if key not in self._blocked:
            return False
        self._blocked.discard(key)
        return True

    def remember_cancel(self, key: AttemptKey) -> None:
        """A cancel came for an attempt that is not held: its offer may still be on its way."""
        self._cancelled[key] = None
        if len(self._cancelled) > _REMEMBERED_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]

    def was_cancelled(self, key: AttemptKey) -> bool:
        """Whether such a cancel came; it is forgotten now."""
        return self._cancelled.pop(key, key) is None

    # --- leases ---

    def renewable(self) -> list[AttemptKey]:
        """Attempts whose leases a heartbeat renews."""
        return [key for key, holding in self._held.items() if holding.state in _OCCUPYING]

    def lease_changed(self, holding: Holding) -> None:
        """One lease is new."""
        end = holding.stops_at
        if self.leases_end_at is None or end < self.leases_end_at:
            self.leases_end_at = end
        if not self.shortest_lease or holding.lease < self.shortest_lease:
            self.shortest_lease = holding.lease

    def leases_changed(self) -> None:
        """Many leases are new."""
        running = [holding for holding in self._held.values() if holding.state in _OCCUPYING]
        self.leases_end_at = min((holding.stops_at for holding in running), default=None)
        self.shortest_lease = min((holding.lease for holding in running), default=0.0)

    def leases_over(self, now: float) -> list[tuple[AttemptKey, Holding]]:
        """Attempts that must stop, as their leases may end; call it when `leases_end_at` has come."""
        if self.leases_end_at is None or now < self.leases_end_at:
            return []
        over = [
            (key, holding)
            for key, holding in self._held.items()
            if holding.state in _OCCUPYING and now >= holding.stops_at
        ]
        gone = {key for key, _ in over}
        left = [holding for key, holding in self._held.items() if holding.state in _OCCUPYING and key not in gone]
        self.leases_end_at = min((holding.stops_at for holding in left), default=None)
        return over
