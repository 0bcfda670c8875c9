"""The bridge's keeper: one thread that takes connections in and ends what is overdue."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
from math import inf
from time import monotonic
from typing import Final

from orki_agent.hotpath.connection import Connection
from orki_agent.hotpath.desk import Desk
from orki_agent.hotpath.frames import encode_error
from orki_agent.hotpath.seam import Seam
from orki_contract.errors import OrkiError, Overloaded

__all__ = ["Keeper"]

TICK_SECONDS: Final = 0.005
"""How often it looks after connections that are in use: how late it may notice a blocked handler or a deadline."""
QUIET_SECONDS: Final = 0.5
"""So long after the last quick call it goes on looking, so that calls need not wake it one by one."""
BACKOFF_SECONDS: Final = 0.05

_NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_log = logging.getLogger("orki_agent.hotpath")


class Keeper:
    """Accepts, refuses, expires."""

    def __init__(self, listener: socket.socket, desk: Desk, seam: Seam) -> None:
        self._listener = listener
        self._desk = desk
        self._seam = seam
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accepting = False
        self._accept_after = 0.0
        self._busy_until = 0.0
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(desk.bell, selectors.EVENT_READ)
        listener.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="orki-tools-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and gives back what it holds; the listener is the caller's."""
        self._stopping = True
        self._desk.poke()
        self._thread.join()
        self.let_go()

    def let_go(self) -> None:
        """Closes descriptors and nothing else: what a forked child does."""
        self._selector.close()
        self._give_spare()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception:
                # Without its keeper the bridge would look alive and enforce nothing.
                _log.exception("the keeper of a tool bridge met a defect")
                threading.Event().wait(BACKOFF_SECONDS)

    def _turn(self) -> None:
        desk = self._desk
        desk.asleep = False
        now = monotonic()
        again = self._look(now)
        if now < self._busy_until:
            again = min(again, now + TICK_SECONDS)
        elif again > now + TICK_SECONDS:
            # Who adds a call from now on rings; whatever was added before is found by looking once more.
            desk.asleep = True
            again = self._look(now)
        again = min(again, self._admit(now))
        timeout = None if again == inf else max(0.0, again - monotonic())
        for key, _ in self._selector.select(timeout):
            if key.fileobj is desk.bell:
                with contextlib.suppress(BlockingIOError):
                    desk.bell.recv(4_096)
            else:
                self._accept()

    def _look(self, now: float) -> float:
        """Lets each connection end what is overdue; gives the time of the next look."""
        again = inf
        for connection in self._desk.connections.copy():
            again = min(again, connection.tick(now))
            if connection.was_busy():
                self._busy_until = now + QUIET_SECONDS
        return again

    def _admit(self, now: float) -> float:
        """Listens while there is room: whoever comes then waits in the kernel's queue instead of being dropped."""
        desk = self._desk
        room = not desk.draining and len(desk.connections) < desk.options.max_connections and now >= self._accept_after
        if room and not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._accepting and not room:
            self._selector.unregister(self._listener)
        self._accepting = room
        return self._accept_after if now < self._accept_after else inf

    def _accept(self) -> None:
        desk = self._desk
        try:
            sock, _ = self._seam.accept(self._listener)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._shed()
                return
            raise
        try:
            sock.setblocking(True)
            uid = self._seam.check_peer(sock, desk.options.allowed_uids, "client")
            same = sum(connection.uid == uid for connection in desk.connections.copy())
            if same >= desk.options.max_connections_per_uid:
                raise Overloaded(f"user {uid} has {same} connections, the most that one user may have")
            connection = Connection(sock, uid, desk)
        except OrkiError as error:
            with sock, contextlib.suppress(OSError):
                sock.send(encode_error(0, error), socket.MSG_DONTWAIT)
            return
        except BaseException:
            sock.close()
            raise
        desk.connections.add(connection)
        try:
            desk.crew.start(connection.run)
        except RuntimeError:
            connection.expel(Overloaded("the bridge has no thread left"))
            connection.let_go()
            desk.connections.discard(connection)

    def _shed(self) -> None:
        """Out of descriptors: drops one waiting client with the descriptor kept for this, then pauses."""
        self._give_spare()
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accept_after = monotonic() + BACKOFF_SECONDS
        _log.warning("a tool bridge has no file descriptor left and dropped a client")

    def _give_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
