"""Processes that use orki start programs; gRPC's fork handlers would crash some children before they run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STARTS_PROGRAMS = """
import asyncio, collections, sys
from orki_control.transport import open_channel, server_options
import grpc

async def main():
    server = grpc.aio.server(options=server_options())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")

    async def call():
        while True:
            try:
                await channel.unary_unary("/a/b")(b"x")
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.002)

    calls = asyncio.create_task(call())
    statuses = collections.Counter()
    for _ in range(150):
        child = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "", preexec_fn=lambda: None)
        statuses[await child.wait()] += 1
    calls.cancel()
    await channel.close()
    await server.stop(None)
    print(dict(statuses))

asyncio.run(main())
"""


def output_of(program: str, **environment: str) -> str:
    """Run a Python program without the variable of this process, and return its standard output."""
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_started_program_runs() -> None:
    assert output_of(STARTS_PROGRAMS) == "{0: 150}"


@pytest.mark.parametrize("package", ["orki_control", "orki_agent", "orki_server"])
def test_fork_support_is_off_before_grpc_is_imported(package: str) -> None:
    program = f"import sys, {package}, os; print('grpc' in sys.modules, os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    assert output_of(program) == "False 0"


def test_the_users_own_setting_stays() -> None:
    program = "import orki_control, os; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    assert output_of(program, GRPC_ENABLE_FORK_SUPPORT="1") == "1"
