"""Formats durations, sizes, counts and sentences."""

from __future__ import annotations


def duration(microseconds: int) -> str:
    """Format a duration with about three digits: `417 µs`, `12.3 ms`, `3.02 s`, `4 min 10 s`, `2 h 5 min`."""
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


def size(count: int) -> str:
    """Format a number of bytes: `812 B`, `4.0 KiB`, `1.5 MiB`."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def counted(count: int, noun: str) -> str:
    """Format a count with its noun in the right number: `1 entry`, `2,000 entries`, `0 tasks`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def sentence(text: str) -> str:
    """Return `text` with exactly one full stop at its end."""
    return f"{text.rstrip().rstrip('.')}."
