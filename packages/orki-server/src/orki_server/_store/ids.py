"""Task ids: `t<shard>-` and 26 characters that sort by time, 48 bits of milliseconds and 80 random ones."""

from __future__ import annotations

import os
import re
import time
import zlib
from typing import Final

from orki_contract.errors import UnknownTask

# Crockford's base 32, in lower case: no letter that is taken for a digit.
_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TASK_ID: Final = re.compile(rf"t(0|[1-9][0-9]{{0,3}})-[{_DIGITS}]{{26}}")


def new_task_id(shard: int) -> str:
    """A new id for a task of that shard."""
    number = int(time.time() * 1000) << 80 | int.from_bytes(os.urandom(10))
    return f"t{shard}-" + "".join(_DIGITS[number >> place & 31] for place in range(125, -1, -5))


def shard_of(task_id: str) -> int:
    """The shard that a task's id names.

    Raises:
        UnknownTask: It is no task id.
    """
    matched = _TASK_ID.fullmatch(task_id)
    if not matched:
        raise UnknownTask(f"there is no task {task_id[:64]!r}")
    return int(matched[1])


def shard_of_key(idempotency_key: str, shards: int) -> int:
    """The shard for tasks with that idempotency key: the key and its task lie on one shard."""
    return zlib.crc32(idempotency_key.encode()) % shards
