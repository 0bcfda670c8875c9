"""The socket path: permissions, ownership and cleanup."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hotpath_tools import ECHO, TOKEN, Ask, SampleTools, serving_process

from orki_agent.hotpath import SyncToolClient, ToolBridge
from orki_agent.hotpath._platform import MAX_PATH_BYTES, Platform, SocketPath, check_folder, check_path
from orki_contract.errors import InvalidSetting, LocalProtocolError, SocketUnsafe


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder with a short path, because socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="orki-test-") as made:
        yield Path(made)


def mode_of(path: object) -> int:
    return stat.S_IMODE(os.lstat(str(path)).st_mode)


def test_a_bridge_without_a_path_uses_and_removes_a_temporary_folder() -> None:
    with ToolBridge(SampleTools()) as bridge:
        folder = Path(bridge.path).parent
        assert (mode_of(folder), mode_of(bridge.path)) == (0o700, 0o600)
        assert mode_of(bridge.path + ".lock") == 0o600
        assert len(bridge.token) == 32
        assert bridge.token != ToolBridge(SampleTools()).token
    assert not folder.exists()
    with pytest.raises(LocalProtocolError, match="not running"):
        _ = bridge.path


def test_a_missing_folder_is_created_private_under_any_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        with ToolBridge(SampleTools(), path=folder / "new" / "tools") as bridge:
            assert (mode_of(folder / "new"), mode_of(bridge.path)) == (0o700, 0o600)
    finally:
        os.umask(before)
    assert sorted(os.listdir(folder / "new")) == ["tools.lock"]


def test_a_bridge_can_be_restarted_but_not_started_twice(folder: Path) -> None:
    bridge = ToolBridge(SampleTools(), path=folder / "tools")
    for _ in range(3):
        with bridge:
            with pytest.raises(LocalProtocolError, match="already running"):
                bridge.start()
            with SyncToolClient(bridge.path, bridge.token, name="x") as client:
                assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
    bridge.stop()


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777, 0o1777])
def test_a_folder_accessible_to_others_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(SocketUnsafe, match="accessible to other users"):
        ToolBridge(SampleTools(), path=folder / "tools").start()
    assert list(folder.iterdir()) == []
    folder.chmod(0o700)


def test_a_symbolic_link_to_a_folder_is_refused(folder: Path) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(SocketUnsafe, match="symbolic link"):
        ToolBridge(SampleTools(), path=folder / "link" / "tools").start()
    assert os.listdir(folder / "real") == []


def test_a_file_instead_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(SocketUnsafe, match="cannot be created"):
        ToolBridge(SampleTools(), path=folder / "file" / "tools").start()
    with pytest.raises(SocketUnsafe, match="no folder"):
        check_folder(str(folder / "file"), os.geteuid())
    with pytest.raises(SocketUnsafe, match="No such file"):
        check_folder(str(folder / "absent"), os.geteuid())


def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    stranger = Platform(own_uid=lambda: os.geteuid() + 1)
    with pytest.raises(SocketUnsafe, match=f"belongs to user {os.geteuid()}"):
        SocketPath(folder / "tools", platform=stranger)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_a_path_that_is_no_socket_is_not_removed(folder: Path, what: str) -> None:
    path = folder / "tools"
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(SocketUnsafe, match="is no socket"):
        ToolBridge(SampleTools(), path=path).start()
    assert os.path.lexists(path)


def test_a_lock_file_that_is_a_symbolic_link_is_refused(folder: Path) -> None:
    (folder / "tools.lock").symlink_to(folder / "victim")
    with pytest.raises(SocketUnsafe, match="lock"):
        ToolBridge(SampleTools(), path=folder / "tools").start()
    assert not (folder / "victim").exists()


def test_two_bridges_never_share_a_path(folder: Path) -> None:
    with ToolBridge(SampleTools(), path=folder / "tools", token=TOKEN) as first:
        for _ in range(2):
            with pytest.raises(SocketUnsafe, match="another bridge serves"):
                ToolBridge(SampleTools(), path=folder / "tools").start()
        with SyncToolClient(first.path, TOKEN, name="x") as client:
            assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)


def test_the_socket_of_a_killed_bridge_is_replaced(folder: Path) -> None:
    path = folder / "tools"
    process = serving_process(str(path))
    with pytest.raises(SocketUnsafe, match="another bridge serves"):
        ToolBridge(SampleTools(), path=path).start()
    process.kill()
    process.wait()
    assert path.exists()
    with ToolBridge(SampleTools(), path=path, token=TOKEN) as bridge:
        with SyncToolClient(bridge.path, TOKEN, name="x") as client:
            assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
    assert os.listdir(folder) == ["tools.lock"]


def test_a_path_that_is_too_long_is_refused_with_advice(folder: Path) -> None:
    longest = str(folder / ("n" * (MAX_PATH_BYTES - len(str(folder)) - 1)))
    assert check_path(longest) == longest
    with ToolBridge(SampleTools(), path=longest) as bridge:
        assert bridge.path == longest
    for make in (lambda: SocketPath(longest + "n"), lambda: SyncToolClient(longest + "n", TOKEN, name="x")):
        with pytest.raises(InvalidSetting, match=f"{MAX_PATH_BYTES + 1} bytes.*shorter folder"):
            make()


@pytest.mark.parametrize("path", ["", "\0abstract", "a\0b"])
def test_abstract_names_are_refused(path: str) -> None:
    with pytest.raises(SocketUnsafe, match="abstract"):
        check_path(path)
    with pytest.raises(SocketUnsafe, match="abstract"):
        ToolBridge(SampleTools(), path=path).start()


def test_a_relative_path_is_made_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert check_path("tools") == str(folder / "tools")


def test_a_path_that_cannot_be_bound_can_be_used_later(folder: Path) -> None:
    place = SocketPath(folder / "tools")
    (folder / "tools").mkdir()
    with pytest.raises(SocketUnsafe):
        place.listen(1)
    (folder / "tools").rmdir()
    with place.listen(1) as listener:
        assert listener.family == socket.AF_UNIX
    place.release()
    place.release()
    assert os.listdir(folder) == ["tools.lock"]


def test_the_path_appears_only_after_the_socket_listens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sees the file can connect at once."""
    path = folder / "tools"
    seen: list[bool] = []
    listen = socket.socket.listen

    def watched(self: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", watched)
    place = SocketPath(path)
    with place.listen(1), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
    place.release()
    assert seen == [False]
    assert os.listdir(folder) == ["tools.lock"]
