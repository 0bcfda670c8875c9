"""`ToolBridge`: serves tools to agents on the same host."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from math import inf
from typing import Final, Self

from orki_agent.hotpath._connection import BridgeState, Connection
from orki_agent.hotpath._handlers import HandlerLoop, handlers_of
from orki_agent.hotpath._handshake import TOKEN_BYTES, contract_handler
from orki_agent.hotpath._machine import BridgeStopped
from orki_agent.hotpath._options import BridgeOptions
from orki_agent.hotpath._platform import SYSTEM, Platform, SocketPath, after_fork
from orki_agent.hotpath.frames import OP_CONTRACT, encode_error
from orki_contract import AsyncToolService, SyncToolService
from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError, Overloaded, ToolCancelled

_BACKLOG: Final = 128
_TICK: Final = 0.005
"""Seconds between ticks of connections in use, and so the precision of deadlines and of noticing a blocked handler."""
_QUIET_AFTER: Final = 0.5
"""Seconds without a quick call after which the monitor sleeps and calls have to wake it."""
_PAUSE: Final = 0.05
_CLOSE_TIMEOUT: Final = 1.0

_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger("orki_agent.hotpath")


class ToolBridge:
    """Serves tool services on a Unix socket, from threads of its own.

    Sync handlers run in threads, async handlers on an event loop of the bridge. A handler that blocks does not delay
    other calls. After a call's deadline the caller gets an error, and the handler learns of it by `call.cancelled` or
    `asyncio.CancelledError`.

    Example:
        with ToolBridge(SourceTools()) as bridge:
            client = SyncToolClient(bridge.path, bridge.token, name="reviewer")
    """

    def __init__(
        self,
        *services: AsyncToolService | SyncToolService,
        path: str | os.PathLike[str] | None = None,
        token: bytes | None = None,
        options: BridgeOptions | None = None,
        platform: Platform = SYSTEM,
    ) -> None:
        """Describe a bridge; `start` opens it.

        Args:
            services: Instances of classes derived from generated bases.
            path: The socket's path in a folder of mode 0700; None for a new temporary folder.
            token: Secret of 32 bytes that clients must send; None for a new one.
            options: Limits.
            platform: System calls.

        Raises:
            InvalidSetting: There is no service, two tools have one opcode, or the token has the wrong length.
        """
        if token is not None and len(token) != TOKEN_BYTES:
            raise InvalidSetting(f"the token has {len(token)} bytes, it must have {TOKEN_BYTES}")
        handlers = handlers_of(services)
        self._tools = {OP_CONTRACT: contract_handler(handlers.values()), **handlers}
        self._wanted_path = path
        self._options = options or BridgeOptions()
        self._platform = platform
        self._token = token or secrets.token_bytes(TOKEN_BYTES)
        self._running: _RunningBridge | None = None

    @property
    def path(self) -> str:
        """The socket's path.

        Raises:
            LocalProtocolError: The bridge is not running.
        """
        if self._running is None:
            raise LocalProtocolError("the bridge is not running: use it in a `with` block, or call start()")
        return self._running.path.path

    @property
    def token(self) -> bytes:
        """The secret that clients must send. Do not pass it on a command line."""
        return self._token

    def start(self) -> Self:
        """Open the socket.

        Raises:
            SocketUnsafe: The folder or the path is unsafe, or another bridge serves the path.
            InvalidSetting: The path is too long.
            LocalProtocolError: The bridge is already running.
        """
        if self._running is not None:
            raise LocalProtocolError("the bridge is already running")
        path = SocketPath(self._wanted_path, platform=self._platform)
        try:
            self._running = _RunningBridge(path, BridgeState(self._options, self._token, self._tools), self._platform)
        except BaseException:
            path.release()
            raise
        after_fork(self)
        return self

    def stop(self) -> None:
        """Refuse new calls, wait up to `stop_timeout` for running ones, cancel the rest and close. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()

    def after_fork(self) -> None:
        """Close the descriptors of the parent's bridge in a forked child."""
        running, self._running = self._running, None
        if running is not None:
            running.close_descriptors()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class _RunningBridge:
    def __init__(self, path: SocketPath, state: BridgeState, platform: Platform) -> None:
        self.path = path
        self.state = state
        try:
            self._listener = path.listen(_BACKLOG)
        except BaseException:
            state.close()
            raise
        if any(tool.is_async for tool in state.tools.values()):
            state.handler_loop = HandlerLoop(state.options.max_frame_bytes)
        self.monitor = Monitor(self._listener, state, platform)

    def stop(self) -> None:
        state, connections = self.state, self.monitor.connections
        state.draining = True
        state.wake_monitor()
        for connection in connections.copy():
            connection.drain()
        deadline = time.monotonic() + state.options.stop_timeout
        with state.changed:
            state.changed.wait_for(
                lambda: not any(connection.machine.in_use for connection in connections.copy()),
                state.options.stop_timeout,
            )
        for connection in connections.copy():
            connection.end_calls(ToolCancelled("the bridge stops"))
        for connection in connections.copy():
            connection.expel(BridgeStopped)
        state.wake_monitor()
        with state.changed:
            state.changed.wait_for(lambda: not connections, max(0.0, deadline - time.monotonic()) + _CLOSE_TIMEOUT)
        self.monitor.stop()
        self._listener.close()
        self.path.release()
        if state.handler_loop is not None:
            state.handler_loop.close(_CLOSE_TIMEOUT)
        state.pool.close(_CLOSE_TIMEOUT)
        state.close()

    def close_descriptors(self) -> None:
        self._listener.close()
        self.path.close_descriptor()
        self.monitor.close_descriptors()
        for connection in self.monitor.connections.copy():
            connection.close_descriptor()
        self.state.close()


