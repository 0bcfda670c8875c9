"""Jittered exponential back-off between retries."""

from __future__ import annotations

__all__ = ["Jitter", "JitterOptions"]

import random
from collections.abc import Callable
from dataclasses import dataclass

from orki_contract.errors import InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class JitterOptions:
    """Bounds of retry delays and their randomness. Durations are in seconds.

    Attributes:
        initial: Upper bound of the first delay. The bound doubles with each failure.
        maximum: Upper bound of all delays.
        stable: How long a connection must have lasted for the next delay to start over from `initial`.
        spread: Random fraction of each delay: 1.0 draws between zero and the bound, 0.5 between half and the bound.
    """

    initial: float = 0.1
    maximum: float = 5.0
    stable: float = 10.0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.initial <= self.maximum:
            raise InvalidSetting(f"backoff: 0 < initial ({self.initial}) <= maximum ({self.maximum}) must hold")
        if self.stable < 0:
            raise InvalidSetting(f"backoff: stable ({self.stable}) is negative")
        if not 0 <= self.spread <= 1:
            raise InvalidSetting(f"backoff: 0 <= spread ({self.spread}) <= 1 must hold")


class Jitter:
    """Draws randomized delays, so that clients that failed together do not retry together.

    Args:
        options: Bounds of the delays.
        random_source: Returns a number in [0, 1); tests and simulations pass a seeded one.
    """

    def __init__(
        self, options: JitterOptions | None = None, *, random_source: Callable[[], float] = random.random
    ) -> None:
        self._options = options or JitterOptions()
        self._random = random_source
        self._failures = 0

    @property
    def failures(self) -> int:
        """Failures since the last stable period."""
        return self._failures

    def reset(self) -> None:
        """Start over from the initial delay, after a success."""
        self._failures = 0

    def failed(self, lasted: float = 0.0) -> float:
        """Count a failure and return the delay before the next retry.

        Args:
            lasted: How long the connection worked before it failed.
        """
        if lasted >= self._options.stable:
            self.reset()
        bound = min(self._options.maximum, self._options.initial * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return bound * (1.0 - self._options.spread * self._random())
