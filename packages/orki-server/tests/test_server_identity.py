"""Who may do what: certificates, tokens and the policy, with real TLS; and everything that must be refused."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from redis import Redis

from orki.control.v1 import task_pb2 as pb
from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.schedule_pb2 import Schedule
from orki.control.v1.session_pb2 import AgentMessage, ConnectRequest, Result
from orki.control.v1.task_pb2 import Submission
from orki_contract import Task
from orki_contract.errors import (
    InvalidArgument,
    InvalidSetting,
    OrchestratorUnavailable,
    PeerRefused,
    UnknownMethod,
    UnknownTask,
)
from orki_control import Client, ClientOptions, Credentials
from orki_control.transport import open_channel, typed_error
from orki_server._cli.root import root
from orki_server._identity import Action, Policy, Tokens
from orki_server._orchestrator import Orchestrator
from orki_server._settings import OrchestratorOptions

SERVICE = "servertests.v1.WorkService"
OTHER = "othertests.v1.OtherService"
DO = f"{SERVICE}/Do"
AGENT = "spiffe://example.org/agent/agent-1"
SUBMITTER = "spiffe://example.org/submitter/ci"
READER = "spiffe://example.org/submitter/reader"
POLICY = f"""
[[allow]]
callers = ["spiffe://example.org/agent/*", "agent/*"]
actions = ["serve"]
services = ["{SERVICE}"]

[[allow]]
callers = ["spiffe://example.org/submitter/ci", "submitter/ci"]
actions = ["submit", "read", "cancel", "direct"]
services = ["servertests.*"]

[[allow]]
callers = ["spiffe://example.org/submitter/reader", "submitter/reader"]
actions = ["read"]
services = ["{SERVICE}"]

[[allow]]
callers = ["submitter/operator"]
actions = ["pause", "limit"]
services = ["{SERVICE}"]

[[allow]]
callers = ["submitter/writer"]
actions = ["submit"]
services = ["{SERVICE}"]

[[allow]]
callers = ["submitter/other"]
actions = ["submit", "read", "cancel", "direct"]
services = ["{OTHER}"]
"""

Make = Callable[..., Any]
Launch = Callable[[OrchestratorOptions], Awaitable[Orchestrator]]


class Authority:
    """A certificate authority that writes files."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca = str(folder / "ca.pem")
        Path(self.ca).write_bytes(_pem(self._sign(self._name, self._key.public_key(), [], 30, True)))

    def issue(self, file: str, *uris: str, days: float = 1.0, dns: str = "localhost") -> dict[str, str]:
        """Write a certificate and its key, each by one replacement; return the settings of a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if not uris:
            names = [x509.DNSName(dns), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, file)])
        certificate = self._sign(subject, key.public_key(), names, days, False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        paths = [self.folder / f"{file}.pem", self.folder / f"{file}.key"]
        for path, content in zip(paths, (_pem(certificate), private), strict=True):
            descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as written:
                written.write(content)
            Path(f"{path}.new").replace(path)
        return {"certificate": str(paths[0]), "key": str(paths[1])}

    def credentials(self, file: str, *uris: str, days: float = 1.0) -> Credentials:
        return Credentials(ca=self.ca, **self.issue(file, *uris, days=days))

    def _sign(
        self, subject: x509.Name, key: Any, names: list[x509.GeneralName], days: float, authority: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            # Python 3.13 verifies strictly.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(_key_usage(authority), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        **dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False),
        **dict.fromkeys(("encipher_only", "decipher_only"), False),
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority", "authority")


@pytest.fixture
def policy(tmp_path: Path) -> str:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    return str(file)


@pytest.fixture
def tokens(tmp_path: Path) -> Callable[[str], str]:
    """Create tokens with the command; returns the token's file. The hashes are in the file `tokens`."""
    lines = tmp_path / "tokens"
    lines.touch(0o600)

    def create(name: str) -> str:
        file = tmp_path / f"{name.replace('/', '-')}.token"
        ran = CliRunner().invoke(root, ["token", name, "--out", str(file)])
        assert ran.exit_code == 0, ran.output
        with lines.open("a") as opened:
            opened.write(ran.output)
        return str(file)

    return create


