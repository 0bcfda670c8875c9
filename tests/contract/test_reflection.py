"""A stranger's tool, `buf curl`, finds and calls the orchestrator's services through reflection."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orki_server.embedded import EmbeddedServer

BUF = str(Path(sys.executable).with_name("buf"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of an orchestrator in a process of its own."""
    with EmbeddedServer() as server:
        command = [sys.executable, "-m", "orki_server", "serve", "--listen", "127.0.0.1:0", "--redis", server.url]
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield str(json.loads(process.stdout.readline())["address"])
            finally:
                process.terminate()
                process.wait(20)


def curl(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `buf curl`; the last argument is the path behind the address."""
    *options, path = arguments
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options, f"http://{address}{path}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_services_and_methods_are_listed(address: str) -> None:
    services = curl(address, "--list-services", "").stdout.split()
    assert {"orki.control.v1.SessionService", "orki.control.v1.TaskService", "grpc.health.v1.Health"} <= set(services)
    methods = curl(address, "--list-methods", "").stdout.split()
    assert "orki.control.v1.TaskService/Submit" in methods


def test_a_method_is_called(address: str) -> None:
    done = curl(address, "-d", "{}", "/orki.control.v1.FleetService/ListAgents")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_an_error_is_typed(address: str) -> None:
    done = curl(address, "-d", '{"taskId": "t1-nobody"}', "/orki.control.v1.TaskService/Get")
    assert done.returncode != 0
    assert "not_found" in done.stderr
