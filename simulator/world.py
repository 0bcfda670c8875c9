"""A virtual clock, and simulated processes that share it.

Each process has an event loop of its own. The world runs one step of one loop, or delivers one message, at a time, in
the order of the virtual time, and the clock jumps from one to the next. So a killed process stops at once, without
running its `finally` blocks, and a paused one runs nothing until it continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

from orki_contract.errors import OrkiError

_EPOCH: Final = 1_700_000_000.0
"""Wall-clock time at the start of each run, so that ids and fences are the same in each replay."""
_START: Final = 1_000.0
_TURNS: Final = 20
"""Turns of a loop without a pause: a process computes faster than messages travel."""


class _Selector:
    """A selector without files: a simulated loop never waits for one."""

    def select(self, timeout: float | None = None) -> list[Any]:
        return []

    def get_map(self) -> dict[Any, Any]:
        return {}

    def close(self) -> None:
        pass


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__(_Selector())  # type: ignore[arg-type]

    def time(self) -> float:
        return self._world.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        # A thread would run in real time.
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _make_self_pipe(self) -> None:
        pass

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class Process:
    """A simulated process.

    Attributes:
        name: Its name.
        alive: Whether it was not killed.
        paused: Whether it runs nothing for now.
    """

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.loop: Any = _Loop(world)
        self.loop.set_exception_handler(self._failed)
        self._world = world
        self._task: asyncio.Task[Any] | None = None

    def start(self, main: Coroutine[Any, Any, Any]) -> None:
        """Start the process's main coroutine. Its failure is a violation."""
        self._task = self.loop.create_task(main, name=self.name)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._world.failed(f"{self.name} ended with {type(error).__name__}: {error}", error)

    def _failed(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.alive:
            return  # Python collects what a killed process has left.
        if isinstance(error, OrkiError):
            return  # Nobody waited any more for a typed error.
        self._world.failed(f"{self.name}: {context['message']}: {error}", error)

    @property
    def ended(self) -> bool:
        """Whether the main coroutine has ended."""
        return self._task is not None and self._task.done()

    def due(self) -> float | None:
        """Return the time of the next step; None if there is none."""
        if self.loop._ready:
            return self._world.now
        scheduled = self.loop._scheduled
        while scheduled and scheduled[0]._cancelled:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            self.loop._timer_cancelled_count = max(0, self.loop._timer_cancelled_count - 1)
        return scheduled[0]._when if scheduled else None

    def step(self) -> None:
        """Run what is ready, and what that makes ready at once."""
        self._world.current = self
        asyncio._set_running_loop(self.loop)
        try:
            self.loop._run_once()
            turns = 0
            while self.loop._ready and turns < _TURNS:
                self.loop._run_once()
                turns += 1
        finally:
            asyncio._set_running_loop(None)
            self._world.current = None

    def call(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Run a callback in the process, unless it was killed."""
        if self.alive:
            self.loop.call_soon(callback, *arguments)

    def kill(self) -> None:
        """Stop for good, at this instant."""
        self.alive = False


class World:
    """The clock, the processes and the messages under way.

    Attributes:
        now: Monotonic virtual time in seconds.
        chance: Source of all randomness of the run.
        current: The process that runs now.
        problems: Failures of parts of the product, as sentences.
        steps: Number of steps so far.
    """

    def __init__(self, seed: int) -> None:
        self.now = _START
        self.chance = random.Random(seed)
        self.current: Process | None = None
        self.problems: list[str] = []
        self.steps = 0
        self._processes: list[Process] = []
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0

    def process(self, name: str) -> Process:
        """Create a process."""
        process = Process(self, name)
        self._processes.append(process)
        return process

    def call_at(self, when: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Run a callback outside all processes."""
        self._number += 1
        heapq.heappush(self._events, (max(when, self.now), self._number, callback, arguments))

    def failed(self, problem: str, error: BaseException | None) -> None:
        """Record a failure of the product."""
        if self.current is not None and not self.current.alive:
            return
        self.problems.append(problem)

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Run until a time, or until `done` returns true, which is returned."""
        while not done():
            best: Process | None = None
            best_at = self._events[0][0] if self._events else until + 1
            for process in self._processes:
                if process.alive and not process.paused:
                    due = process.due()
                    # The order of what happens at the same time is drawn.
                    if due is not None and (due < best_at or (due == best_at and self.chance.random() < 0.5)):
                        best, best_at = process, due
            if best_at > until:
                self.now = until
                return False
            self.now = max(self.now, best_at)
            self.steps += 1
            if best is not None:
                best.step()
            else:
                _, _, callback, arguments = heapq.heappop(self._events)
                callback(*arguments)
        return True

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Let the product see the virtual clock and the run's randomness."""
        wall = _EPOCH - _START
        state = random.getstate()
        random.seed(self.chance.getrandbits(64))

        def monotonic() -> float:
            return self.now

        def wall_clock() -> float:
            return self.now + wall

        with (
            mock.patch.object(time, "monotonic", monotonic),
            mock.patch.object(time, "time", wall_clock),
            mock.patch.object(time, "time_ns", lambda *, clock=wall_clock: int(clock() * 1e9)),
            mock.patch.object(os, "urandom", self.chance.randbytes),
        ):
            try:
                yield
            finally:
                random.setstate(state)

    def close(self) -> None:
        """End all processes; what they still do has no effect."""
        for process in self._processes:
            process.alive = False
        for process in self._processes:
            asyncio._set_running_loop(process.loop)
            for task in asyncio.all_tasks(process.loop):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                # A coroutine that awaits in a `finally` block refuses to be closed; nobody runs it any more.
                with contextlib.suppress(BaseException):
                    task.get_coro().close()
            asyncio._set_running_loop(None)
            process.loop._ready.clear()
            process.loop._scheduled.clear()
            process.loop.close()
        self._processes.clear()
        self._events.clear()
