"""Handlers in child processes, which end even if native code ignores a cancel or holds the interpreter lock.

An attempt borrows an idle child, or starts one. A child that was killed or has crashed is replaced by the next attempt.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, ClassVar, Final

from orki.control.v1.session_pb2 import BudgetUpdate
from orki_agent import _child
from orki_agent._execution import Execution
from orki_agent._services import AgentServices, Handler, Offered, Subprocess
from orki_agent.hotpath._thread_pool import ThreadPool
from orki_contract.errors import Cancelled, HandlerFailed, InvalidSetting, OrkiError
from orki_control.session import Outcome

_log = logging.getLogger("orki.agent")

_STARTED_WITHIN: Final = 60.0
"""Seconds for a child to import the service."""
_REAPED_WITHIN: Final = 5.0
_WRITTEN_WITHIN: Final = 1.0
_CASTS: Final = frozenset({"send_progress", "report_usage", "collect"})
_CALLS: Final = frozenset({"publish_blocking", "store_checkpoint", "tools_at"})
_context = multiprocessing.get_context("spawn")
# `Process.start` changes state of the module `multiprocessing` without a lock.
_starting: Final = threading.Lock()


class ChildProcess:
    """One child process.

    Args:
        subprocess: The service that it runs.
        agent_id: The agent's name in the fleet.

    Raises:
        HandlerFailed: The process cannot be started, or cannot load the service.
    """

    def __init__(self, subprocess: Subprocess, agent_id: str) -> None:
        self.subprocess = subprocess
        self.connection, theirs = _context.Pipe()
        life, self._life = _context.Pipe(duplex=False)
        level = logging.getLogger().getEffectiveLevel()
        self._process: SpawnProcess = _context.Process(
            target=_child.main, args=(theirs, life, subprocess.pickled, agent_id, level), name="orki-child"
        )
        try:
            with _starting:
                self._process.start()
        except OSError as error:
            self._close()
            raise HandlerFailed(f"the handler's process cannot be started: {error}") from None
        finally:
            theirs.close()
            life.close()
        text = f"it did not answer within {_STARTED_WITHIN:.0f} s"
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll(_STARTED_WITHIN):
                match self.connection.recv():
                    case ("ready",):
                        return
                    case ("refused", text):
                        break
                    case ("log", record):
                        _relog(record)
        end = self.end()
        raise HandlerFailed(f"the handler's process cannot load {subprocess}: {text} ({end})")

    @property
    def usable(self) -> bool:
        """Whether the process can run an attempt."""
        # An idle child sends nothing: readable means that it has ended.
        return not self.connection.poll(0)

    def kill(self) -> None:
        """Kill the process and the programs that it has started. Thread-safe; the process is not reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            assert self._process.pid is not None
            # The group does not exist before the child's first instructions.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def end(self) -> str:
        """Kill and reap the process. Return how it ended, for messages."""
        self._process.join(0)
        code = self._process.exitcode
        self.kill()
        self._process.join(_REAPED_WITHIN)
        if code is None:
            code = self._process.exitcode
        self._close()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}" if -code in signal.valid_signals() else f"signal {-code}"
        return f"exit code {code}"

    def _close(self) -> None:
        self.connection.close()
        self._life.close()