@pytest.fixture
async def secured(launch: Launch, options: Make, redis_url: str, authority: Authority, policy: str) -> Orchestrator:
    """An orchestrator with certificates on both sides."""
    server = authority.issue("server")
    return await launch(
        options(
            redis_url,
            server_certificate=server["certificate"],
            server_key=server["key"],
            client_ca=authority.ca,
            policy_file=policy,
        )
    )


@pytest.fixture
async def with_tokens(
    launch: Launch, options: Make, redis_url: str, tmp_path: Path, tokens: Callable[[str], str], policy: str
) -> Orchestrator:
    """An orchestrator with tokens, on loopback and without TLS."""
    for name in (
        "agent/agent-1",
        "agent/agent-2",
        "submitter/ci",
        "submitter/reader",
        "submitter/operator",
        "submitter/writer",
        "submitter/other",
    ):
        tokens(name)
    return await launch(options(redis_url, tokens_file=str(tmp_path / "tokens"), policy_file=policy))


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[Client]]]:
    opened: list[Client] = []

    async def open_client(at: Orchestrator, credentials: Credentials, patience: float = 2.0) -> Client:
        client = Client(at.address, ClientOptions(patience=patience, credentials=credentials))
        opened.append(await client.__aenter__())
        return client

    yield open_client
    for client in opened:
        await client.__aexit__()


async def submit(client: Client, method: str = DO, key: str = "") -> pb.TaskSnapshot:
    (task,) = await client.submit_raw([pb.Submission(method=method, request=b"\n\x01q", idempotency_key=key)])
    return task


async def end_of(client: Client, task_id: str) -> pb.TaskSnapshot:
    async with asyncio.timeout(30):
        return [news async for news in client.watch(task_id)][-1].task


def token_of(tmp_path: Path, name: str) -> Credentials:
    return Credentials(token_file=str(tmp_path / f"{name.replace('/', '-')}.token"))


# --- what is allowed ---


async def test_a_task_runs_between_certificates(
    secured: Orchestrator, authority: Authority, stand_in: Make, connect: Make, redis_url: str
) -> None:
    agent = stand_in(secured.address, credentials=authority.credentials("agent-1", AGENT))
    await agent.ready()
    client = await connect(secured, authority.credentials("ci", SUBMITTER))
    task = await submit(client)
    assert (await end_of(client, task.task_id)).state == TaskState.TASK_STATE_SUCCEEDED
    with Redis.from_url(redis_url) as redis:
        async with asyncio.timeout(10):
            while not any(SUBMITTER.encode() in each for each in audit_entries(redis)):
                await asyncio.sleep(0.05)


def audit_entries(redis: Redis) -> list[bytes]:
    keys = list(redis.scan_iter("*audit*", _type="stream"))
    return [value for key in keys for _, fields in redis.xrange(key) for value in fields.values()]


async def test_a_task_runs_between_tokens(
    with_tokens: Orchestrator, tmp_path: Path, stand_in: Make, connect: Make
) -> None:
    agent = stand_in(with_tokens.address, credentials=token_of(tmp_path, "agent/agent-1"))
    await agent.ready()
    client = await connect(with_tokens, token_of(tmp_path, "submitter/ci"))
    task = await submit(client)
    assert (await end_of(client, task.task_id)).state == TaskState.TASK_STATE_SUCCEEDED


async def test_a_replica_has_the_identity_of_its_agent(
    secured: Orchestrator, authority: Authority, stand_in: Make
) -> None:
    agent = stand_in(secured.address, agent_id="agent-1.pod-7", credentials=authority.credentials("agent-1", AGENT))
    await agent.ready()


# --- certificates that are refused ---


@pytest.mark.parametrize("whose", ["agent-2", "agent-10", "agent"])
async def test_the_certificate_of_another_agent_is_refused(
    secured: Orchestrator, authority: Authority, stand_in: Make, whose: str
) -> None:
    agent = stand_in(secured.address, credentials=authority.credentials("x", f"spiffe://example.org/agent/{whose}"))
    await agent.until(lambda: agent.closed is not None)
    assert isinstance(agent.closed, PeerRefused)
    assert f"is the identity of agent {whose}" in agent.closed.message
    assert not agent.opened


async def test_a_submitter_cannot_open_the_session_of_an_agent(
    secured: Orchestrator, authority: Authority, stand_in: Make
) -> None:
    agent = stand_in(secured.address, agent_id="ci", credentials=authority.credentials("ci", SUBMITTER))
    await agent.until(lambda: agent.closed is not None)
    assert isinstance(agent.closed, PeerRefused)


