"""What all connections of one bridge share: tools, limits, threads, and the bell that wakes the keeper."""

from __future__ import annotations

import contextlib
import socket
import threading
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

from orki_agent.hotpath._thread_pool import ThreadPool
from orki_agent.hotpath.frames import FIRST_TOOL_OPCODE
from orki_agent.hotpath.options import BridgeOptions
from orki_agent.hotpath.served import Call, ServedTool

if TYPE_CHECKING:
    from orki_agent.hotpath.connection import Connection

__all__ = ["AsyncHandlers", "Desk"]


class AsyncHandlers(Protocol):
    """Whatever runs async handlers."""

    def start(self, connection: Connection, call: Call, request: Any, context: Context) -> None:
        """Runs the handler; its answer goes to `connection.finish`."""


class Desk:
    """The shared part.

    Attributes:
        options: Limits.
        token: What a hello must bring.
        tools: By opcode.
        crew: Threads.
        connections: Those that live.
        longest_us: Longest time that a call may have, in microseconds.
        draining: Whether new calls are refused, as the bridge is about to stop.
        asleep: Whether the keeper sleeps for longer than it takes to notice a blocked handler; ring then.
    """

    def __init__(self, options: BridgeOptions, token: bytes, tools: dict[int, ServedTool]) -> None:
        self.options = options
        self.token = token
        self.tools = tools
        self.crew = ThreadPool("orki-tools")
        self.connections: set[Connection] = set()
        self.draining = False
        self.longest_us = int(options.call_timeout * 1_000_000)
        self.asleep = False
        self.async_handlers: AsyncHandlers | None = None
        self.bell, self._button = socket.socketpair()
        self.bell.setblocking(False)
        self._button.setblocking(False)
        self._lock = threading.Lock()
        self._blocked = 0

    @property
    def served(self) -> str:
        """The opcodes, for a message."""
        return ", ".join(f"{opcode:#06x} ({tool.name})" for opcode, tool in self._named())

    def _named(self) -> list[tuple[int, ServedTool]]:
        """The tools that users declared, the first of them."""
        return sorted((opcode, tool) for opcode, tool in self.tools.items() if opcode >= FIRST_TOOL_OPCODE)[:32]

    def poke(self) -> None:
        """Wakes the keeper."""
        self.asleep = False
        # A full pipe wakes it as well; a closed one has nobody to wake.
        with contextlib.suppress(OSError):
            self._button.send(b"\0")

    def detach(self) -> bool:
        """Takes one of the places for handlers that block; False when none is left."""
        with self._lock:
            if self._blocked >= self.options.max_blocked:
                return False
            self._blocked += 1
            return True

    def attach(self) -> None:
        """Gives the place back."""
        with self._lock:
            self._blocked -= 1

    def start_async(self, connection: Connection, call: Call, request: Any, context: Context) -> None:
        """Runs an async handler."""
        assert self.async_handlers is not None, "a bridge with async tools has a loop for them"
        self.async_handlers.start(connection, call, request, context)

    def forget(self, connection: Connection) -> None:
        """Takes a connection that has ended off the list."""
        self.connections.discard(connection)
        self.poke()

    def close(self) -> None:
        """Closes the bell."""
        self.bell.close()
        self._button.close()
