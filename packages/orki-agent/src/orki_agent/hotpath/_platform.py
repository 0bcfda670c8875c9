"""Operating system calls of the hot path: sockets, peer credentials, socket paths and forks.

Everything that differs between systems, or that tests replace, is in this module.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from orki_contract.errors import InvalidSetting, PeerRefused, SocketUnsafe

MAX_PATH_BYTES: Final = 107
"""`sun_path` of unix(7) holds 108 bytes, the last of them zero (macOS: 104)."""

NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
"""Sending to a closed peer fails with EPIPE instead of raising SIGPIPE, which an embedding process may not ignore."""

_UCRED: Final = struct.Struct("3i")
_XUCRED: Final = struct.Struct("IIh2x16I")
_TIMEVAL: Final = struct.Struct("ll")
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1


def uid_from_xucred(answer: bytes) -> int:
    """Return the uid in the value of LOCAL_PEERCRED on macOS and FreeBSD (`struct xucred`, version 0)."""
    version, uid = struct.unpack_from("II", answer)
    if version != 0:
        raise PeerRefused(f"the system reports the peer's user in an unknown format (xucred version {version})")
    return int(uid)


def _peer_uid(sock: socket.socket) -> int:
    if hasattr(socket, "SO_PEERCRED"):
        _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(uid)
    return uid_from_xucred(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """System calls that tests replace.

    Attributes:
        peer_uid: Returns the user at the other end of a socket.
        own_uid: Returns the effective user of this process.
        accept: Accepts a connection from a listening socket.
    """

    peer_uid: Callable[[socket.socket], int] = _peer_uid
    own_uid: Callable[[], int] = os.geteuid
    accept: Callable[[socket.socket], tuple[socket.socket, object]] = socket.socket.accept

    def check_peer(self, sock: socket.socket, allowed: tuple[int, ...], role: str) -> int:
        """Return the peer's uid.

        Raises:
            PeerRefused: The user is not allowed, or the system does not report it.
        """
        try:
            uid = self.peer_uid(sock)
        except OSError as error:
            raise PeerRefused(f"the system does not report the user of the {role}: {error}") from None
        if uid not in (allowed or (self.own_uid(),)):
            raise PeerRefused(f"the {role} is user {uid}, allowed are {list(allowed) or [self.own_uid()]}")
        return uid


SYSTEM: Final = Platform()


def set_timeout(sock: socket.socket, option: int, timeout: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO in seconds. The kernel ends the wait; a Python timeout would add a poll."""
    micros = max(1, int(timeout * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(micros, 1_000_000)))


def connect_nonblocking(sock: socket.socket, path: str) -> bool:
    """Try once to connect; return False if the listener's queue is full.

    For a full queue Linux reports EAGAIN, not EINPROGRESS, and polling does not show room: wait and try again.
    """
    try:
        sock.connect(path)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EINPROGRESS, errno.EINTR):
            return False
        raise
    return True


class Forkable(Protocol):
    """An object that has to close its file descriptors in a forked child."""

    def after_fork(self) -> None:
        """Run in the child, where no other thread exists and locks may be held for ever."""


_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def after_fork(owner: Forkable) -> None:
    _forkables.add(owner)


def _in_child() -> None:
    for owner in list(_forkables):
        owner.after_fork()


os.register_at_fork(after_in_child=_in_child)


def check_path(path: str | os.PathLike[str]) -> str:
    """Return a socket path as an absolute path.

    Raises:
        SocketUnsafe: The path is an abstract name, which belongs to the network namespace and has no file mode.
        InvalidSetting: The path is too long for the system.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise SocketUnsafe(f"{text!r} is no file path; abstract socket names are not supported")
    absolute = str(Path(text).absolute())
    length = len(os.fsencode(absolute))
    if length > MAX_PATH_BYTES:
        raise InvalidSetting(
            f"the socket path has {length} bytes, the maximum is {MAX_PATH_BYTES}: choose a shorter folder ({absolute})"
        )
    return absolute


def check_folder(folder: str, own_uid: int) -> None:
    """Check that only `own_uid` can access a folder.

    Raises:
        SocketUnsafe: The path is a symbolic link or no folder, or other users own or can access the folder.
    """
    try:
        status = os.lstat(folder)
    except OSError as error:
        raise SocketUnsafe(f"{folder}: {error.strerror}") from None
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        raise SocketUnsafe(f"{folder} is a symbolic link: use the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise SocketUnsafe(f"{folder} is no folder")
    if status.st_uid != own_uid:
        raise SocketUnsafe(f"{folder} belongs to user {status.st_uid}, not to user {own_uid}")
    if mode & 0o077:
        raise SocketUnsafe(f"{folder} is accessible to other users (mode {mode:04o}): chmod it to 0700")


class SocketPath:
    """A socket path owned by this process.

    Ownership is a flock on a lock file beside the socket. The lock's holder may remove a socket that a killed bridge
    left; the kernel releases the lock when a process ends. The lock file is kept, except in a temporary folder of this
    object, because removing it would let two processes hold the lock.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, platform: Platform = SYSTEM) -> None:
        """Lock the path.

        Args:
            path: The socket's path; its folder is created with mode 0700 if missing. None for a new temporary folder.
            platform: System calls.

        Raises:
            SocketUnsafe: The folder or the path is unsafe, or another bridge serves the path.
            InvalidSetting: The path is too long.
        """
        self._own_folder: str | None = None
        if path is None:
            self._own_folder = tempfile.mkdtemp(prefix="orki-")
            path = os.path.join(self._own_folder, "tools")
        self._lock = -1
        self._bound = False
        try:
            self.path = check_path(path)
            folder = Path(self.path).parent
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise SocketUnsafe(f"{folder} cannot be created: {error.strerror}") from None
            check_folder(str(folder), platform.own_uid())
            self._take_lock()
        except BaseException:
            self.release()
            raise

    def listen(self, backlog: int) -> socket.socket:
        """Return a socket that listens at the path; it replaces one that a killed bridge left.

        Raises:
            SocketUnsafe: The path exists and is no socket.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise SocketUnsafe(f"{self.path} exists and is no socket: remove it or choose another path")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        staged = self._staged()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            # On Linux the file gets the socket's mode, so it is never accessible to others. On other systems the
            # folder keeps other users out.
            with contextlib.suppress(OSError):
                os.fchmod(listener.fileno(), 0o600)
            listener.bind(staged)
            os.chmod(staged, 0o600)
            listener.listen(backlog)
            # Rename last: a client that sees the path can connect.
            os.replace(staged, self.path)
            self._bound = True
        except BaseException:
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            raise
        return listener

    def release(self) -> None:
        """Remove the socket and unlock the path. Idempotent."""
        if self._lock >= 0 and self._bound:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        if self._own_folder is not None:
            for name in os.listdir(self._own_folder):
                os.unlink(os.path.join(self._own_folder, name))
            os.rmdir(self._own_folder)
            self._own_folder = None
        self.close_descriptor()

    def close_descriptor(self) -> None:
        """Close the lock's descriptor only, as a forked child must."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _staged(self) -> str:
        """Return the path to bind before listening; the final path if a longer one would be too long."""
        try:
            return check_path(f"{self.path}~")
        except InvalidSetting:
            return self.path

    def _take_lock(self) -> None:
        lock_path = self.path + ".lock"
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SocketUnsafe(f"{lock_path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise SocketUnsafe(f"another bridge serves {self.path}: stop it or choose another path") from None
        self._lock = lock