async def test_an_agent_cannot_serve_what_the_policy_does_not_allow(
    secured: Orchestrator, authority: Authority, stand_in: Make, work: Make
) -> None:
    agent = stand_in(secured.address, [work(OTHER)], credentials=authority.credentials("agent-1", AGENT))
    await agent.until(lambda: agent.closed is not None)
    assert isinstance(agent.closed, PeerRefused)
    assert OTHER in agent.closed.message


@pytest.mark.parametrize(
    "case", ["expired", "wrong authority", "none", "plaintext", "expired server", "wrong server authority"]
)
async def test_an_invalid_certificate_is_refused_in_the_handshake(
    secured: Orchestrator, authority: Authority, tmp_path: Path, connect: Make, case: str
) -> None:
    foreign = Authority(tmp_path / "foreign", "authority")
    good = authority.issue("ci", SUBMITTER)
    if case == "expired server":
        authority.issue("server", days=-1)
        await asyncio.sleep(0.6)
    credentials = {
        "expired": authority.credentials("late", SUBMITTER, days=-1),
        "wrong authority": Credentials(ca=authority.ca, **foreign.issue("ci", SUBMITTER)),
        "none": Credentials(ca=authority.ca),
        "plaintext": Credentials(),
        "expired server": Credentials(ca=authority.ca, **good),
        "wrong server authority": Credentials(ca=foreign.ca, **good),
    }[case]
    client = await connect(secured, credentials, patience=0.0)
    with pytest.raises(OrchestratorUnavailable) as caught:
        await submit(client)
    expected = {
        "expired server": "its certificate has expired",
        "wrong server authority": "was not signed by an authority in ORKI_TLS_CA",
    }
    assert expected.get(case, "") in caught.value.message


@pytest.mark.parametrize(
    "uris",
    [
        (AGENT, SUBMITTER),
        ("https://example.org/agent/agent-1",),
        ("spiffe://example.org",),
        ("spiffe://example.org/agent/a%20b",),
        ("spiffe://example.org/" + "a" * 200,),
        (),
    ],
)
async def test_a_certificate_without_exactly_one_spiffe_name_is_refused(
    secured: Orchestrator, authority: Authority, connect: Make, uris: tuple[str, ...]
) -> None:
    client = await connect(secured, authority.credentials("odd", *uris), patience=0.0)
    with pytest.raises(PeerRefused, match="exactly one URI name"):
        await submit(client)


async def test_a_server_certificate_for_another_name_is_refused(
    secured: Orchestrator, authority: Authority, connect: Make
) -> None:
    good = authority.issue("ci", SUBMITTER)
    client = await connect(secured, Credentials(ca=authority.ca, server_name="elsewhere.example", **good), patience=0.0)
    with pytest.raises(OrchestratorUnavailable, match="another name"):
        await submit(client)
    client = await connect(secured, Credentials(ca=authority.ca, server_name="localhost", **good), patience=0.0)
    with pytest.raises(UnknownMethod):
        await submit(client)


# --- tokens that are refused ---


async def test_the_token_of_another_agent_is_refused(with_tokens: Orchestrator, tmp_path: Path, stand_in: Make) -> None:
    agent = stand_in(with_tokens.address, credentials=token_of(tmp_path, "agent/agent-2"))
    await agent.until(lambda: agent.closed is not None)
    assert isinstance(agent.closed, PeerRefused)
    assert "is the identity of agent agent-2" in agent.closed.message


