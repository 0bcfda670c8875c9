"""Limits: connections, users, descriptors, and options out of range."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hotpath_tools import ECHO, Ask, RawPeer, SampleTools, echo_frame, until

import orki_contract as oc
from orki_agent.hotpath import BridgeOptions, SyncToolClient, ToolBridge, ToolClientOptions
from orki_agent.hotpath._platform import Platform
from orki_contract.errors import InvalidSetting, OrkiError, Overloaded, PeerLost


def test_connections_beyond_the_limit_wait() -> None:
    with ToolBridge(SampleTools(), options=BridgeOptions(max_connections=2)) as bridge:
        with RawPeer(bridge) as first, RawPeer(bridge) as second:
            third = RawPeer(bridge, hello=False)
            third.send(echo_frame(1))
            third.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                third.frame()
            for peer in (first, second):
                peer.send(echo_frame(1))
                assert peer.frame() is not None
            first.close()
            third.sock.settimeout(20)
            assert third.frame() is not None
            third.close()


def test_connections_of_one_user_are_limited() -> None:
    with ToolBridge(SampleTools(), options=BridgeOptions(max_connections_per_uid=2)) as bridge:
        with RawPeer(bridge), RawPeer(bridge):
            with (
                SyncToolClient(bridge.path, bridge.token, name="x") as client,
                pytest.raises(Overloaded, match="has 2"),
            ):
                client.call(ECHO, Ask(1, 2))
        with SyncToolClient(bridge.path, bridge.token, name="x") as client:
            until(lambda: _works(client))


def _works(client: SyncToolClient) -> bool:
    try:
        return client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
    except OrkiError:
        return False


def test_a_bridge_without_free_descriptors_keeps_serving_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    exhausted, attempts = threading.Event(), []

    def accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if exhausted.is_set():
            attempts.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return listener.accept()

    with ToolBridge(SampleTools(), platform=Platform(accept=accept)) as bridge:
        with SyncToolClient(bridge.path, bridge.token, name="x") as client, RawPeer(bridge) as early:
            client.call(ECHO, Ask(1, 2))
            exhausted.set()
            for _ in range(3):
                with SyncToolClient(bridge.path, bridge.token, name="late") as late, pytest.raises(PeerLost):
                    late.call(ECHO, Ask(1, 2))
                assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
            assert len(attempts) <= 4, "the monitor spins"
            exhausted.clear()
            early.send(echo_frame(1))
            assert early.frame() is not None
            with SyncToolClient(bridge.path, bridge.token, name="late") as late:
                assert late.call(ECHO, Ask(1, 2)) == Ask(1, 2)
    assert any("descriptor" in record.message for record in caplog.records)


EXHAUSTED = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from hotpath_tools import ECHO, Ask, SampleTools
from orki_agent.hotpath import SyncToolClient, ToolBridge
from orki_contract.errors import OrkiError
with ToolBridge(SampleTools()) as bridge:
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(__import__("os").listdir("/proc/self/fd")) + 6, 4096))
    clients, failed = [], 0
    for _ in range(12):
        client = SyncToolClient(bridge.path, bridge.token, name="x")
        try:
            client.call(ECHO, Ask(1, 2))
            clients.append(client)
        except (OrkiError, OSError):
            failed += 1
            client.close()
    assert clients and failed, (len(clients), failed)
    for client in clients:
        assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
        client.close()
    spent = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - spent < 0.3, "it spins"
    with SyncToolClient(bridge.path, bridge.token, name="x") as client:
        assert client.call(ECHO, Ask(1, 2)) == Ask(1, 2)
print("recovered")
"""


def test_a_process_without_free_descriptors_recovers() -> None:
    folder = str(Path(__file__).parent)
    ran = subprocess.run([sys.executable, "-c", EXHAUSTED, folder], capture_output=True, text=True, timeout=50)
    assert (ran.returncode, ran.stdout.strip()) == (0, "recovered"), ran.stderr


@pytest.mark.parametrize(
    "options",
    [
        {"max_connections": 0},
        {"max_connections_per_uid": 0},
        {"max_frame_bytes": 100},
        {"max_frame_bytes": 1 << 32},
        {"max_calls": 0},
        {"max_blocked": 0},
        {"handshake_timeout": 0},
        {"frame_timeout": -1},
        {"call_timeout": 5_000},
        {"stop_timeout": float("nan")},
        {"allowed_uids": (-1,)},
        {"max_calls": True},
        {"max_calls": "many"},
    ],
)
def test_bridge_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    [name] = options
    with pytest.raises(InvalidSetting, match=name):
        BridgeOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"max_connections": 0},
        {"max_calls": 0},
        {"max_waiting": -1},
        {"max_frame_bytes": 1},
        {"connect_timeout": 0},
        {"bridge_uids": (1 << 32,)},
    ],
)
def test_client_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    [name] = options
    with pytest.raises(InvalidSetting, match=name):
        ToolClientOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ToolClientOptions(unknown=1)  # type: ignore[call-arg]


def test_invalid_services_are_refused() -> None:
    class Nothing(oc.SyncToolService):
        TOOLS = ()

    for services, message in (
        ((), "at least one"),
        ((SampleTools(), SampleTools()), "both have opcode 0x0101"),
        ((Nothing(),), "Nothing is no tool service"),
        ((object(),), "object is no tool service"),
    ):
        with pytest.raises(InvalidSetting, match=message):
            ToolBridge(*services)  # type: ignore[arg-type]
