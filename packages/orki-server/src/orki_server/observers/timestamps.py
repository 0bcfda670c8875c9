"""Times as audit lines and commands show them."""

from __future__ import annotations

__all__ = ["time_text"]

from datetime import UTC, datetime


def time_text(time_us: int) -> str:
    """RFC 3339 in UTC to the microsecond; the bare number where no calendar has that time."""
    try:
        seconds, rest = divmod(time_us, 1_000_000)
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:06d}Z"
    except (OverflowError, ValueError, OSError):
        return f"{time_us} µs"
