"""What every transition is: one atomic operation of a shard's script, and what its answer means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeAlias, TypeVar

__all__ = ["Argument", "Transition"]

R = TypeVar("R")
Argument: TypeAlias = bytes | str | int


class Transition(ABC, Generic[R]):
    """One operation of the script. Each may be sent again after an answer was lost.

    Attributes:
        op: Its name there.
        patient: Whether it waits in memory while the store is away. What agents report does, as they have done their
            part; what people ask does not, as they want to know.
    """

    op: ClassVar[str]
    patient: ClassVar[bool] = True
    __slots__ = ()

    @abstractmethod
    def route(self) -> int:
        """The shard that it belongs to."""

    @abstractmethod
    def arguments(self) -> Sequence[Argument]:
        """What the script gets."""

    @abstractmethod
    def outcome(self, reply: list[bytes]) -> R:
        """What the script's answer means."""