@pytest.mark.parametrize("case", ["none", "unknown", "wrong secret", "malformed", "another scheme"])
async def test_an_unknown_token_is_refused_by_every_service(
    with_tokens: Orchestrator, tmp_path: Path, case: str
) -> None:
    known = (tmp_path / "submitter-ci.token").read_text().strip()
    header = {
        "none": (),
        "unknown": (("authorization", f"Bearer {'0' * 16}.{'A' * 43}"),),
        "wrong secret": (("authorization", f"Bearer {known[:-2]}xx"),),
        "malformed": (("authorization", "Bearer x"),),
        "another scheme": (("authorization", f"Basic {known}"),),
    }[case]
    async with open_channel(with_tokens.address) as channel:
        for method in (
            "orki.control.v1.TaskService/Submit",
            "orki.control.v1.TaskService/Watch",
            "orki.control.v1.FleetService/ListAgents",
            "orki.control.v1.SessionService/Connect",
            "grpc.health.v1.Health/Check",
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            call: Any = channel.stream_stream(f"/{method}")(iter([b""]), metadata=header, timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert isinstance(typed_error(caught.value, "it"), PeerRefused), method


async def test_a_revoked_token_is_refused_and_a_new_one_accepted_without_a_restart(
    with_tokens: Orchestrator, tmp_path: Path, tokens: Make, connect: Make
) -> None:
    client = await connect(with_tokens, token_of(tmp_path, "submitter/ci"))
    assert await client.list_agents() == []
    lines = tmp_path / "tokens"
    old = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(line for line in old if not line.startswith("submitter/ci ")))
    (tmp_path / "submitter-ci.token").unlink()
    await asyncio.sleep(0.6)
    tokens("submitter/ci")
    # The client reads its file for each call, so the same client has the new token.
    async with asyncio.timeout(10):
        while True:
            try:
                await client.list_agents()
                break
            except PeerRefused:
                await asyncio.sleep(0.1)


async def test_a_malformed_tokens_file_keeps_the_former_tokens(
    with_tokens: Orchestrator, tmp_path: Path, connect: Make
) -> None:
    client = await connect(with_tokens, token_of(tmp_path, "submitter/ci"))
    (tmp_path / "tokens").write_text("nonsense\n")
    await asyncio.sleep(0.6)
    assert await client.list_agents() == []


def test_a_token_never_leaves_the_host_without_tls() -> None:
    for insecure in (False, True):
        with pytest.raises(InvalidSetting, match="the token would travel unencrypted"):
            Client("192.0.2.1:50051", ClientOptions(insecure=insecure, credentials=Credentials(token="t" * 32)))


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Credentials(token="secret-secret-secret"))


# --- the policy ---


async def test_a_task_of_another_service_looks_like_an_unknown_one(
    with_tokens: Orchestrator, tmp_path: Path, stand_in: Make, connect: Make
) -> None:
    agent = stand_in(with_tokens.address, credentials=token_of(tmp_path, "agent/agent-1"), taking=False)
    await agent.ready()
    mine = await submit(await connect(with_tokens, token_of(tmp_path, "submitter/ci")))
    unknown = mine.task_id[:-1] + ("0" if mine.task_id[-1] != "0" else "1")
    other = await connect(with_tokens, token_of(tmp_path, "submitter/other"))

    async def watch(task_id: str) -> None:
        async for _ in other.watch(task_id):
            pass

    calls: dict[str, Callable[[str], Awaitable[object]]] = {
        "get": other.get,
        "watch": watch,
        "wait": other.wait_end,
        "cancel": other.cancel,
        "direct": lambda task_id: other.direct(task_id, b"\n\x01x"),
    }
    for name, call in calls.items():
        messages = []
        for task_id in (mine.task_id, unknown):
            with pytest.raises(UnknownTask) as caught:
                await call(task_id)
            messages.append(caught.value.message.replace(task_id, "ID").partition(": ")[2] or caught.value.message)
        assert re.sub("task [^ ]+", "", messages[0]) == re.sub("task [^ ]+", "", messages[1]), name
    assert [task async for task in other.list_tasks()] == []
    assert await other.list_agents() == []
    assert await other.list_services() == []
    with pytest.raises(UnknownMethod) as foreign:
        await submit(other)
    with pytest.raises(UnknownMethod) as missing:
        await submit(other, f"{OTHER}/Do")
    assert foreign.value.message == missing.value.message.replace(OTHER, SERVICE)
    still = await (await connect(with_tokens, token_of(tmp_path, "submitter/ci"))).get(mine.task_id)
    assert still.state in (TaskState.TASK_STATE_QUEUED, TaskState.TASK_STATE_OFFERED)