class ChildPool:
    """The child processes of one agent.

    Args:
        agent_id: The agent's name in the fleet.
    """

    def __init__(self, agent_id: str) -> None:
        self._agent_id = agent_id
        self._lock = threading.Lock()
        self._idle: list[ChildProcess] = []
        self._busy: set[ChildProcess] = set()
        self._closed = False

    def check(self, handlers: list[Handler]) -> None:
        """Start one child for each service. Blocks until all have loaded their service.

        Raises:
            InvalidSetting: A child cannot load its service.
        """
        for subprocess in {each.subprocess: None for each in handlers if each.subprocess is not None}:
            try:
                self.give_back(self.take(subprocess))
            except HandlerFailed as error:
                raise InvalidSetting(error.message) from None

    def take(self, subprocess: Subprocess) -> ChildProcess:
        """Return an idle child, or a new one.

        Raises:
            HandlerFailed: The process cannot be started, or cannot load the service.
        """
        while (child := self._take_idle(subprocess)) is not None:
            if child.usable:
                return child
            self.discard(child)
        child = ChildProcess(subprocess, self._agent_id)
        with self._lock:
            self._busy.add(child)
            closed = self._closed
        if closed:
            self.discard(child)
            raise HandlerFailed("the agent stops")
        return child

    def _take_idle(self, subprocess: Subprocess) -> ChildProcess | None:
        with self._lock:
            for child in self._idle:
                if child.subprocess is subprocess:
                    self._idle.remove(child)
                    self._busy.add(child)
                    return child
        return None

    def give_back(self, child: ChildProcess) -> None:
        """Keep a child for another attempt."""
        with self._lock:
            self._busy.discard(child)
            if not self._closed:
                self._idle.append(child)
                return
        child.end()

    def discard(self, child: ChildProcess) -> str:
        """Kill and reap a child; return how it ended."""
        with self._lock:
            self._busy.discard(child)
        return child.end()

    def close(self) -> None:
        """Kill every child."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for child in idle:
            child.end()
        for child in busy:
            child.kill()  # Its attempt's thread reaps it.


class ProcessExecution(Execution):
    """A blocking handler in a child process. A second cancel kills the process.

    Args:
        on_end: Called in a thread of `pool` with the outcome.
        pool: Threads that read and write the child's connection.
        children: The child processes.
        window: Maximum number of progress messages that are not stored.
    """

    # A killed process always ends; only a busy machine makes that slow.
    ends_within: ClassVar[float] = 5.0

    def __init__(
        self,
        offered: Offered,
        handler: Handler,
        agent: AgentServices,
        on_end: Callable[[Outcome], None],
        pool: ThreadPool,
        children: ChildPool,
        window: int,
    ) -> None:
        super().__init__(offered, handler, agent, on_end)
        self._pool = pool
        self._children = children
        self._window = window
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None
        self._killed = False
        self._commands: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._written = threading.Event()

    def start(self) -> None:
        self._pool.start(self._work)

    def cancel(self) -> None:
        self.cancelled = True
        self._commands.put(("cancel",))

    def stop(self) -> None:
        self.cancelled = True
        with self._lock:
            self._killed = True
            if self._child is not None:
                _log.warning("%s of %s does not end after its cancel; its process is killed", *self._named)
                self._child.kill()

    def direct(self, payload: bytes) -> None:
        self._commands.put(("direct", payload))

    def update_budgets(self, update: BudgetUpdate) -> None:
        self._commands.put(("update_budgets", update))

    def grant(self, count: int, size: int) -> None:
        self._commands.put(("grant", count, size))

    @property
    def _named(self) -> tuple[object, str]:
        return self.offered.attempt, self.handler.name

    # --- In threads of the pool. ---

    def _work(self) -> None:
        subprocess = self.handler.subprocess
        assert subprocess is not None
        try:
            if self.cancelled:
                raise Cancelled("cancelled before it started")
            child = self._children.take(subprocess)
        except OrkiError as error:
            self.finish(None, error)
            return
        with self._lock:
            self._child = child
            if self._killed:
                child.kill()
        outcome = self._run(child.connection)
        with self._lock:
            self._child = None
        self._commands.put(None)
        if outcome is not None and self._written.wait(_WRITTEN_WITHIN):
            self._children.give_back(child)
        else:
            end = self._children.discard(child)
            if outcome is None:
                text = "the handler's process was killed" if self._killed else f"the handler's process ended: {end}"
                self.finish(None, Cancelled(text) if self._killed else HandlerFailed(text))
                return
        self.ended = True
        self._on_end(outcome)

    def _run(self, connection: Connection) -> Outcome | None:
        """Run the attempt in the child; return None if the child ended before its handler."""
        try:
            connection.send(("run", self.offered, self.handler.name, self._window, self.agent.max_payload_bytes))
            self._pool.start(lambda: self._write(connection))
            while True:
                match connection.recv():
                    case ("ended", outcome):
                        return outcome  # type: ignore[no-any-return]
                    case ("cast", name, arguments) if name in _CASTS:
                        getattr(self.agent, name)(*arguments)
                    case ("call", number, name, arguments) if name in _CALLS:
                        self._pool.start(lambda c=(number, name, arguments): self._call(*c))  # type: ignore[misc]
                    case ("log", record):
                        _relog(record)
        except (EOFError, OSError):
            return None
        except Exception:
            # A handler that writes to the descriptor of the connection can break it in any way.
            _log.exception("%s of %s: its process sent what cannot be read", *self._named)
            return None

    def _call(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            value = getattr(self.agent, name)(*arguments)
        except Exception as error:
            value = error
        self._commands.put(("reply", number, value))

    def _write(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            while (command := self._commands.get()) is not None:
                connection.send(command)
        self._written.set()


def _relog(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
