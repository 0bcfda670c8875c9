"""Fixtures for observers and commands: a real Valkey, real processes, and a contract with sensitive fields."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

from orki_contract import EventStream
from orki_contract.descriptors import Schema
from orki_contract.images import image_of
from orki_contract.model import AUDIT_GROUP, Group, Retention, Stream
from orki_events import Events, connect
from orki_events.connection import Connection, parse_address
from orki_server.embedded import EmbeddedServer

CANARY = "xyzzy-canary-7731"
_WAIT_S = 30.0


@dataclass
class Observer:
    """A process that prints a readiness line, such as an observer."""

    arguments: list[str]
    folder: Path
    process: subprocess.Popen[str] | None = field(default=None, repr=False)
    where: str = ""

    def start(self) -> Observer:
        """Start the process and wait for its readiness line."""
        with (self.folder / "observer.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orki_server", *self.arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.folder,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " ready: " in line, f"{line!r}, log: {self.log}"
        self.where = line.partition(" ready: ")[2].strip()
        return self

    @property
    def log(self) -> str:
        return (self.folder / "observer.log").read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(_WAIT_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def canary() -> str:
    """The secret in every sensitive field of `UserContract.filled`; it must never be shown."""
    return CANARY


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[Callable[..., Observer]]:
    """Start observers: `observer("observe", "feed", "--redis", url)`."""
    started: list[Observer] = []

    def start(*arguments: str) -> Observer:
        started.append(Observer(list(arguments), tmp_path))
        return started[-1].start()

    yield start
    for each in started:
        each.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def valkey_url(shared_valkey: EmbeddedServer) -> str:
    """URL of the shared server, emptied."""

    async def empty() -> None:
        link = Connection(parse_address(shared_valkey.url), name="tests", connect_timeout=10, answer_timeout=10)
        await link.execute((b"FLUSHALL",))
        await link.close()

    asyncio.run(empty())
    return shared_valkey.url


@pytest.fixture
async def link(valkey_url: str) -> AsyncIterator[Connection]:
    """A Redis connection for the test."""
    opened = Connection(parse_address(valkey_url), name="tests", connect_timeout=10, answer_timeout=10)
    yield opened
    await opened.close()


@pytest.fixture
async def events(valkey_url: str) -> AsyncIterator[Events]:
    """The event plane on the shared server."""
    async with connect(valkey_url) as opened:
        yield opened


@dataclass(frozen=True)
class UserContract:
    """A user's contract: `acmewatch.v1.SecretEvent` on the stream `secrets`, two partitions."""

    stream: EventStream[Any, Any]
    event: type[Message]
    inner: type[Message]

    def filled(self, repository: str, number: int = 0) -> Any:
        """Return an event with the canary in every sensitive field."""
        inner = self.inner(password=CANARY, note="shown")
        event: Any = self.event(repository=repository, number=number, token=CANARY, inner=inner, inners=[inner])
        event.by_name["k"].CopyFrom(inner)
        event.picked.CopyFrom(inner)
        return event


def _user_image() -> bytes:
    """Return an image like those of `nox -s generate`, without protoc."""
    schema = Schema(image_of("orki.events.v1"))
    names = ["google/protobuf/descriptor.proto", "orki/options/v1/options.proto"]
    classes = message_factory.GetMessageClassesForFiles(names, schema.pool)
    sensitive = schema.pool.FindExtensionByName("orki.options.v1.sensitive")
    image: Any = classes["google.protobuf.FileDescriptorSet"].FromString(image_of("orki.events.v1"))
    del image.file[:]
    for name, found in schema.files.items():
        if name in names or name == "google/protobuf/duration.proto":
            image.file.add().ParseFromString(found.SerializeToString())
    file = image.file.add(name="acmewatch/v1/secret.proto", package="acmewatch.v1", syntax="proto3")
    file.dependency.append("orki/options/v1/options.proto")
    inner = file.message_type.add(name="Inner")
    _add(inner, "password", 1, 9).options.Extensions[sensitive] = True
    _add(inner, "note", 2, 9)
    event = file.message_type.add(name="SecretEvent")
    _add(event, "repository", 1, 9)
    _add(event, "number", 2, 13)
    _add(event, "token", 3, 9).options.Extensions[sensitive] = True
    _add(event, "inner", 4, 11, ".acmewatch.v1.Inner")
    _add(event, "inners", 5, 11, ".acmewatch.v1.Inner", label=3)
    _add(event, "by_name", 6, 11, ".acmewatch.v1.SecretEvent.ByNameEntry", label=3)
    event.oneof_decl.add(name="choice")
    _add(event, "picked", 7, 11, ".acmewatch.v1.Inner").oneof_index = 0
    _add(event, "picked_text", 8, 9).oneof_index = 0
    entry = event.nested_type.add(name="ByNameEntry")
    entry.options.map_entry = True
    _add(entry, "key", 1, 9)
    _add(entry, "value", 2, 11, ".acmewatch.v1.Inner")
    raw: bytes = image.SerializeToString()
    return raw


def _add(message: Any, name: str, number: int, kind: int, type_name: str = "", label: int = 1) -> Any:
    added = message.field.add(name=name, number=number, type=kind, label=label)
    if type_name:
        added.type_name = type_name
    return added


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UserContract:
    """A user's contract, installed as a package."""
    folder = tmp_path / "site" / "acmewatch" / "v1"
    folder.mkdir(parents=True)
    image = _user_image()
    (folder / "contract.binpb").write_bytes(image)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("acmewatch", "acmewatch.v1"):
        sys.modules.pop(name, None)
    pool: descriptor_pool.DescriptorPool = Schema(image).pool
    classes = message_factory.GetMessageClassesForFiles(["acmewatch/v1/secret.proto"], pool)
    event = classes["acmewatch.v1.SecretEvent"]
    contract = Stream(
        name="secrets",
        message="acmewatch.v1.SecretEvent",
        retention=Retention(max_entries=100_000),
        partitions=2,
        partition_key="repository",
        groups=(AUDIT_GROUP, Group(name="readers")),
    )
    return UserContract(EventStream(event, contract), event, classes["acmewatch.v1.Inner"])


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait for a condition, with a generous limit."""

    async def wait(condition: Callable[[], Any], limit_s: float = _WAIT_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            await asyncio.sleep(0.02)

    return wait


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A loopback port without a listener."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def redis_only(valkey_url: str, dead_port: int) -> dict[str, str]:
    """Environment for commands with Valkey and without an orchestrator."""
    return {"ORKI_REDIS_URL": valkey_url, "ORKI_ORCHESTRATOR": f"127.0.0.1:{dead_port}", "COLUMNS": "80"}


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def orki(tmp_path: Path) -> Callable[..., Awaitable[Ended]]:
    """Run `orki ARGS…` as a process without blocking the event loop; settings go to its environment."""

    async def run(*arguments: str, stdin: str = "", **settings: str) -> Ended:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ORKI_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "from orki_server._cli.root import main; main()"),
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={**environment, **settings},
        )
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 50)
        ended = Ended(process.returncode or 0, out.decode(), err.decode())
        assert "Traceback" not in ended.err
        return ended

    return run


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `orki ARGS…` as a process."""

    def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ORKI_")}
        environment.update(more.pop("env", {}))
        code = "from orki_server._cli.root import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=50,
            cwd=tmp_path,
            env=environment,
            check=False,
            **more,
        )

    return run
