"""The operating system as the hot path sees it: every call that differs between systems, or that tests replace."""

from __future__ import annotations

import errno
import os
import socket
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from orki_contract.errors import InvalidSetting, PeerRefused, SocketUnsafe

__all__ = [
    "MAX_PATH_BYTES",
    "NO_SIGNAL",
    "SYSTEM",
    "Forkable",
    "Seam",
    "after_fork",
    "check_path",
    "connect_nonblocking",
    "set_timeout",
    "uid_from_xucred",
]

MAX_PATH_BYTES: Final = 107
"""`sun_path` of unix(7) holds 108 bytes, the last a zero (macOS: 104)."""

NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
"""A peer that is gone gives EPIPE and never SIGPIPE, which a host of the interpreter may not ignore."""

_UCRED: Final = struct.Struct("3i")
_XUCRED: Final = struct.Struct("IIh2x16I")
_TIMEVAL: Final = struct.Struct("ll")
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1


def uid_from_xucred(answer: bytes) -> int:
    """The uid in what macOS and FreeBSD answer to LOCAL_PEERCRED (`struct xucred`, version 0)."""
    version, uid = struct.unpack_from("II", answer)
    if version != 0:
        raise PeerRefused(f"the system describes the peer in a form that is not known here (xucred version {version})")
    return int(uid)


def _peer_uid(sock: socket.socket) -> int:
    """The user at the other end, by the kernel's word."""
    if hasattr(socket, "SO_PEERCRED"):
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(uid)
    return uid_from_xucred(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """What may be replaced.

    Attributes:
        peer_uid: The user at the other end of a socket.
        own_uid: The user that this process acts as.
        accept: Takes a connection from a listening socket.
    """

    peer_uid: Callable[[socket.socket], int] = _peer_uid
    own_uid: Callable[[], int] = os.geteuid
    accept: Callable[[socket.socket], tuple[socket.socket, object]] = socket.socket.accept

    def check_peer(self, sock: socket.socket, allowed: tuple[int, ...], what: str) -> int:
        """The peer's uid.

        Raises:
            PeerRefused: It is not allowed, or nobody can say who the peer is.
        """
        try:
            uid = self.peer_uid(sock)
        except OSError as error:
            raise PeerRefused(f"the system does not say which user the {what} is: {error}") from None
        if uid not in (allowed or (self.own_uid(),)):
            raise PeerRefused(f"the {what} is user {uid}, allowed are {list(allowed) or [self.own_uid()]}")
        return uid


SYSTEM: Final = Seam()


def check_path(path: str | os.PathLike[str]) -> str:
    """The path of a socket, made absolute.

    Raises:
        SocketUnsafe: It is an abstract name: those belong to the network namespace and have no file mode.
        InvalidSetting: It is longer than the system takes.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise SocketUnsafe(f"{text!r} is no path of a file; abstract sockets are not used")
    absolute = str(Path(text).absolute())
    length = len(os.fsencode(absolute))
    if length > MAX_PATH_BYTES:
        raise InvalidSetting(
            f"the socket's path has {length} bytes, the system takes {MAX_PATH_BYTES}: choose a shorter folder "
            f"({absolute})"
        )
    return absolute


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """SO_RCVTIMEO or SO_SNDTIMEO: the kernel itself ends the wait, where a Python timeout would add a poll."""
    micros = max(1, int(seconds * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(micros, 1_000_000)))


def connect_nonblocking(sock: socket.socket, path: str) -> bool:
    """One attempt to connect; False when the listener's queue is full.

    Linux answers EAGAIN there and not EINPROGRESS, so that there is nothing to poll for: wait and try again.
    """
    try:
        sock.connect(path)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EINPROGRESS, errno.EINTR):
            return False
        raise
    return True


class Forkable(Protocol):
    """What must let go of its file descriptors in a forked child."""

    def after_fork(self) -> None:
        """Runs in the child, where no other thread exists and locks may be held by threads that are gone."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def after_fork(owner: Forkable) -> None:
    """Has `owner.after_fork()` called in every child that this process forks."""
    _forkables.add(owner)


def _in_child() -> None:
    for owner in list(_forkables):
        owner.after_fork()


os.register_at_fork(after_in_child=_in_child)
