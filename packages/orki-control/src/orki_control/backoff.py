"""Waiting between tries: full jitter, no last try, and a fresh start only after a stable time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from orki_contract.errors import InvalidSetting

__all__ = ["Jitter", "JitterOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JitterOptions:
    """Waits in seconds.

    Attributes:
        initial: Upper bound of the first wait.
        maximum: Upper bound of all waits.
        stable: How long a connection must have lasted for the next wait to be a first one again.
    """

    initial: float = 0.1
    maximum: float = 5.0
    stable: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.initial <= self.maximum:
            raise InvalidSetting(f"backoff: 0 < initial ({self.initial}) <= maximum ({self.maximum}) must hold")
        if self.stable < 0:
            raise InvalidSetting(f"backoff: stable ({self.stable}) is negative")


class Jitter:
    """Draws each wait evenly from zero to a bound that doubles, so that those who failed together come back apart."""

    def __init__(self, options: JitterOptions | None = None) -> None:
        self._options = options or JitterOptions()
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures since the last stable time."""
        return self._failures

    def failed(self, lasted: float = 0.0) -> float:
        """Counts a failure; the wait before the next try.

        Args:
            lasted: How long it had gone well before.
        """
        if lasted >= self._options.stable:
            self._failures = 0
        bound = min(self._options.maximum, self._options.initial * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return random.uniform(0.0, bound)
