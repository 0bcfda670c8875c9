"""The store's Lua script, and the base class of its operations."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar, Final, Generic, TypeAlias, TypeVar

from orki.errors.v1.errors_pb2 import Reason
from orki_server import _keys as keys
from orki_server._store.lifecycle import lua_moves

EPOCH_STEP: Final = 1 << 44
"""Distance between the first fences of two store epochs: the epoch is in the high 20 bits of a fence."""

R = TypeVar("R")
Argument: TypeAlias = bytes | str | int
Call: TypeAlias = tuple[int, Sequence[Argument]]

_REASONS: Final = ("CANCELLED", "TOTAL_TIMEOUT", "OFFER_TIMEOUT", "ATTEMPT_TIMEOUT", "LEASE_EXPIRED", "STALLED")


class Operation(ABC, Generic[R]):
    """One atomic operation of the script. Each may be sent again when its reply was lost.

    Attributes:
        op: Name of the operation in the script.
        patient: Whether it waits in memory while the store is down. Reports of agents do; requests of submitters fail.
    """

    op: ClassVar[str]
    patient: ClassVar[bool] = True
    __slots__ = ()

    @abstractmethod
    def call(self) -> Call:
        """Return the shard and the arguments for the script."""

    @abstractmethod
    def outcome(self, reply: list[bytes]) -> R:
        """Decode the script's reply."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script.

    Attributes:
        text: Its source.
        sha: SHA-1 of the source; Redis refers to scripts by it.
    """

    text: str
    sha: str


def shard_script(retention: float) -> Script:
    """Return the script that applies a batch of operations to one shard.

    Names, legal moves and reasons are generated in front of the files in `lua/`.

    Args:
        retention: Time for which a finished task is kept.
    """
    constants = [f"local REASON_{name} = '{Reason.Value(f'REASON_{name}')}'" for name in _REASONS]
    constants.append(f"local RETENTION = {round(retention * 1000)}")
    # The first fence depends on the clock: a store that lost everything continues above the fences that it gave before.
    constants.append(f"local function first_fence(now) return string.format('%.0f', {EPOCH_STEP} + now) end\n")
    folder = files("orki_server._store") / "lua"
    written = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("task", "operations")]
    text = "\n".join([keys.lua_names(), lua_moves(), "\n".join(constants), *written])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
