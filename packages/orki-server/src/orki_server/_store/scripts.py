"""The store's Lua, put together from `lua/`, with names, states and reasons written in from where they are defined."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from orki.control.v1 import attempt_pb2
from orki.errors.v1.errors_pb2 import Reason
from orki_server import _keys as keys

EPOCH_STEP = 1 << 44
"""Distance between the first fences of two store epochs (attempt.proto: epoch in the high 20 bits of a fence)."""

_PARTS = ("task", "operations")
_STATES = ("QUEUED", "OFFERED", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED")
_REASONS = ("CANCELLED", "TOTAL_TIMEOUT", "OFFER_TIMEOUT", "ATTEMPT_TIMEOUT", "LEASE_EXPIRED", "STALLED")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script.

    Attributes:
        text: Its source.
        sha: SHA-1 of the source, by which Redis knows it.
    """

    text: str
    sha: str


def shard_script(retention_ms: int) -> Script:
    """The one script that applies a batch of transitions to a shard.

    Args:
        retention_ms: How long a finished task is kept.
    """
    lines = [f"local {name} = '{suffix}'" for name, suffix in keys.lua_names()]
    lines += [f"local {name} = '{attempt_pb2.TaskState.Value(f'TASK_STATE_{name}')}'" for name in _STATES]
    lines += [f"local REASON_{name} = '{Reason.Value(f'REASON_{name}')}'" for name in _REASONS]
    lines.append(f"local RETENTION = {retention_ms}")
    # A counter that begins at the clock: a store that lost all it had goes on above what it gave before.
    lines.append(f"local function FIRST_FENCE(now) return string.format('%.0f', {EPOCH_STEP} + now) end")
    folder = files("orki_server._store") / "lua"
    text = "\n".join([*lines, *((folder / f"{part}.lua").read_text(encoding="utf-8") for part in _PARTS)])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
