"""A client that has one address leaves a half-open connection long before gRPC notices it."""

from __future__ import annotations

import asyncio

import pytest

from chaos.proxy import FaultProxy
from orki.control.v1 import task_pb2 as pb
from orki_contract.errors import UnknownMethod
from orki_control import Client, ClientOptions
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions
from orki_server.embedded import EmbeddedServer

_GRPC_NOTICES = 30.0
"""Seconds between a client's keepalive ping and the end of the wait for its answer, both included."""


async def ask(orki: Client) -> None:
    with pytest.raises(UnknownMethod):
        await orki.submit_raw([pb.Submission(method="acme.v1.NoService/Do")])


async def test_a_client_leaves_a_half_open_connection() -> None:
    with EmbeddedServer() as server:
        orchestrator = Orchestrator(
            OrchestratorOptions(listen="127.0.0.1:0", redis_url=server.url, heartbeat_interval=0.2)
        )
        await orchestrator.start()
        port = int(orchestrator.address.rpartition(":")[2])
        async with FaultProxy(port) as proxy:
            async with Client(f"127.0.0.1:{proxy.port}", ClientOptions(patience=120.0)) as orki:
                await ask(orki)
                proxy.abandon()
                async with asyncio.timeout(_GRPC_NOTICES / 2):
                    await ask(orki)
        await orchestrator.stop()
