"""Where a bridge's socket lies: a private folder, one owner by lock, no traces left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path

from orki_agent.hotpath.seam import SYSTEM, Seam, check_path
from orki_contract.errors import InvalidSetting, SocketUnsafe

__all__ = ["Place", "check_folder"]


def check_folder(folder: str, own_uid: int) -> None:
    """Looks whether nobody else can reach into a folder.

    Raises:
        SocketUnsafe: It is a symbolic link, no folder, somebody else's, or open to others.
    """
    try:
        status = os.lstat(folder)
    except OSError as error:
        raise SocketUnsafe(f"{folder}: {error.strerror}") from None
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        raise SocketUnsafe(f"{folder} is a symbolic link: name the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise SocketUnsafe(f"{folder} is no folder")
    if status.st_uid != own_uid:
        raise SocketUnsafe(f"{folder} belongs to user {status.st_uid}, not to user {own_uid}")
    if mode & 0o077:
        raise SocketUnsafe(f"{folder} is open to others (mode {mode:04o}): chmod 0700 it")


class Place:
    """A path that this process serves, and nobody else.

    The lock file beside the socket decides who owns the path: whoever holds its flock may remove a socket that a dead
    bridge left behind. The kernel drops the lock with its holder, so a killed bridge blocks nobody. The lock file stays
    (removing it would let two holders in) except in a folder of our own making.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, seam: Seam = SYSTEM) -> None:
        """Takes the path.

        Args:
            path: Socket's path; its folder is made (0700) if missing. None for a new folder among the temporary files.
            seam: Operating system.

        Raises:
            SocketUnsafe: The folder or what lies at the path is not safe, or another bridge serves the path.
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
                raise SocketUnsafe(f"{folder} cannot be made: {error.strerror}") from None
            check_folder(str(folder), seam.own_uid())
            self._take_lock()
        except BaseException:
            self.release()
            raise

    def listen(self, backlog: int) -> socket.socket:
        """A listening socket at the path, in place of one that a dead bridge left.

        Raises:
            SocketUnsafe: Something that is no socket lies at the path.
        """
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(self.path).st_mode):
                raise SocketUnsafe(f"{self.path} exists and is no socket: remove it or choose another path")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        staged = self._staged()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            # Linux gives the file the socket's own mode, so that it is never open, not even for a moment; where that is
            # not so, nobody else comes through the folder.
            with contextlib.suppress(OSError):
                os.fchmod(listener.fileno(), 0o600)
            listener.bind(staged)
            os.chmod(staged, 0o600)
            listener.listen(backlog)
            # Who sees the path finds somebody who listens.
            os.replace(staged, self.path)
            self._bound = True
        except BaseException:
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            raise
        return listener

    def _staged(self) -> str:
        """Where the socket is bound before it listens; the path itself where a longer one is too long for a socket."""
        staged = f"{self.path}~"
        try:
            return check_path(staged)
        except InvalidSetting:
            return self.path

    def release(self) -> None:
        """Removes the socket and gives the path back; harmless when done before."""
        if self._lock >= 0 and self._bound:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        if self._own_folder is not None:
            for name in os.listdir(self._own_folder):
                os.unlink(os.path.join(self._own_folder, name))
            os.rmdir(self._own_folder)
            self._own_folder = None
        self.let_go()

    def let_go(self) -> None:
        """Closes the lock's descriptor and touches nothing else: what a forked child does with its parent's place."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> None:
        lock_path = self.path + ".lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            lock = os.open(lock_path, flags, 0o600)
        except OSError as error:
            raise SocketUnsafe(f"{lock_path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise SocketUnsafe(f"another bridge serves {self.path}: stop it or choose another path") from None
        self._lock = lock
