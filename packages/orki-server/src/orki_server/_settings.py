"""The orchestrator's settings: where they come from, and what is refused.

A flag wins over the environment, the environment over the configuration file. Every setting has one name:
`--accept-timeout-ms` as a flag, `ORKI_ACCEPT_TIMEOUT_MS` in the environment, `accept_timeout_ms` under `[orchestrator]`
in the file. The two URLs leave `-url` out of their flags.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from orki_contract.errors import InvalidSetting
from orki_server._store.connection import address_of

TABLE: Final = "orchestrator"
"""Name of the table in the configuration file."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.@-]{1,200}\Z")
_LISTEN: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})\Z")


def default_orchestrator_id() -> str:
    """A name for this process and its run."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}@{os.urandom(4).hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorOptions:
    """How an orchestrator runs. Times are whole milliseconds, sizes bytes.

    Attributes:
        listen: HOST:PORT for agents and submitters; port 0 takes a free one. Loopback only, as nothing is encrypted.
        redis_url: URL of the Redis or Valkey that holds the store.
        events_url: URL of the Redis that holds the event plane; empty: the same.
        orchestrator_id: Name of this process and its run.
        shards: Parts of the store; fixed at its first start.
        heartbeat_interval_ms: Time between heartbeats; after three without a word a peer counts as gone.
        hello_timeout_ms: Longest wait for a hello.
        accept_timeout_ms: Time within which an agent answers an offer.
        max_message_bytes: Longest gRPC message.
        retention_ms: How long finished tasks are kept.
        progress_kept: Entries of progress that are kept of a task, about.
        drain_grace_ms: Time between saying that we stop and stopping.
        sweep_interval_ms: Longest time between two looks at the timers.
        max_sessions: Most agents at once.
    """

    listen: str = "127.0.0.1:50051"
    redis_url: str = "redis://127.0.0.1:6379/0"
    events_url: str = ""
    orchestrator_id: str = field(default_factory=default_orchestrator_id)
    shards: int = 8
    heartbeat_interval_ms: int = 2_000
    hello_timeout_ms: int = 10_000
    accept_timeout_ms: int = 3_000
    max_message_bytes: int = 4 << 20
    retention_ms: int = 3_600_000
    progress_kept: int = 1_000
    drain_grace_ms: int = 3_000
    sweep_interval_ms: int = 100
    max_sessions: int = 10_000

    def __post_init__(self) -> None:
        parse_listen(self.listen)
        address_of(self.redis_url)
        if self.events_url:
            address_of(self.events_url)
        if not _NAME.match(self.orchestrator_id):
            raise InvalidSetting(
                f"orchestrator_id {self.orchestrator_id!r}: use 1 to 200 letters, digits, `-`, `_`, `.` or `@`"
            )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidSetting(f"{name} {value}: use a number from {low} to {high}")

    @property
    def max_payload_bytes(self) -> int:
        """Longest request, response, progress or directive: what fits into a message beside its names."""
        return self.max_message_bytes - 64 * 1024

    @property
    def events_at(self) -> str:
        """URL of the event plane."""
        return self.events_url or self.redis_url


_RANGES: Final = (
    ("shards", 1, 1024),
    ("heartbeat_interval_ms", 10, 3_600_000),
    ("hello_timeout_ms", 10, 600_000),
    ("accept_timeout_ms", 10, 600_000),
    ("max_message_bytes", 256 * 1024, 256 << 20),
    ("retention_ms", 1, 366 * 86_400_000),
    ("progress_kept", 1, 1_000_000),
    ("drain_grace_ms", 0, 600_000),
    ("sweep_interval_ms", 1, 60_000),
    ("max_sessions", 1, 1_000_000),
)


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of a listen address.

    Raises:
        InvalidSetting: It is none, or is reachable from other hosts.
    """
    match = _LISTEN.match(listen)
    if match is None or int(match["port"]) > 65_535:
        raise InvalidSetting(f"listen {listen!r} is not HOST:PORT, such as 127.0.0.1:50051")
    host = match["host"].strip("[]")
    if not _is_loopback(host):
        raise InvalidSetting(
            f"listen {listen}: only loopback (127.0.0.1, [::1], localhost) is allowed, as the connection is not "
            "encrypted; for other hosts put a proxy with TLS before it"
        )
    return host, int(match["port"])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_options(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> OrchestratorOptions:
    """The options from all three places.

    Args:
        flags: Settings given on the command line, by field name; None for those that were not.
        environment: The process's environment; of it the names of the settings are read.
        file: Configuration file in TOML.

    Raises:
        InvalidSetting: A setting is unknown, malformed or out of its range; the message says where it was given.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_from_file(file))
    for name, kind in _kinds().items():
        variable = f"ORKI_{name.upper()}"
        if variable in environment:
            values[name] = _typed(environment[variable], kind, f"the environment variable {variable}")
    for name, value in flags.items():
        if value is None:
            continue
        if name not in _kinds():
            raise InvalidSetting(f"unknown option {name!r}; known: {', '.join(_kinds())}")
        if name in ("redis_url", "events_url") and urlsplit(str(value)).password:
            raise InvalidSetting(
                f"--{name.removesuffix('_url')}: a password on the command line can be read by anybody on this host; "
                f"give the URL in the environment variable ORKI_{name.upper()} or in the configuration file"
            )
        values[name] = value
    return OrchestratorOptions(**values)


def _kinds() -> dict[str, type]:
    return {each.name: int if each.type == "int" else str for each in dataclasses.fields(OrchestratorOptions)}


def _from_file(file: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidSetting(f"the configuration file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSetting(f"the configuration file {file} is not TOML: {error}") from error
    if unknown := sorted(set(content) - {TABLE}):
        raise InvalidSetting(f"the configuration file {file} has an unknown entry {unknown[0]!r}; known: [{TABLE}]")
    table = content.get(TABLE, {})
    if not isinstance(table, dict):
        raise InvalidSetting(f"the configuration file {file}: {TABLE} must be a table, [{TABLE}]")
    kinds = _kinds()
    for name, value in table.items():
        where = f"the configuration file {file}: {name} under [{TABLE}]"
        if name not in kinds:
            raise InvalidSetting(f"{where} is unknown; known: {', '.join(kinds)}")
        if type(value) is not kinds[name]:
            raise InvalidSetting(f"{where} must be {'a number' if kinds[name] is int else 'text'}, not {value!r}")
    return table


def _typed(text: str, kind: type, where: str) -> Any:
    if kind is str:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise InvalidSetting(f"{where} must be a whole number, not {text[:40]!r}") from error
