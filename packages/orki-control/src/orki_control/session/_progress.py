"""The progress of one attempt at the agent: unacknowledged deltas, and the gaps between them (laws 17 to 19)."""

from __future__ import annotations

from collections import deque
from typing import Final

from orki.control.v1 import session_pb2 as pb
from orki.control.v1.attempt_pb2 import AttemptRef
from orki_contract import ProgressPolicy
from orki_contract.errors import Overloaded, RemoteProtocolError

OVERHEAD_BYTES: Final = 256
"""Upper estimate of a session message's size without its payload."""


class _Delta:
    __slots__ = ("index", "missing", "payload")

    def __init__(self, index: int, payload: bytes, missing: int) -> None:
        self.index = index
        self.payload = payload
        self.missing = missing


class ProgressWindow:
    """Deltas that are not acknowledged, in their order; those behind the first `sent` ones wait to be sent.

    It is a source of the send queue: one entry of the queue takes the next delta that waits.

    Attributes:
        index: Index of the last delta; 0 for none.
        size: Payload bytes of the unacknowledged deltas.
        acknowledged: Whether the peer acknowledges progress. If not, a delta leaves the window when it is sent.
    """

    __slots__ = (
        *("_count", "_deltas", "_last_sent", "_missing", "_ref", "_sent", "_size", "_traceparent"),
        *("acknowledged", "index", "size"),
    )

    def __init__(self, ref: AttemptRef, traceparent: str, count: int, size: int, acknowledged: bool) -> None:
        self.index = 0
        self.size = 0
        self.acknowledged = acknowledged
        self._ref = ref
        self._traceparent = traceparent
        self._count = count
        self._size = size
        self._deltas: deque[_Delta] = deque()
        self._sent = 0
        self._last_sent = 0
        self._missing = 0

    def __len__(self) -> int:
        """Number of unacknowledged deltas."""
        return len(self._deltas)

    @property
    def unsent(self) -> int:
        """Number of deltas that wait to be sent."""
        return len(self._deltas) - self._sent

    def put(self, payload: bytes, policy: ProgressPolicy) -> bool:
        """Add a delta by the contract's policy; return whether there is one more to send.

        Raises:
            Overloaded: The window is full, and the policy is to wait: the caller has not waited.
        """
        full = len(self._deltas) >= self._count or (self._deltas and self.size + len(payload) > self._size)
        if full and policy is ProgressPolicy.BLOCK:
            raise Overloaded(f"{len(self._deltas)} deltas with {self.size} bytes are not stored yet; wait for them")
        self.index += 1
        if full and policy is ProgressPolicy.DROP:
            self._missing += 1
            return False
        if full and self.unsent:
            newest = self._deltas[-1]
            self.size += len(payload) - len(newest.payload)
            newest.index, newest.payload, newest.missing = self.index, payload, newest.missing + 1
            return False
        self._deltas.append(_Delta(self.index, payload, self._missing))
        self._missing = 0
        self.size += len(payload)
        return True

    @property
    def next_size(self) -> int:
        """Estimated size of the next message; 0 if no delta waits."""
        return OVERHEAD_BYTES + len(self._deltas[self._sent].payload) if self.unsent else 0

    def take(self) -> pb.AgentMessage | None:
        """Return the message of the next delta that waits, or None."""
        if not self.unsent:
            return None
        delta = self._deltas[self._sent]
        self._last_sent = max(self._last_sent, delta.index)
        if self.acknowledged:
            self._sent += 1
        else:
            self._discard()
        progress = pb.Progress(
            attempt=self._ref,
            index=delta.index,
            payload=delta.payload,
            missing=delta.missing,
        )
        return pb.AgentMessage(traceparent=self._traceparent, progress=progress)

    def acknowledge(self, index: int) -> None:
        """Discard the deltas up to an index.

        Raises:
            RemoteProtocolError: A delta up to this index was not sent.
        """
        if index > self._last_sent:
            raise RemoteProtocolError(f"progress {index} is acknowledged before it was sent")
        while self._deltas and self._deltas[0].index <= index:
            self._discard()
            self._sent = max(0, self._sent - 1)

    def _discard(self) -> None:
        self.size -= len(self._deltas.popleft().payload)

    def rewind(self) -> int:
        """Send all deltas again; return their number."""
        self._sent = 0
        return len(self._deltas)

    def replay_after(self, index: int) -> int:
        """Send everything after an index again; return the number of deltas. Deltas that are lost become a gap."""
        self.acknowledge(index)
        if not self._deltas:
            self._missing = self.index - index
        else:
            first = self._deltas[0]
            first.missing = first.index - index - 1
        return self.rewind()