class Monitor:
    """A thread that accepts connections and applies their timers."""

    def __init__(self, listener: socket.socket, state: BridgeState, platform: Platform) -> None:
        self.connections: set[Connection] = set()
        self._listener = listener
        self._state = state
        self._platform = platform
        # Closed when descriptors run out, so that a waiting client can be accepted and dropped.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accepting = False
        self._accept_after = 0.0
        self._busy_until = 0.0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(state.wakeup, selectors.EVENT_READ)
        listener.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="orki-tools-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close its descriptors except the listener."""
        self._stopping = True
        self._state.wake_monitor()
        self._thread.join()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close the descriptors only, as a forked child must."""
        self._selector.close()
        self._close_spare()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception:
                # Without the monitor the bridge would accept and enforce nothing.
                _log.exception("a defect in the monitor of a tool bridge")
                time.sleep(_PAUSE)

    def _turn(self) -> None:
        state = self._state
        state.monitor_asleep = False
        now = time.monotonic()
        again = self._tick(now)
        if now < self._busy_until:
            again = min(again, now + _TICK)
        elif again > now + _TICK:
            # From here on a new call wakes the monitor; a second tick finds the calls that came before.
            state.monitor_asleep = True
            again = self._tick(now)
        again = min(again, self._update_accepting(now))
        timeout = None if again == inf else max(0.0, again - time.monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fileobj is state.wakeup:
                with contextlib.suppress(BlockingIOError):
                    state.wakeup.recv(4_096)
            else:
                self._accept()

    def _tick(self, now: float) -> float:
        again = inf
        for connection in self.connections.copy():
            again = min(again, connection.tick(now))
            if connection.was_busy():
                self._busy_until = now + _QUIET_AFTER
        return again

    def _update_accepting(self, now: float) -> float:
        """Accept only below the limits; others wait in the kernel's queue. Return the time of the next update."""
        options = self._state.options
        pausing = now < self._accept_after
        accepting = not self._state.draining and len(self.connections) < options.max_connections and not pausing
        if accepting and not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._accepting and not accepting:
            self._selector.unregister(self._listener)
        self._accepting = accepting
        return self._accept_after if pausing else inf

    def _accept(self) -> None:
        state, options = self._state, self._state.options
        try:
            sock, _ = self._platform.accept(self._listener)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._drop_client()
                return
            raise
        try:
            sock.setblocking(True)
            uid = self._platform.check_peer(sock, options.allowed_uids, "client")
            same = sum(connection.uid == uid for connection in self.connections.copy())
            if same >= options.max_connections_per_uid:
                raise Overloaded(f"user {uid} has {same} connections, which is the maximum for one user")
            connection = Connection(sock, uid, state, self._closed)
        except OrkiError as error:
            with sock, contextlib.suppress(OSError):
                sock.send(encode_error(0, error), socket.MSG_DONTWAIT)
            return
        except BaseException:
            sock.close()
            raise
        self.connections.add(connection)
        if state.draining:
            connection.expel(BridgeStopped)
        try:
            state.pool.start(connection.run)
        except RuntimeError:
            connection.expel(BridgeStopped, Overloaded("the bridge has no thread left"))
            connection.close_descriptor()
            self._closed(connection)

    def _closed(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._state.wake_monitor()
        self._state.notify()

    def _drop_client(self) -> None:
        """Drop one waiting client with the spare descriptor, then pause."""
        self._close_spare()
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accept_after = time.monotonic() + _PAUSE
        _log.warning("a tool bridge has no file descriptor left and dropped a client")

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
