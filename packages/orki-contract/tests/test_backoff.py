"""Delays between retries."""

from __future__ import annotations

import pytest

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import InvalidSetting

OPTIONS = JitterOptions(initial=1.0, maximum=4.0, stable=10.0)


def test_the_bound_doubles_up_to_the_maximum() -> None:
    jitter = Jitter(OPTIONS, random_source=lambda: 0.0)
    assert [jitter.failed() for _ in range(4)] == [1.0, 2.0, 4.0, 4.0]
    assert jitter.failures == 4


def test_spread_sets_the_shortest_delay() -> None:
    assert Jitter(OPTIONS, random_source=lambda: 0.75).failed() == 0.25
    half = JitterOptions(initial=1.0, maximum=4.0, spread=0.5)
    assert Jitter(half, random_source=lambda: 1.0).failed() == 0.5


def test_a_stable_connection_or_a_reset_starts_over() -> None:
    jitter = Jitter(OPTIONS, random_source=lambda: 0.0)
    jitter.failed()
    assert jitter.failed(lasted=9.9) == 2.0
    assert jitter.failed(lasted=10.0) == 1.0
    jitter.reset()
    assert jitter.failed() == 1.0


@pytest.mark.parametrize("setting", [{"initial": 0.0}, {"maximum": 0.01}, {"stable": -1.0}, {"spread": 1.5}])
def test_options_are_checked(setting: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match="backoff"):
        JitterOptions(**setting)
