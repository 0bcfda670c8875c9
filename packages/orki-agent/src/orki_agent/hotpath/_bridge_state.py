"""The state that all connections of a bridge share."""

from __future__ import annotations

import contextlib
import socket
import threading

from orki_agent.hotpath._handlers import HandlerLoop, ToolHandler
from orki_agent.hotpath._options import BridgeOptions
from orki_agent.hotpath._thread_pool import ThreadPool


class BridgeState:
    """The state that the connections of a bridge share.

    Attributes:
        options: Limits.
        token: The token that a hello must carry.
        tools: Handlers by opcode.
        pool: Threads that read connections, run blocking handlers and finish writes.
        handler_loop: Runs async handlers; None if there are none.
        max_timeout_us: Longest timeout of a call in microseconds.
        draining: Whether the bridge is stopping.
        blocked: Number of blocking handlers that run in threads of their own.
        changed: Notified when a connection closes and, while draining, when a call ends.
        monitor_asleep: Whether the monitor has to be woken to notice a new call in time.
        wakeup: Becomes readable when the monitor has to wake.
    """

    def __init__(self, options: BridgeOptions, token: bytes, tools: dict[int, ToolHandler]) -> None:
        self.options = options
        self.token = token
        self.tools = tools
        self.pool = ThreadPool("orki-tools")
        self.handler_loop: HandlerLoop | None = None
        self.max_timeout_us = int(options.call_timeout * 1_000_000)
        self.draining = False
        self.blocked = 0
        self.changed = threading.Condition()
        self.monitor_asleep = False
        self.wakeup, self._wake = socket.socketpair()
        self.wakeup.setblocking(False)
        self._wake.setblocking(False)
        self._lock = threading.Lock()

    def wake_monitor(self) -> None:
        """Wake the monitor."""
        self.monitor_asleep = False
        # A full pipe wakes the monitor as well; after `close` there is none.
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def notify(self) -> None:
        """Wake a thread that waits for calls or connections to end."""
        with self.changed:
            self.changed.notify_all()

    def acquire_thread(self) -> bool:
        """Reserve a thread for a blocking handler; return False if `max_blocked` are in use."""
        with self._lock:
            if self.blocked >= self.options.max_blocked:
                return False
            self.blocked += 1
            return True

    def release_thread(self) -> None:
        """Return a reserved thread."""
        with self._lock:
            self.blocked -= 1

    def close(self) -> None:
        """Close the wake-up sockets."""
        self.wakeup.close()
        self._wake.close()
