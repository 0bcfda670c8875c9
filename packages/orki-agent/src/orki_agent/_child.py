"""A child process that runs blocking handlers; `_subprocess` starts it.

Both ends exchange tuples over a `multiprocessing` connection. The agent sends `run`, `cancel`, `direct`, `grant` and
`reply`; the child sends `ready` once, and for each attempt any number of `cast` and `call`, then `ended`.
"""

from __future__ import annotations

import fcntl
import logging
import logging.handlers
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final, NoReturn, TypeVar

from google.protobuf.message import Message

from orki.control.v1.attempt_pb2 import Budget
from orki_agent._handlers import SyncExecution
from orki_agent._outcomes import name_of, text_of
from orki_agent._services import Handler, Offered, OnStored, find_handlers
from orki_agent._settings import ToolsAt
from orki_agent._tools import ToolAccess
from orki_contract import EventStream, SyncToolChannel
from orki_contract.errors import OrkiError
from orki_contract.trace import Span
from orki_control.session import AttemptKey, Outcome

E = TypeVar("E", bound=Message)

_FLUSH_AFTER: Final = 0.02
_F_SETSIG: Final = getattr(fcntl, "F_SETSIG", 10) if sys.platform == "linux" else None
"""Python 3.11 lacks the name; the number is that of Linux's `fcntl.h`."""


def main(connection: Connection, life: Connection, service: bytes, agent_id: str, level: int) -> None:
    """Run handlers until the agent ends.

    Args:
        connection: The agent's messages.
        life: The read end of a pipe whose write end only the agent has.
        service: The pickled service.
        agent_id: The agent's name in the fleet.
        level: Level of the agent's root logger.
    """
    os.setsid()
    os.set_inheritable(connection.fileno(), False)
    end_with_agent(life)
    child = Child(connection, agent_id)
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(_LogHandler(child.send))
    try:
        handlers = find_handlers((pickle.loads(service),))
    except BaseException as error:
        connection.send(("refused", f"{name_of(type(error))}: {text_of(error)}"))
        return
    child.run(handlers)


def end_with_agent(life: Connection) -> None:
    """Let the kernel kill this process group when the agent ends, even while native code holds the interpreter lock.

    Without `F_SETSIG`, which only Linux has, the thread that reads the connection kills the group at its end.
    """
    if _F_SETSIG is not None:
        fcntl.fcntl(life.fileno(), fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life.fileno(), _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life.fileno(), fcntl.F_SETFL, fcntl.fcntl(life.fileno(), fcntl.F_GETFL) | os.O_ASYNC)


def _end_group() -> NoReturn:
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise SystemExit(1)  # The signal arrives before.


class _LogHandler(logging.handlers.QueueHandler):
    """Sends log records to the agent's process, which has the user's logging configuration."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self._send("log", record)


class Child:
    """The child's end of the connection; implements `AgentServices` for blocking handlers.

    Args:
        connection: The agent's messages.
        agent_id: The agent's name in the fleet.

    Attributes:
        agent_id: The agent's name in the fleet.
        max_payload_bytes: Maximum payload size that the orchestrator accepts.
    """

    def __init__(self, connection: Connection, agent_id: str) -> None:
        self.agent_id = agent_id
        self.max_payload_bytes = 0
        self._connection = connection
        self._sending = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._execution: SyncExecution | None = None
        self._calls: dict[int, Future[Any]] = {}
        self._tools: ToolAccess | None = None

    def run(self, handlers: Mapping[str, Handler]) -> None:
        """Run attempts one after another. The handlers run in the main thread."""
        self._handlers = handlers
        self.send("ready")
        threading.Thread(target=self._read, name="orki-child", daemon=True).start()
        while True:
            self._jobs.get()()

    def send(self, *message: Any) -> None:
        """Send a message from any thread. What cannot be pickled raises, and nothing is sent."""
        with self._sending:
            self._connection.send(message)

    # --- Messages of the agent. ---

    def _read(self) -> None:
        try:
            while True:
                match self._connection.recv():
                    case ("run", offered, name, window, max_payload_bytes):
                        self.max_payload_bytes = max_payload_bytes
                        self._start(offered, self._handlers[name], window)
                    case ("reply", number, value):
                        self._reply(self._calls.pop(number), value)
                    case (what, *arguments):
                        # A late message for an attempt that has ended has no effect.
                        if (execution := self._execution) is not None:
                            getattr(execution, what)(*arguments)
        finally:
            _end_group()

    def _start(self, offered: Offered, handler: Handler, window: int) -> None:
        def ended(outcome: Outcome) -> None:
            if self._tools is not None:
                self._tools.flush()
            self._execution = None
            self.send("ended", outcome)

        main_thread: Any = self
        self._execution = SyncExecution(offered, handler, self, ended, main_thread, window)
        self._execution.start()

    def start(self, job: Callable[[], None]) -> None:
        """Run a job in the main thread; the execution's thread pool."""
        self._jobs.put(job)

    @staticmethod
    def _reply(call: Future[Any], value: Any) -> None:
        if isinstance(value, BaseException):
            call.set_exception(value)
        else:
            call.set_result(value)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a method of the agent and return its result."""
        call: Future[Any] = Future()
        number = id(call)
        self._calls[number] = call
        try:
            self.send("call", number, name, arguments)
        except BaseException:
            del self._calls[number]
            raise
        return call.result()

    # --- The agent, as the handler's context sees it. ---

    def send_progress(self, attempt: AttemptKey, payload: bytes) -> None:
        """Queue progress."""
        self.send("cast", "send_progress", (attempt, payload))

    def report_usage(self, attempt: AttemptKey, total: Budget) -> None:
        """Report the usage of an attempt in all."""
        self.send("cast", "report_usage", (attempt, total))

    def save_checkpoint(self, attempt: AttemptKey, payload: bytes, on_stored: OnStored) -> None:
        """Send a checkpoint, and block until it is stored."""
        try:
            self.store_checkpoint(attempt, payload)
        except OrkiError as error:
            on_stored(error)
        else:
            on_stored(None)

    def store_checkpoint(self, attempt: AttemptKey, payload: bytes) -> None:
        """Send a checkpoint, and block until it is stored."""
        self._call("store_checkpoint", attempt, payload)

    def collect(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish soon."""
        self.send("cast", "collect", (stream, event, span))

    def publish_blocking(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Publish, and block until the server has the event."""
        self._call("publish_blocking", stream, event, span)

    def tools_at(self) -> ToolsAt:
        """Return the tool bridge of the agent."""
        found: ToolsAt = self._call("tools_at")
        return found

    def sync_tool_channel(self) -> SyncToolChannel:
        """Return the channel for blocking tool calls. This process has its own connections to the bridge."""
        if self._tools is None:
            self._tools = ToolAccess((), self.tools_at(), self.agent_id, self.collect)
            self._tools.start(self._flush_soon)
        return self._tools.sync_channel()

    def _flush_soon(self, _: Callable[[], None]) -> None:
        assert self._tools is not None
        timer = threading.Timer(_FLUSH_AFTER, self._tools.flush)
        timer.daemon = True
        timer.start()

    async def publish(self, stream: EventStream[E, Any], event: E, span: Span) -> None:
        """Raise; a child runs blocking handlers only."""
        raise NotImplementedError

    def tool_channel(self) -> Any:
        """Raise; a child runs blocking handlers only."""
        raise NotImplementedError

    def task_channel(self) -> Any:
        """Raise; a child runs blocking handlers only."""
        raise NotImplementedError
