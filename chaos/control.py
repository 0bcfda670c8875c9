"""The control suite: two orchestrators, three agents and two submitters on one Redis server, under faults.

The seed decides the server's append-only file and the declared durability (`_SERVERS`). Acknowledged tasks survive a
kill of the server unless it has no file. Faults last less than a lease, apart from killed agents, whose tasks another
agent takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sourcereview.v1.review_pb2 import ReviewFileResponse

from chaos.checker import Report, check_charges, check_control
from chaos.history import History, read_history
from chaos.proxy import FaultProxy
from chaos.rig import Log, RedisServer, Rig, free_port
from chaos.schedule import Fault, Kind
from orki.control.v1.attempt_pb2 import Failure, TaskState
from orki.errors.v1.errors_pb2 import Reason
from orki_contract.errors import OrkiError, UnknownTask
from orki_control import Client, ClientOptions

_AGENTS = ("agent-1", "agent-2", "agent-3")
_ORCHESTRATORS = ("orchestrator-1", "orchestrator-2")
_SUBMITTERS = ("submitter-1", "submitter-2")
_INTERVAL = 0.05
_SERVERS = (
    (Log.ALWAYS, "memory"),
    (Log.EVERYSEC, "fsync"),
    (Log.ALWAYS, "fsync"),
    (Log.NONE, "memory"),
)
_CLOCK_STEP = 60
_TERMINAL = (TaskState.TASK_STATE_SUCCEEDED, TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_CANCELLED)

KINDS = {
    "kill_agent": Kind(_AGENTS, 0.2, 1.0, 2),
    "pause_agent": Kind(_AGENTS, 0.3, 1.5),
    "kill_orchestrator": Kind(_ORCHESTRATORS, 0.1, 0.8, 2),
    "pause_orchestrator": Kind(_ORCHESTRATORS, 0.2, 1.0),
    "kill_redis": Kind(("redis",), 0.1, 0.5, 2),
    "pause_redis": Kind(("redis",), 0.2, 1.0),
    "cut": Kind(("agents", "submitters", "store-1", "store-2"), weight=3),
    "stall": Kind(("agents", "submitters", "store-1", "store-2"), 0.2, 1.0),
    "delay": Kind(("agents", "submitters", "store-1", "store-2"), 0.5, 1.5),
    "lose_replies": Kind(("store-1", "store-2"), 0.1, 0.4, 2),
    "half_open": Kind(("agents", "submitters", "store-1", "store-2"), weight=2),
    "clock_forward": Kind(("redis",), 0.2, 2.0),
    "clock_back": Kind(("redis",), 0.2, 2.0),
}


class ControlSuite:
    """One run of the suite.

    Attributes:
        history_path: File that all actors append to.
    """

    name = "control"
    spacing = 0.6

    @staticmethod
    def kinds_of(seed: int) -> dict[str, Kind]:
        """Return the faults of a seed."""
        return KINDS

    def __init__(self, folder: Path, seed: int, length: float) -> None:
        """Start nothing yet.

        Args:
            folder: Directory for logs and the history.
            seed: Seed of the submitters' choices.
            length: Seconds that the load must last.
        """
        self.history_path = folder / "history.jsonl"
        self._seed = seed
        self._log, self._durability = _SERVERS[seed % len(_SERVERS)]
        self._tasks = int((length + 2) / _INTERVAL)
        self._rig = Rig(folder)
        self._stack = AsyncExitStack()
        self._proxies: dict[str, FaultProxy] = {}
        self._history = History(self.history_path, "driver")
        self._targets: dict[str, str] = {}

    async def __aenter__(self) -> ControlSuite:
        self._stack.callback(self._history.close)
        await self._stack.enter_async_context(self._rig)
        self._history.add("server", log=self._log.value, durability=self._durability)
        self._redis: RedisServer = await asyncio.to_thread(self._rig.redis, self._log)
        for number, name in enumerate(_ORCHESTRATORS, 1):
            store = await self._proxy(f"store-{number}", self._redis.port)
            listen = f"127.0.0.1:{free_port()}"
            self._targets[name] = listen
            self._rig.python(
                name,
                *("orki_server", "serve", "--listen", listen),
                ORKI_REDIS_URL=f"redis://127.0.0.1:{store.port}/0",
                ORKI_SHARDS="4",
                ORKI_DURABILITY=self._durability,
            )
        for name in _ORCHESTRATORS:
            await self._rig.until(partial(self._answers, name), f"{name} is ready", 40)
        ports = [int(target.rpartition(":")[2]) for target in self._targets.values()]
        agents, submitters = await self._proxy("agents", ports[0]), await self._proxy("submitters", ports[1])
        through_proxy = f"127.0.0.1:{agents.port}"
        for name, target in zip(_AGENTS, (through_proxy, self._targets["orchestrator-2"], through_proxy), strict=True):
            self._actor("agent", name, target=target)
        await self._rig.until(self._all_agents, "all agents have a session", 40)
        routes = (self._targets["orchestrator-1"], f"127.0.0.1:{submitters.port}")
        for name, target in zip(_SUBMITTERS, routes, strict=True):
            more = {"seed": self._seed, "count": self._tasks, "interval": _INTERVAL, "patience": 90.0}
            self._actor("submitter", name, ends=True, target=target, **more)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _proxy(self, name: str, port: int) -> FaultProxy:
        self._proxies[name] = await self._stack.enter_async_context(FaultProxy(port))
        return self._proxies[name]

    def _actor(self, role: str, name: str, *, ends: bool = False, **settings: Any) -> None:
        settings = {"name": name, "history": str(self.history_path), **settings}
        self._rig.python(name, "chaos.actors", role, json.dumps(settings), ends=ends)

    async def _answers(self, name: str) -> bool:
        with contextlib.suppress(OrkiError):
            async with Client(self._targets[name], ClientOptions(patience=0.0, call_timeout=2.0)) as orki:
                await orki.list_agents()
                return True
        return False

    async def _all_agents(self) -> bool:
        async with Client(self._targets["orchestrator-1"]) as orki:
            return {each.agent_id for each in await orki.list_agents() if each.connected} >= set(_AGENTS)

    async def inject(self, fault: Fault) -> None:
        """Inject one fault, keep it for its duration, and heal it."""
        proxy, process = self._proxies.get(fault.target), self._rig.processes.get(fault.target)
        if fault.kind.startswith("kill_") and process is not None:
            await asyncio.to_thread(process.kill)
            self._history.add("killed", name=fault.target)
            await asyncio.sleep(fault.duration)
            await asyncio.to_thread(self._redis.start if fault.target == "redis" else process.start)
            if fault.target in _ORCHESTRATORS:
                # An orchestrator that finds no store at its start exits, so the next fault waits for it.
                await self._rig.until(partial(self._answers, fault.target), f"{fault.target} is ready again", 40)
        elif fault.kind.startswith("pause_") and process is not None:
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(fault.duration)
            process.signal(signal.SIGCONT)
        elif fault.kind.startswith("clock_"):
            self._redis.step_clock(_CLOCK_STEP if fault.kind == "clock_forward" else -_CLOCK_STEP)
            await asyncio.sleep(fault.duration)
            self._redis.step_clock(0)
        elif proxy is not None:
            await disturb(proxy, fault)
        self._rig.check()

    async def settle(self) -> None:
        """Wait for the submitters, then read every acknowledged task through every orchestrator."""
        for proxy in self._proxies.values():
            proxy.heal()
        submitters = [self._rig.processes[name] for name in _SUBMITTERS]

        async def ended() -> bool:
            return not any(each.running for each in submitters)

        await self._rig.until(ended, "the submitters ended", 150)
        tasks = [each["task"] for each in read_history(self.history_path) if each["event"] == "submitted"]
        for name, target in self._targets.items():
            async with Client(target, ClientOptions(patience=60.0)) as orki:
                await asyncio.gather(*(self._record_final(orki, name, task) for task in tasks))

    async def _record_final(self, orki: Client, orchestrator: str, task: str) -> None:
        limit = time.monotonic() + 30
        try:
            while (snapshot := await orki.get(task)).state not in _TERMINAL and time.monotonic() < limit:
                await asyncio.sleep(0.1)
        except UnknownTask:
            return
        response = ReviewFileResponse.FromString(snapshot.response)
        outcome = {"attempt": response.attempt, "fence": response.fence, "lines": response.lines}
        state = TaskState.Name(snapshot.state).removeprefix("TASK_STATE_")
        failures = [*snapshot.earlier_failures, *([snapshot.failure] if snapshot.HasField("failure") else [])]
        reasons = list(map(_reason, failures))
        self._history.add("final", task=task, orchestrator=orchestrator, state=state, reasons=reasons, **outcome)

    def check(self) -> Report:
        """Check the history."""
        history = read_history(self.history_path)
        report = check_control(history)
        report.violations += check_charges(history)
        return report


def _reason(failure: Failure) -> str:
    """Return why an attempt ended. If nobody could hear its agent, it has the reason of a timer, and does not count."""
    if failure.message.startswith("the orchestrator of agent "):
        return "ABANDONED"
    return Reason.Name(failure.reason).removeprefix("REASON_")


async def disturb(proxy: FaultProxy, fault: Fault) -> None:
    """Inject a fault of a proxy, keep it for its duration, and heal it."""
    match fault.kind:
        case "cut":
            proxy.cut()
        case "half_open":
            proxy.abandon()
        case "stall":
            proxy.stall()
        case "delay":
            proxy.delay = 0.02
        case "lose_replies":
            proxy.lose_replies = True
        case _:
            raise ValueError(f"a proxy has no fault {fault.kind!r}")
    await asyncio.sleep(fault.duration)
    proxy.heal()
