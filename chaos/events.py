"""The events suite: two publishers and four consumers of two groups on one Redis server, under faults.

The server writes its append-only file before it answers. With the faults of `KINDS`, each acknowledged event must reach
every group. A third of the seeds has the faults of `LOSSES` too, by which the server loses what it acknowledged; each
lost event must then be declared.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import redis
from sourcereview.v1.review_orki import REVIEW_FINDINGS

from chaos.checker import Report, check_events
from chaos.control import disturb
from chaos.history import History, read_history
from chaos.proxy import FaultProxy
from chaos.rig import RedisServer, Rig, free_port
from chaos.schedule import Fault, Kind
from orki_events import connect
from orki_events.connection import Connection, parse_address
from orki_events.entries import stream_keys
from orki_events.losses import read_gaps

_CONSUMERS = {"report-1": "report", "report-2": "report", "audit-1": "audit", "audit-2": "audit"}
_PUBLISHERS = ("publisher-1", "publisher-2")
_PROXIES = ("publishers", "consumers")
_INTERVAL = 0.05
_BATCH = 10
_NUMBER = re.compile(rb"#(\d+)#")

KINDS = {
    "kill_consumer": Kind(tuple(_CONSUMERS), 0.1, 0.8, 3),
    "pause_consumer": Kind(tuple(_CONSUMERS), 0.3, 2.0, 2),
    "kill_publisher": Kind(_PUBLISHERS, 0.1, 0.5),
    "pause_publisher": Kind(_PUBLISHERS, 0.3, 1.0),
    "kill_redis": Kind(("redis",), 0.1, 0.5, 2),
    "pause_redis": Kind(("redis",), 0.2, 1.0),
    "cut": Kind(_PROXIES, weight=3),
    "stall": Kind(_PROXIES, 0.2, 1.5),
    "delay": Kind(_PROXIES, 0.5, 1.5),
    "lose_replies": Kind(_PROXIES, 0.1, 0.4, 3),
    "kill_clients": Kind(("redis",), weight=2),
    "out_of_memory": Kind(("redis",), 0.1, 0.5, 2),
    "read_only": Kind(("redis",), 0.1, 0.5),
    "clock_forward": Kind(("redis",), 0.2, 2.0),
    "clock_back": Kind(("redis",), 0.2, 2.0),
    "destroy_group": Kind(tuple(set(_CONSUMERS.values()))),
}
LOSSES = {
    "flush": Kind(("redis",)),
    "roll_back": Kind(("redis",), 0.3, 2.0),
    "cut_file": Kind(("redis",)),
    "trim": Kind(("redis",)),
}
_CUT_BYTES = 20_000
_CLOCK_STEP = 60


class EventsSuite:
    """One run of the suite.

    Attributes:
        history_path: File that all actors append to.
    """

    name = "events"
    spacing = 0.5

    @staticmethod
    def kinds_of(seed: int) -> dict[str, Kind]:
        """Return the faults of a seed."""
        return KINDS | LOSSES if seed % 3 == 0 else KINDS

    def __init__(self, folder: Path, seed: int, length: float) -> None:
        """Start nothing yet; see `ControlSuite`."""
        self.history_path = folder / "history.jsonl"
        self._events = int((length + 2) / _INTERVAL) * _BATCH
        self._rig = Rig(folder)
        self._stack = AsyncExitStack()
        self._proxies: dict[str, FaultProxy] = {}
        self._history = History(self.history_path, "driver")
        self._lossy = seed % 3 == 0

    async def __aenter__(self) -> EventsSuite:
        self._stack.callback(self._history.close)
        await self._stack.enter_async_context(self._rig)
        self._redis: RedisServer = await asyncio.to_thread(self._rig.redis)
        for name in _PROXIES:
            self._proxies[name] = await self._stack.enter_async_context(FaultProxy(self._redis.port))
        self._history.add("groups", names=sorted(set(_CONSUMERS.values())), lossy=self._lossy)
        for name, group in _CONSUMERS.items():
            self._actor("consumer", name, "consumers", group=group)
        for number, name in enumerate(_PUBLISHERS):
            more = {"first": number * 1_000_000, "count": self._events, "batch": _BATCH, "interval": _INTERVAL}
            self._actor("publisher", name, "publishers", ends=True, **more)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _actor(self, role: str, name: str, proxy: str, *, ends: bool = False, **settings: Any) -> None:
        url = f"redis://127.0.0.1:{self._proxies[proxy].port}/0"
        settings = {"name": name, "history": str(self.history_path), "redis": url, **settings}
        self._rig.python(name, "chaos.actors", role, json.dumps(settings), ends=ends)

    async def inject(self, fault: Fault) -> None:
        """Inject one fault, keep it for its duration, and heal it."""
        proxy, process = self._proxies.get(fault.target), self._rig.processes.get(fault.target)
        if proxy is not None:
            await disturb(proxy, fault)
        elif fault.target == "redis" and not fault.kind.startswith(("kill_redis", "pause_")):
            await self._harm(fault)
        elif fault.kind == "destroy_group":
            await asyncio.to_thread(self._on_partitions, lambda redis, key: redis.xgroup_destroy(key, fault.target))
        elif fault.kind.startswith("kill_") and process is not None and process.running:
            await asyncio.to_thread(process.kill)
            await asyncio.sleep(fault.duration)
            await asyncio.to_thread(self._redis.start if fault.target == "redis" else process.start)
        elif process is not None:
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(fault.duration)
            process.signal(signal.SIGCONT)
        self._rig.check()

    async def _harm(self, fault: Fault) -> None:
        """Inject a fault inside the server, keep it for its duration, and heal it."""
        change: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
            "kill_clients": (("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal"), ()),
            "out_of_memory": (("CONFIG", "SET", "maxmemory", 1), ("CONFIG", "SET", "maxmemory", 0)),
            "read_only": (("REPLICAOF", "127.0.0.1", free_port()), ("REPLICAOF", "NO", "ONE")),
            "flush": (("FLUSHALL",), ()),
        }
        if fault.kind in change:
            begin, end = change[fault.kind]
            await asyncio.to_thread(self._execute, *begin)
            await asyncio.sleep(fault.duration)
            if end:
                await asyncio.to_thread(self._execute, *end)
        elif fault.kind.startswith("clock_"):
            self._redis.step_clock(_CLOCK_STEP if fault.kind == "clock_forward" else -_CLOCK_STEP)
            await asyncio.sleep(fault.duration)
            self._redis.step_clock(0)
        elif fault.kind == "trim":
            await asyncio.to_thread(self._on_partitions, lambda redis, key: redis.xtrim(key, 0, approximate=False))
        else:
            copy = await asyncio.to_thread(self._redis.copy_files)
            await asyncio.sleep(fault.duration)
            await asyncio.to_thread(self._redis.process.kill)
            if fault.kind == "roll_back":
                await asyncio.to_thread(self._redis.restore_files, copy)
            else:
                self._redis.cut_file(_CUT_BYTES)
            await asyncio.to_thread(self._redis.start)

    def _execute(self, *command: Any) -> Any:
        with self._redis.client as client:
            return client.execute_command(*command)

    def _on_partitions(self, change: Callable[[redis.Redis, str], object]) -> None:
        with self._redis.client as client:
            for key in stream_keys(REVIEW_FINDINGS.contract):
                with contextlib.suppress(redis.ResponseError):  # The key does not exist yet, or not any more.
                    change(client, key)

    async def settle(self) -> None:
        """Wait until the publishers are done and every group has taken all events, then record letters and ledger."""
        for proxy in self._proxies.values():
            proxy.heal()
        publishers = [self._rig.processes[name] for name in _PUBLISHERS]

        async def published() -> bool:
            return not any(each.running for each in publishers)

        await self._rig.until(published, "the publishers are done", 120)
        with contextlib.suppress(Exception):  # What is missing after the time limit is the checker's business.
            await self._rig.until(self._all_taken, "every group has taken every event", 90)
        await asyncio.to_thread(self._record_letters)
        url = f"redis://127.0.0.1:{self._redis.port}/0"
        async with connect(url) as events:
            ledger = (await events.ledger(REVIEW_FINDINGS)).dump()
        self._history.add("ledger", published=ledger["published"], groups=ledger["groups"])
        link = Connection(parse_address(url), name="chaos", connect_timeout=5.0, answer_timeout=10.0)
        try:
            for each in await read_gaps(link, REVIEW_FINDINGS.contract):
                kind, count = each.gap.kind.value, each.gap.count
                self._history.add("declared", group=each.gap.group, count=count, kind=kind)
        finally:
            await link.close()

    async def _all_taken(self) -> bool:
        await asyncio.to_thread(self._record_letters)
        return not check_events(read_history(self.history_path)).violations

    def _record_letters(self) -> None:
        """Record the numbers found in the dead letter streams, without the product's decoder."""
        known = {
            (each["group"], each["number"]) for each in read_history(self.history_path) if each["event"] == "letter"
        }
        with self._redis.client as client:
            for key in client.scan_iter(match="*review_findings*"):
                if client.type(key) != b"stream" or b"dead" not in key:
                    continue
                group = next(name for name in set(_CONSUMERS.values()) if name.encode() in key)
                entries: Any = client.xrange(key)
                for _, fields in entries:
                    if found := _NUMBER.search(b" ".join(fields.values())):
                        number = int(found[1])
                        if (group, number) not in known:
                            self._history.add("letter", group=group, number=number)

    def check(self) -> Report:
        """Check the history."""
        return check_events(read_history(self.history_path))
