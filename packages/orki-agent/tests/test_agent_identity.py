"""`orki-agent run` with tokens, against a real orchestrator: accepted, refused for good, and files that are wrong."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from orki_contract.errors import PeerRefused
from orki_control import Client, ClientOptions, Credentials
from orki_server.embedded import EmbeddedServer

MODULE = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("contract_of_the_tests", {conftest!r})
contract = importlib.util.module_from_spec(spec)
sys.modules["contract_of_the_tests"] = contract
spec.loader.exec_module(contract)

from orki_agent import Agent
from orki_contract.images import image_of

work = contract.make_work(image_of(contract.PACKAGE))

class Worker(work.WorkServiceBase):
    async def work(self, request, ctx):
        return work.WorkResponse()

agent = Agent("worker", Worker())
"""
POLICY = """
[[allow]]
callers = ["agent/*"]
actions = ["serve", "read"]
services = ["agentwork.*"]
"""


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with EmbeddedServer() as server:
        yield server.url


async def run(*command: str, folder: Path, **environment: str) -> asyncio.subprocess.Process:
    path = os.pathsep.join(["", *sys.path])
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.fixture
async def address(store: str, tmp_path: Path, work_path: Path) -> AsyncIterator[str]:
    """An orchestrator with tokens for the agents a and b."""
    conftest = str(Path(__file__).with_name("conftest.py"))
    (tmp_path / "an_agent.py").write_text(MODULE.format(conftest=conftest))
    (tmp_path / "policy.toml").write_text(POLICY)
    lines = b""
    for name in ("a", "b"):
        created = await run("orki_server", "token", f"agent/{name}", "--out", f"{name}.token", folder=tmp_path)
        lines += (await created.communicate())[0]
    (tmp_path / "tokens").write_bytes(lines)
    (tmp_path / "tokens").chmod(0o600)
    arguments = ("--listen", "127.0.0.1:0", "--redis", store, "--tokens-file", "tokens", "--policy-file", "policy.toml")
    served = await run("orki_server", "serve", "--json", *arguments, folder=tmp_path)
    assert served.stdout is not None
    async with asyncio.timeout(30):
        ready = await served.stdout.readline()
    yield json.loads(ready)["address"]
    served.terminate()
    await served.communicate()


@pytest.mark.timeout(120)
async def test_an_agent_with_its_token_has_a_session(address: str, tmp_path: Path) -> None:
    arguments = ("--orchestrator", address, "--agent-id", "a", "--token-file", "a.token")
    agent = await run("orki_agent", "run", "an_agent:agent", *arguments, folder=tmp_path)
    try:
        own = ClientOptions(credentials=Credentials(token_file=str(tmp_path / "b.token")))
        async with Client(address, own) as client, asyncio.timeout(30):
            while [each.agent_id for each in await client.list_agents()] != ["a"]:
                await asyncio.sleep(0.1)
        with pytest.raises(PeerRefused):
            async with Client(address) as client:
                await client.list_agents()
    finally:
        agent.terminate()
        await agent.communicate()
    assert agent.returncode == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        (("--token-file", "b.token"), {}, 3, "is the identity of agent b"),
        ((), {}, 3, "requires a bearer token"),
        ((), {"ORKI_TOKEN": "0123456789abcdef." + "x" * 43}, 3, "the bearer token is unknown"),
        (("--token-file", "none"), {}, 2, "token_file (ORKI_TOKEN_FILE) none: the file cannot be read"),
        (("--token-file", "an_agent.py"), {}, 2, "all users of this host can access the file"),
        ((), {"ORKI_TOKEN": "short"}, 2, "token (ORKI_TOKEN) holds no token"),
        (("--tls-certificate", "x"), {}, 2, "certificate (ORKI_TLS_CERTIFICATE) needs key (ORKI_TLS_KEY)"),
        (
            ("--tls-ca", "an_agent.py"),
            {},
            2,
            "ca (ORKI_TLS_CA) an_agent.py: the file contains no PEM block CERTIFICATE",
        ),
        (("--orchestrator", "192.0.2.1:1", "--insecure", "--token-file", "a.token"), {}, 2, "travel unencrypted"),
    ],
)
async def test_an_agent_without_its_own_identity_is_refused(
    address: str, tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], code: int, message: str
) -> None:
    command = ("orki_agent", "run", "an_agent:agent", "--agent-id", "a", "--orchestrator", address, *arguments)
    agent = await run(*command, folder=tmp_path, **environment)
    async with asyncio.timeout(60):
        _, errors = await agent.communicate()
    assert agent.returncode == code, errors
    assert message in errors.decode()
