"""How the parts of an orchestrator wake each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Signals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What those who change tasks call.

    Attributes:
        queued: A shard has, or is about to have, a queued task, in so many milliseconds.
        moved: A task changes, and may end with it. A look that is handed in now comes behind the change.
        recorded: There are records in the outbox.
    """

    queued: Callable[[int, int], None]
    moved: Callable[[str, bool], None]
    recorded: Callable[[], None]
