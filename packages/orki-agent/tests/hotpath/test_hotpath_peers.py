"""Checks of the peer at both ends: user and token."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hotpath_tools import ECHO, Ask, RawPeer, SampleTools, echo_frame

from orki_agent.hotpath import AsyncToolClient, BridgeOptions, SyncToolClient, ToolBridge, ToolClientOptions
from orki_agent.hotpath._platform import SYSTEM, Platform, uid_from_xucred
from orki_agent.hotpath.frames import decode_error
from orki_contract.errors import InvalidSetting, PeerRefused

STRANGER = 54_321


def calls(
    bridge: ToolBridge, token: bytes, options: ToolClientOptions | None = None, platform: Platform = SYSTEM
) -> None:
    """Make one call through each client; both must fail in the same way or succeed."""

    async def call() -> None:
        client = AsyncToolClient(bridge.path, token, name="x", options=options, platform=platform)
        try:
            assert await client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
        finally:
            await client.close()

    failed: list[type[BaseException] | None] = []
    for run in (lambda: asyncio.run(call()), lambda: _call(bridge, token, options, platform)):
        try:
            run()
            failed.append(None)
        except PeerRefused as error:
            failed.append(type(error))
            last = error
    assert failed in ([None, None], [PeerRefused, PeerRefused])
    if failed[0] is not None:
        raise last


def _call(bridge: ToolBridge, token: bytes, options: ToolClientOptions | None, platform: Platform) -> None:
    with SyncToolClient(bridge.path, token, name="x", options=options, platform=platform) as client:
        assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)


def test_only_the_right_token_is_accepted(bridge: ToolBridge) -> None:
    calls(bridge, bridge.token)
    for wrong in (bytes(32), bridge.token[:-1] + bytes([bridge.token[-1] ^ 1]), bridge.token[::-1]):
        with pytest.raises(PeerRefused, match="token") as refused:
            calls(bridge, wrong)
        assert bridge.token.hex() not in str(refused.value)


@pytest.mark.parametrize("token", [b"", bytes(31), bytes(33)])
def test_a_token_of_the_wrong_length_is_refused_before_connecting(token: bytes) -> None:
    with pytest.raises(InvalidSetting, match="32 bytes"):
        SyncToolClient("/nowhere", token, name="x")
    with pytest.raises(InvalidSetting, match="32 bytes"):
        AsyncToolClient("/nowhere", token, name="x")
    with pytest.raises(InvalidSetting, match="must have 32"):
        ToolBridge(SampleTools(), token=token)


@pytest.mark.parametrize("name", ["", "n" * 257, "ä" * 129])
def test_a_name_of_the_wrong_length_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match="name"):
        SyncToolClient("/nowhere", bytes(32), name=name)


def test_the_bridge_refuses_another_user() -> None:
    stranger = Platform(peer_uid=lambda sock: STRANGER)
    with ToolBridge(SampleTools(), platform=stranger) as bridge:
        with pytest.raises(PeerRefused, match=f"client is user {STRANGER}, allowed are \\[{os.geteuid()}\\]"):
            calls(bridge, bridge.token)
    with ToolBridge(SampleTools(), platform=stranger, options=BridgeOptions(allowed_uids=(STRANGER,))) as bridge:
        calls(bridge, bridge.token)
    with ToolBridge(SampleTools(), options=BridgeOptions(allowed_uids=(STRANGER,))) as bridge:
        with pytest.raises(PeerRefused, match=f"allowed are \\[{STRANGER}\\]"):
            calls(bridge, bridge.token)


def test_the_client_sends_no_token_to_another_users_bridge(bridge: ToolBridge) -> None:
    stranger = Platform(peer_uid=lambda sock: STRANGER)
    with pytest.raises(PeerRefused, match=f"the bridge is user {STRANGER}"):
        calls(bridge, bridge.token, platform=stranger)
    calls(bridge, bridge.token, ToolClientOptions(bridge_uids=(STRANGER,)), stranger)


def test_a_peer_of_unknown_user_is_refused() -> None:
    def silent(sock: socket.socket) -> int:
        raise OSError(95, "Operation not supported")

    with ToolBridge(SampleTools(), platform=Platform(peer_uid=silent)) as bridge:
        with pytest.raises(PeerRefused, match="does not report"):
            calls(bridge, bridge.token)


def test_the_peer_credentials_of_other_systems_are_decoded() -> None:
    answer = struct.pack("IIh2x16I", 0, STRANGER, 1, *([20] + [0] * 15))
    assert uid_from_xucred(answer) == STRANGER
    with pytest.raises(PeerRefused, match="version 7"):
        uid_from_xucred(struct.pack("II", 7, 0))


def test_the_fallback_for_systems_without_so_peercred(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Foreign(socket.socket):
        def getsockopt(self, *arguments: int) -> bytes:  # type: ignore[override]
            asked.append(arguments[:2])
            return struct.pack("IIh2x16I", 0, STRANGER, 1, *([20] + [0] * 15))

    monkeypatch.delattr(socket, "SO_PEERCRED", raising=False)
    with Foreign(socket.AF_UNIX) as sock:
        assert SYSTEM.peer_uid(sock) == STRANGER
    assert asked == [(0, 1)]


CONNECT_AS = """
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect(sys.argv[2])
        print("connected", sock.recv(4_096).hex())
    except OSError as error:
        print(type(error).__name__, "")
"""


def as_another_user(path: str) -> tuple[str, bytes]:
    """Connect as another user; return the outcome and the bytes that the bridge sent."""
    command = [sys.executable, "-c", CONNECT_AS, str(STRANGER), path]
    # The other user may have no access to the current folder, which Python reads at its start.
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50, cwd="/")
    outcome, _, said = told.stdout.partition(" ")
    return outcome, bytes.fromhex(said)


def test_folder_socket_and_bridge_each_refuse_a_real_other_user() -> None:
    """Without root this process cannot change its user, so it replaces the system call instead."""
    if os.geteuid() != 0:
        test_the_bridge_refuses_another_user()
        return
    with tempfile.TemporaryDirectory(prefix="orki-test-") as made:
        folder = Path(made)
        with ToolBridge(SampleTools(), path=folder / "tools") as bridge:
            assert as_another_user(bridge.path)[0] == "PermissionError"
            folder.chmod(0o755)
            assert as_another_user(bridge.path)[0] == "PermissionError"
            os.chmod(bridge.path, 0o666)
            outcome, answer = as_another_user(bridge.path)
            assert outcome == "connected"
            folder.chmod(0o700)
            with RawPeer(bridge) as peer:
                [refusal] = peer._decoder.feed(answer)
                error = decode_error(refusal)
                assert isinstance(error, PeerRefused)
                assert str(STRANGER) in str(error)
                peer.send(echo_frame(1))
                assert peer.frame() is not None
