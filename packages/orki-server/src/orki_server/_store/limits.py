"""Limits by key: how many attempts may run at once, and how often one may start."""

from __future__ import annotations

from typing import Final

from orki.control.v1.task_pb2 import Limit
from orki_contract.errors import InvalidArgument
from orki_server._store.operations import Operation
from orki_server._store.placement import COUNTING_SHARD, check_key

_MAX_CONCURRENCY: Final = 1_000_000
_MAX_INTERVAL_US: Final = 86_400_000_000
_MAX_BURST: Final = 1_000_000


def check_limit(limit: Limit) -> None:
    """Raise InvalidArgument for a limit whose fields are malformed or out of their range."""
    check_key("limit.key", limit.key)
    for field, value, most in (
        ("concurrency", limit.concurrency, _MAX_CONCURRENCY),
        ("interval_us", limit.interval_us, _MAX_INTERVAL_US),
        ("burst", limit.burst, _MAX_BURST),
    ):
        if value > most:
            raise InvalidArgument(f"limit.{field}: at most {most}, not {value}")
    if limit.burst > 1 and not limit.interval_us:
        raise InvalidArgument("limit.burst: needs an interval")


def set_limit(limit: Limit) -> Operation[None]:
    """Declare a limit; without concurrency and interval, remove it."""
    arguments = (limit.key, limit.concurrency, limit.interval_us, max(1, limit.burst))
    return Operation("limit", COUNTING_SHARD, arguments, lambda _: None, patient=False)


def read_limits() -> Operation[list[Limit]]:
    """Return the declared limits, by key."""

    def outcome(reply: list[bytes]) -> list[Limit]:
        rows = (reply[at : at + 5] for at in range(0, len(reply), 5))
        limits = [
            Limit(
                key=key.decode(),
                concurrency=int(concurrency),
                interval_us=int(interval),
                burst=int(burst) if int(interval) else 0,
                used=int(used),
            )
            for key, concurrency, interval, burst, used in rows
        ]
        return sorted(limits, key=lambda each: each.key)

    return Operation("limits", COUNTING_SHARD, (), outcome, patient=False)