async def test_each_action_needs_its_own_permission(
    with_tokens: Orchestrator, tmp_path: Path, stand_in: Make, connect: Make
) -> None:
    agent = stand_in(with_tokens.address, credentials=token_of(tmp_path, "agent/agent-1"))
    await agent.ready()
    task = await submit(await connect(with_tokens, token_of(tmp_path, "submitter/ci")))
    reader = await connect(with_tokens, token_of(tmp_path, "submitter/reader"))
    assert (await end_of(reader, task.task_id)).state == TaskState.TASK_STATE_SUCCEEDED
    assert [each.task_id async for each in reader.list_tasks()] == [task.task_id]
    assert [each.agent_id for each in await reader.list_agents()] == ["agent-1"]
    with pytest.raises(UnknownTask):
        await reader.cancel(task.task_id)
    with pytest.raises(UnknownTask):
        await reader.direct(task.task_id, b"\n\x01x")
    with pytest.raises(UnknownMethod):
        await submit(reader)
    for pausing in (reader.pause, reader.resume):
        with pytest.raises(UnknownMethod):
            await pausing(SERVICE)
    operator = await connect(with_tokens, token_of(tmp_path, "submitter/operator"))
    await operator.pause(SERVICE)
    assert [each.target for each in await reader.list_pauses()] == [SERVICE]
    assert await operator.list_pauses() == []
    assert await operator.resume(SERVICE)
    ci = await connect(with_tokens, token_of(tmp_path, "submitter/ci"))
    hourly = Schedule(name="h", cron="0 * * * *", submission=Submission(method=DO))
    with pytest.raises(UnknownMethod):
        await reader.schedules.add_raw(hourly)
    await ci.schedules.add_raw(hourly)
    assert [each.name for each in await reader.schedules.list()] == ["h"]
    assert await operator.schedules.list() == []
    assert not await reader.schedules.remove("h")
    with pytest.raises(InvalidArgument, match="no schedule"):
        await reader.schedules.pause("h")
    assert await ci.schedules.remove("h")
    await operator.set_limit("model:small", concurrency=1)
    for refused in (reader.list_limits(), reader.set_limit("model:small")):
        with pytest.raises(PeerRefused, match="limits"):
            await refused
    assert [each.concurrency for each in await operator.list_limits()] == [1]
    writer = await connect(with_tokens, token_of(tmp_path, "submitter/writer"))
    work = Task.declare(DO, request=StringValue, response=StringValue)
    with pytest.raises(UnknownTask):
        await writer.call(work, StringValue(value="q"), idempotency_key="k", timeout=10)
    # A task that was found is shown without its response.
    assert (
        await end_of(reader, (await writer.submit(work, StringValue(value="q"), idempotency_key="k")).task_id)
    ).response
    assert not (await writer.submit(work, StringValue(value="q"), idempotency_key="k")).snapshot.response
    of_agent = await connect(with_tokens, token_of(tmp_path, "agent/agent-1"))
    with pytest.raises(UnknownMethod):
        await submit(of_agent)


@pytest.mark.parametrize("fence", [0, 1])
async def test_an_agent_cannot_report_for_the_lease_of_another(
    with_tokens: Orchestrator, tmp_path: Path, stand_in: Make, connect: Make, fence: int
) -> None:
    """The other agent knows task, attempt and fence, also when it forges a higher fence, and repeats the result."""
    holder = stand_in(with_tokens.address, credentials=token_of(tmp_path, "agent/agent-1"), handler=None)
    await holder.ready()
    client = await connect(with_tokens, token_of(tmp_path, "submitter/ci"))
    task = await submit(client)
    await holder.until(lambda: bool(holder.offers))
    key = holder.offers[0].attempt
    thief = stand_in(
        with_tokens.address, agent_id="agent-2", credentials=token_of(tmp_path, "agent/agent-2"), slots=1, taking=False
    )
    await thief.ready()
    ref = key.ref()
    ref.fence += fence
    forged = ConnectRequest(messages=[AgentMessage(result=Result(attempt=ref, response=b"\n\x06forged"))])
    for _ in range(2):
        thief.inject(forged)
    await asyncio.sleep(0.5)
    assert (await client.get(task.task_id)).state == TaskState.TASK_STATE_RUNNING
    # A client under the holder's name does not get a session at all.
    imposter = stand_in(with_tokens.address, credentials=token_of(tmp_path, "agent/agent-2"))
    await imposter.until(lambda: imposter.closed is not None)
    assert isinstance(imposter.closed, PeerRefused)
    holder.machine.report(key, b"\n\x04real", asyncio.get_running_loop().time())
    ended = await end_of(client, task.task_id)
    assert (ended.state, ended.response) == (TaskState.TASK_STATE_SUCCEEDED, b"\n\x04real")
    # The result is replayed, with another response, under the holder's own session.
    replay = ConnectRequest(messages=[AgentMessage(result=Result(attempt=key.ref(), response=b"\n\x06forged"))])
    holder.inject(replay)
    await asyncio.sleep(0.3)
    assert (await client.get(task.task_id)).response == b"\n\x04real"


