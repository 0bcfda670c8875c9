"""How times, sizes and counts look in tables and trees."""

from __future__ import annotations

__all__ = ["age", "duration", "offset", "size"]


def duration(microseconds: int) -> str:
    """A length of time with its unit, three digits or so: `417 µs`, `12.3 ms`, `3.02 s`, `4 min 10 s`, `2 h 5 min`."""
    if microseconds < 1_000:
        return f"{microseconds} µs"
    if microseconds < 1_000_000:
        return f"{microseconds / 1_000:.3g} ms" if microseconds < 999_500 else "1 s"
    seconds = microseconds / 1_000_000
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 59.95 else "1 min"
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole} s" if whole else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def offset(microseconds: int) -> str:
    """A time relative to another, in seconds to the millisecond: `+0.003 s`."""
    return f"{microseconds / 1_000_000:+,.3f} s"


def age(since_us: int, now_us: int) -> str:
    """How long ago; a dash for what never was."""
    return duration(max(0, now_us - since_us)) if since_us > 0 else "-"


def size(count: int) -> str:
    """Bytes: `812 B`, `4.0 KiB`, `1.5 MiB`."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
