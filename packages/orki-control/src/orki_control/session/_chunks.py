"""Large messages in chunks, so that small ones never wait behind them (laws 21 and 22)."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import Final
from zlib import crc32

from orki.control.v1 import session_pb2 as pb
from orki_contract.errors import RemoteProtocolError, TooLarge
from orki_control.session._state import AttemptKey

CHUNKED_ABOVE: Final = 256 * 1024
"""Size above which a result or an offer is sent in chunks."""
CHUNK_BYTES: Final = 64 * 1024
"""Size of a chunk."""
WINDOW_BYTES: Final = 256 * 1024
"""Maximum size of the chunks that are not acknowledged. It bounds the time for which a small message waits."""


class _Transfer:
    __slots__ = ("acknowledged", "attempt", "crc", "data", "kind", "number", "offset")

    def __init__(self, number: int, attempt: AttemptKey, kind: type, data: bytes) -> None:
        self.number = number
        self.attempt = attempt
        self.kind = kind
        self.data = data
        self.offset = 0
        self.acknowledged = 0
        self.crc = 0


class Transfers:
    """The transfers to the peer. Their chunks take turns, within one window.

    Attributes:
        limit: Maximum size of the transfers under way; 0 for a peer that takes no chunks.
    """

    def __init__(self) -> None:
        self.limit = 0
        self._waiting: deque[_Transfer] = deque()
        self._sending: deque[_Transfer] = deque()
        self._sent: dict[int, _Transfer] = {}
        self._number = 0
        self._unacknowledged = 0

    def __len__(self) -> int:
        """Number of transfers with chunks to send."""
        return len(self._waiting) + len(self._sending)

    def add(self, attempt: AttemptKey, kind: type, data: bytes) -> None:
        """Add a serialised message."""
        self._number += 1
        self._waiting.append(_Transfer(self._number, attempt, kind, data))

    def take(self, held: Container[AttemptKey]) -> pb.Chunk | None:
        """Return the next chunk, if the window has room for one.

        Args:
            held: Attempts whose transfers go on; others are abandoned.
        """
        self._begin(held)
        while self._sending:
            transfer = self._sending.popleft()
            if transfer.attempt not in held:
                self._forget(transfer)
                return pb.Chunk(transfer=transfer.number, attempt=transfer.attempt.ref())
            if self._unacknowledged + CHUNK_BYTES > WINDOW_BYTES:
                self._sending.appendleft(transfer)
                return None
            return self._chunk(transfer)
        return None

    def _begin(self, held: Container[AttemptKey]) -> None:
        while self._waiting:
            transfer = self._waiting[0]
            if transfer.attempt in held:
                under_way = sum(len(each.data) for each in self._sent.values())
                if under_way and under_way + len(transfer.data) > self.limit:
                    return
                self._sent[transfer.number] = transfer
                self._sending.append(transfer)
            self._waiting.popleft()

    def _chunk(self, transfer: _Transfer) -> pb.Chunk:
        data = transfer.data[transfer.offset : transfer.offset + CHUNK_BYTES]
        chunk = pb.Chunk(
            transfer=transfer.number,
            attempt=transfer.attempt.ref(),
            offset=transfer.offset,
            total=len(transfer.data),
            data=data,
        )
        transfer.offset += len(data)
        transfer.crc = crc32(data, transfer.crc)
        self._unacknowledged += len(data)
        if transfer.offset < len(transfer.data):
            self._sending.append(transfer)
        else:
            chunk.crc = transfer.crc
        return chunk

    def acknowledge(self, number: int, received: int) -> None:
        """Note that chunks have arrived.

        Raises:
            RemoteProtocolError: They were not sent.
        """
        transfer = self._sent.get(number)
        if transfer is None:
            if number > self._number:
                raise RemoteProtocolError(f"chunks of transfer {number} are acknowledged, which was not begun")
            return
        if not transfer.acknowledged < received <= transfer.offset:
            raise RemoteProtocolError(f"byte {received} of transfer {number} is acknowledged before it was sent")
        self._unacknowledged -= received - transfer.acknowledged
        transfer.acknowledged = received
        if received == len(transfer.data):
            del self._sent[number]

    def _forget(self, transfer: _Transfer) -> None:
        del self._sent[transfer.number]
        self._unacknowledged -= transfer.offset - transfer.acknowledged

    def clear(self) -> None:
        """Forget all transfers and numbers: they belonged to a stream that has ended."""
        self._waiting.clear()
        self._sending.clear()
        self._sent.clear()
        self._number = self._unacknowledged = 0

    def unfinished(self, kind: type) -> list[AttemptKey]:
        """Return the attempts with a message of a kind that is not sent completely."""
        return [each.attempt for each in (*self._waiting, *self._sending) if each.kind is kind]


class _Assembly:
    __slots__ = ("crc", "data", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self.data = bytearray()
        self.crc = 0


class Assemblies:
    """The transfers from the peer.

    Args:
        limit: Maximum size of all transfers under way.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[int, _Assembly] = {}
        self._last = 0

    def clear(self) -> None:
        """Forget all transfers: their stream has ended."""
        self._open.clear()
        self._last = 0

    def receive(self, chunk: pb.Chunk) -> tuple[int, bytes | None]:
        """Take a chunk.

        Returns:
            The number of bytes that have arrived, or 0 if the chunk was ignored; and the message once it is complete.

        Raises:
            TooLarge: The transfer exceeds the limit; its other chunks are ignored.
            RemoteProtocolError: The chunk does not follow the one before, or the checksum is wrong.
        """
        number = chunk.transfer
        if number > self._last:
            self._last = number
            if chunk.total:
                self._open_assembly(chunk)
        assembly = self._open.get(number)
        if assembly is None:
            return 0, None
        if not chunk.total:
            del self._open[number]
            return 0, None
        end = chunk.offset + len(chunk.data)
        if chunk.offset != len(assembly.data) or chunk.total != assembly.total or not chunk.offset < end <= chunk.total:
            raise RemoteProtocolError(
                f"transfer {number}: bytes {chunk.offset} to {end} of {chunk.total} came after "
                f"{len(assembly.data)} of {assembly.total}"
            )
        assembly.data += chunk.data
        assembly.crc = crc32(chunk.data, assembly.crc)
        if end < assembly.total:
            return end, None
        del self._open[number]
        if chunk.crc != assembly.crc:
            raise RemoteProtocolError(f"transfer {number}: the checksum is wrong")
        return end, bytes(assembly.data)

    def _open_assembly(self, chunk: pb.Chunk) -> None:
        under_way = sum(each.total for each in self._open.values())
        if under_way + chunk.total > self._limit:
            raise TooLarge(
                f"a transfer of {chunk.total} bytes exceeds the limit of {self._limit} with {under_way} bytes under way"
            )
        self._open[chunk.transfer] = _Assembly(chunk.total)