# --- rotation ---


async def test_a_new_certificate_applies_to_new_connections_and_sessions_stay(
    secured: Orchestrator, authority: Authority, stand_in: Make, connect: Make
) -> None:
    agent = stand_in(secured.address, credentials=authority.credentials("agent-1", AGENT))
    await agent.ready()
    old = await served_serial(secured.address, authority)
    authority.issue("server")
    await asyncio.sleep(0.6)
    new = await served_serial(secured.address, authority)
    assert new != old
    client = await connect(secured, authority.credentials("ci", SUBMITTER))
    task = await submit(client)
    assert (await end_of(client, task.task_id)).state == TaskState.TASK_STATE_SUCCEEDED
    assert len(agent.opened) == 1
    assert agent.failures == []
    # A key that does not fit is being written: the former certificate still applies.
    (authority.folder / "server.key").write_text("half a file")
    await asyncio.sleep(0.6)
    assert await served_serial(secured.address, authority) == new


async def served_serial(address: str, authority: Authority) -> int:
    context = ssl.create_default_context(cafile=authority.ca)
    context.load_cert_chain(*authority.issue("probe", SUBMITTER).values())
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    return x509.load_der_x509_certificate(found).serial_number


async def test_a_client_uses_its_new_certificate_after_a_failed_connection(
    secured: Orchestrator, authority: Authority, connect: Make
) -> None:
    late = authority.credentials("ci", SUBMITTER, days=-1)
    client = await connect(secured, late, patience=15.0)
    waiting = asyncio.create_task(client.list_agents())
    await asyncio.sleep(0.5)
    assert not waiting.done()
    authority.issue("ci", SUBMITTER)
    assert await waiting == []


# --- settings and files ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server_certificate": "x"}, "server_certificate and server_key belong together"),
        ({"client_ca": "x"}, "client_ca needs TLS"),
        ({"server_certificate": "x", "server_key": "x", "client_ca": "x", "tokens_file": "x"}, "set one"),
        ({"tokens_file": "x"}, "set policy_file"),
        ({"policy_file": "x"}, "set client_ca or tokens_file"),
        ({"listen": "0.0.0.0:0", "server_certificate": "x", "server_key": "x"}, "client_ca or tokens_file"),
        ({"listen": "0.0.0.0:0", "tokens_file": "x", "policy_file": "x"}, "set server_certificate and server_key"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        OrchestratorOptions(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["server_certificate", "server_key", "client_ca", "policy_file", "tokens_file"])
@pytest.mark.parametrize("damage", ["missing", "empty", "other", "readable"])
async def test_an_error_of_a_file_names_the_setting_and_the_file(
    options: Make,
    redis_url: str,
    authority: Authority,
    tmp_path: Path,
    policy: str,
    tokens: Make,
    name: str,
    damage: str,
) -> None:
    tokens("submitter/ci")
    server = authority.issue("server")
    identity = {"tokens_file": str(tmp_path / "tokens")} if name == "tokens_file" else {"client_ca": authority.ca}
    settings = {
        "server_certificate": server["certificate"],
        "server_key": server["key"],
        "policy_file": policy,
        **identity,
    }
    file = Path(settings[name])
    secret = name in ("server_key", "tokens_file")
    harm(file, damage)
    harmless = {("policy_file", "empty"), ("tokens_file", "empty")}
    if (damage == "readable" and not secret) or (name, damage) in harmless:
        return
    with pytest.raises(InvalidSetting, match=f"{name} {re.escape(str(file))}"):
        await Orchestrator(options(redis_url, **settings)).start()


def harm(file: Path, damage: str) -> None:
    if damage == "missing":
        file.unlink()
    elif damage == "readable":
        file.chmod(0o644)
    else:
        file.write_text({"empty": "", "other": "no = such [[content\n"}[damage])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("allow = 1", "must be a list of tables"),
        ("[deny]", "unknown entry 'deny'"),
        ("[[allow]]\ncallers = ['a']", "exactly callers, actions and services"),
        ("[[allow]]\ncallers = ['a']\nactions = ['fly']\nservices = ['*']", "unknown action 'fly'"),
        ("[[allow]]\ncallers = []\nactions = ['read']\nservices = ['*']", "must be a list of texts"),
        ("[[allow]]\ncallers = ['a b']\nactions = ['read']\nservices = ['*']", "is not a pattern"),
        ("[[allow]]\ncallers = ['a']\nactions = ['read']\nservices = ['(x']", "is not a pattern"),
    ],
)
def test_a_malformed_policy_is_refused(entry: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Policy(entry.encode(), "policy_file x")


def test_patterns_match_whole_names() -> None:
    policy = Policy(b'[[allow]]\ncallers = ["agent/a*"]\nactions = ["submit"]\nservices = ["a.v1.*", "b.v1.B"]', "x")
    caller = policy.caller("agent/abc")
    assert [caller.may(Action.SUBMIT, name) for name in ("a.v1.X/Y", "b.v1.B/Z", "b.v1.BB/Z", "xa.v1.X/Y")] == [
        True,
        True,
        False,
        False,
    ]
    assert not caller.may(Action.READ, "a.v1.X/Y")
    for name in ("agent/b", "submitter/agent/a", ""):
        assert not policy.caller(name).may(Action.SUBMIT, "a.v1.X/Y")


@pytest.mark.parametrize(
    "line", ["x", "agent/a 1234 sha256:00", "agent/a b 1234", "robot/a id sha256:" + "0" * 64, "a " * 4]
)
def test_a_malformed_line_of_tokens_is_refused_with_its_number(line: str) -> None:
    with pytest.raises(InvalidSetting, match="tokens_file x, line 2: use NAME ID sha256:HASH"):
        Tokens(f"# comment\n{line}\n".encode(), "tokens_file x")
    with pytest.raises(InvalidSetting, match="appears twice"):
        Tokens((f"agent/a 12345678 sha256:{'0' * 64}\n" * 2).encode(), "tokens_file x")


def test_the_command_creates_a_token_once(tmp_path: Path) -> None:
    file = tmp_path / "t"
    ran = CliRunner().invoke(root, ["token", "agent/a", "--out", str(file)])
    name, _, digest = ran.output.split()
    token = file.read_text().strip()
    assert (name, file.stat().st_mode & 0o777) == ("agent/a", 0o600)
    assert token not in ran.output
    assert Tokens(ran.output.encode(), "x").name(token) == "agent/a"
    assert digest.startswith("sha256:")
    again = CliRunner().invoke(root, ["token", "agent/a", "--out", str(file)])
    assert again.exit_code == 2
    assert file.read_text().strip() == token
    assert CliRunner().invoke(root, ["token", "robot", "--out", str(tmp_path / "u")]).exit_code == 2


@pytest.mark.parametrize(
    ("case", "step"),
    [
        ("plaintext", "It may require TLS: set --tls-ca."),
        ("no certificate", "It may refuse the certificate: check --tls-certificate and --tls-key."),
        ("wrong authority", "was not signed by an authority in ORKI_TLS_CA"),
        ("no name", "exactly one URI name"),
    ],
)
async def test_the_doctor_names_the_cause_of_a_refused_connection(
    secured: Orchestrator, authority: Authority, tmp_path: Path, redis_url: str, case: str, step: str
) -> None:
    foreign = Authority(tmp_path / "foreign", "foreign")
    certificate = authority.issue("odd" if case == "no name" else "ci", *(() if case == "no name" else (SUBMITTER,)))
    files = ("--tls-certificate", certificate["certificate"], "--tls-key", certificate["key"])
    options = {
        "plaintext": (),
        "no certificate": ("--tls-ca", authority.ca),
        "wrong authority": ("--tls-ca", foreign.ca, *files),
        "no name": ("--tls-ca", authority.ca, *files),
    }[case]
    command = ("-m", "orki_server", "doctor", "--json", "--redis", redis_url, "--orchestrator", secured.address)
    doctor = await asyncio.create_subprocess_exec(sys.executable, *command, *options, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        output, _ = await doctor.communicate()
    (found,) = [check for check in json.loads(output)["checks"] if check["name"] == "orchestrator"]
    assert (doctor.returncode, found["verdict"]) == (1, "bad")
    assert step in f"{found['cause']} {found['next_step']}"


async def test_health_needs_an_identity_and_answers_with_one(with_tokens: Orchestrator, tmp_path: Path) -> None:
    async with open_channel(with_tokens.address, credentials=token_of(tmp_path, "submitter/reader")) as channel:
        answer: Message = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert isinstance(answer, health_pb2.HealthCheckResponse)
