"""The orchestrator's settings: sources, defaults and validation.

A flag takes precedence over the environment, and the environment over the configuration file. Each setting has one
name: `--accept-timeout-ms` as a flag, `ORKI_ACCEPT_TIMEOUT_MS` in the environment, `accept_timeout_ms` under
`[orchestrator]` in the file. The flags of the two URLs omit `-url`. Settings are integers with a unit in the name;
`OrchestratorOptions` has durations in seconds.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from orki_contract.errors import InvalidSetting
from orki_control.transport import is_loopback
from orki_events.connection import Address, parse_address
from orki_server._store.server import Durability

TABLE: Final = "orchestrator"
"""Name of the table in the configuration file."""
_NAME: Final = re.compile(r"[A-Za-z0-9_.@-]{1,200}\Z")
_LISTEN: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})\Z")


def default_orchestrator_id() -> str:
    """Return a name for this run of this process."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}@{os.urandom(4).hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorOptions:
    """Options of an orchestrator.

    Attributes:
        listen: HOST:PORT for agents and submitters; port 0 takes a free one. Beyond loopback it needs TLS and identity.
        redis_url: URL of the Redis or Valkey server with the store.
        events_url: URL of the server with the event plane; empty for `redis_url`.
        durability: What acknowledged submissions and results survive: `memory`, `fsync` (on the store's disk), or
            `replicas:N` (on N replicas).
        orchestrator_id: Name of this run of this process.
        shards: Number of shards of the store; fixed when it is first used.
        heartbeat_interval: Time between heartbeats; after three missed ones a peer counts as disconnected.
        hello_timeout: Maximum wait for a hello.
        accept_timeout: Time within which an agent answers an offer.
        max_message_bytes: Maximum size of a gRPC message.
        retention: Time for which finished tasks are kept.
        progress_kept: Approximate number of progress entries kept per task.
        drain_grace: Time for running attempts to end when the orchestrator stops.
        sweep_interval: Maximum time between two sweeps of the timers.
        max_sessions: Maximum number of agents.
        server_certificate: PEM file with the server's certificate chain; turns TLS on.
        server_key: PEM file with the key of the certificate.
        client_ca: PEM file with the authorities of clients' certificates; clients then need a SPIFFE certificate.
        tokens_file: File with hashes of bearer tokens; clients then need a token.
        policy_file: TOML file with what each caller may do; needed with `client_ca` or `tokens_file`.
        handshake_timeout: Time within which a connection must complete its handshakes and make a call.
        max_handshakes: Maximum number of connections without a call; 0 for half of all.
        max_connections: Maximum number of connections; fewer if the process may not open as many files.
        max_connections_per_address: Maximum number of connections of one address; 0 for three quarters of all.
    """

    listen: str = "127.0.0.1:50051"
    redis_url: str = "redis://127.0.0.1:6379/0"
    events_url: str = ""
    durability: str = "memory"
    orchestrator_id: str = field(default_factory=default_orchestrator_id)
    shards: int = 8
    heartbeat_interval: float = 2.0
    hello_timeout: float = 10.0
    accept_timeout: float = 3.0
    max_message_bytes: int = 4 << 20
    retention: float = 3_600.0
    progress_kept: int = 1_000
    drain_grace: float = 3.0
    sweep_interval: float = 0.25
    max_sessions: int = 10_000
    server_certificate: str = ""
    server_key: str = ""
    client_ca: str = ""
    tokens_file: str = ""
    policy_file: str = ""
    handshake_timeout: float = 10.0
    max_handshakes: int = 0
    max_connections: int = 20_000
    max_connections_per_address: int = 0

    def __post_init__(self) -> None:
        self._check_identity()
        _ = self.store_address, self.events_address, self.store_durability
        if not _NAME.match(self.orchestrator_id):
            raise InvalidSetting(
                f"orchestrator_id {self.orchestrator_id!r}: use 1 to 200 letters, digits, `-`, `_`, `.` or `@`"
            )
        settings = _settings(self)
        for name, (low, high) in _RANGES.items():
            if not low <= settings[name] <= high:
                raise InvalidSetting(f"{name} {settings[name]}: use a number from {low} to {high}")

    def _check_identity(self) -> None:
        """Refuse an address that other hosts reach without TLS and identity, and settings that do not fit together."""
        host, _ = parse_listen(self.listen)
        if bool(self.server_certificate) != bool(self.server_key):
            raise InvalidSetting("server_certificate and server_key belong together: set both, or none")
        if self.client_ca and not self.server_certificate:
            raise InvalidSetting("client_ca needs TLS: set server_certificate and server_key")
        if self.client_ca and self.tokens_file:
            raise InvalidSetting("client_ca and tokens_file are both set: clients have certificates or tokens; set one")
        if not is_loopback(host) and not (self.server_certificate and self.has_identity):
            raise InvalidSetting(
                f"listen {self.listen}: other hosts reach this address, and nothing is served to them without TLS and "
                "identity: set server_certificate and server_key, and client_ca or tokens_file"
            )
        if self.has_identity != bool(self.policy_file):
            raise InvalidSetting(
                "client_ca or tokens_file is set, and no caller may do anything yet: set policy_file"
                if self.has_identity
                else "policy_file needs callers with an identity: set client_ca or tokens_file"
            )

    @property
    def has_identity(self) -> bool:
        """Whether callers must prove who they are."""
        return bool(self.client_ca or self.tokens_file)

    @property
    def max_payload_bytes(self) -> int:
        """Maximum size of a request, response, progress or directive: a message less 64 KiB for its other fields."""
        return self.max_message_bytes - 64 * 1024

    @property
    def events_at(self) -> str:
        return self.events_url or self.redis_url

    @property
    def store_address(self) -> Address:
        return parse_address(self.redis_url, role="store")

    @property
    def store_durability(self) -> Durability:
        return Durability.parse(self.durability)

    @property
    def events_address(self) -> Address:
        return parse_address(self.events_at)


_RANGES: Final = {
    "shards": (1, 1024),
    "heartbeat_interval_ms": (10, 3_600_000),
    "hello_timeout_ms": (10, 600_000),
    "accept_timeout_ms": (10, 600_000),
    "max_message_bytes": (256 * 1024, 256 << 20),
    "retention_ms": (1, 366 * 86_400_000),
    "progress_kept": (1, 1_000_000),
    "drain_grace_ms": (0, 600_000),
    "sweep_interval_ms": (1, 60_000),
    "max_sessions": (1, 1_000_000),
    "handshake_timeout_ms": (100, 600_000),
    "max_handshakes": (0, 1_000_000),
    "max_connections": (1, 1_000_000),
    "max_connections_per_address": (0, 1_000_000),
}
# Options by the name of their setting. Durations are the only floats.
_OPTIONS: Final = {
    each.name + "_ms" if each.type == "float" else each.name: each for each in fields(OrchestratorOptions)
}
_KINDS: Final[dict[str, type]] = {name: str if each.type == "str" else int for name, each in _OPTIONS.items()}


def _settings(options: OrchestratorOptions) -> dict[str, Any]:
    values = {name: getattr(options, each.name) for name, each in _OPTIONS.items()}
    return {name: round(value * 1000) if isinstance(value, float) else value for name, value in values.items()}


def default_settings() -> dict[str, Any]:
    """Return the default of each setting by its name."""
    return _settings(OrchestratorOptions())


def parse_listen(listen: str) -> tuple[str, int]:
    """Return host and port of a listen address.

    Raises:
        InvalidSetting: It is malformed.
    """
    match = _LISTEN.match(listen)
    if match is None or int(match["port"]) > 65_535:
        raise InvalidSetting(f"listen {listen!r} is not HOST:PORT, such as 127.0.0.1:50051")
    return match["host"].strip("[]"), int(match["port"])


def load_options(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Path | None = None
) -> OrchestratorOptions:
    """Return the options from flags, environment and configuration file.

    Args:
        flags: Settings of the command line, by name; None for those that were not given.
        environment: The process's environment.
        file: Configuration file in TOML.

    Raises:
        InvalidSetting: A setting is unknown, malformed or out of range; the message names its source.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_from_file(file))
    for name, kind in _KINDS.items():
        variable = f"ORKI_{name.upper()}"
        if variable in environment:
            values[name] = _typed(environment[variable], kind, f"the environment variable {variable}")
    for name, value in flags.items():
        if value is None:
            continue
        if name not in _KINDS:
            raise InvalidSetting(f"unknown option {name!r}; known: {', '.join(_KINDS)}")
        if name in ("redis_url", "events_url") and _has_password(str(value)):
            raise InvalidSetting(
                f"--{name.removesuffix('_url')}: a password on the command line is visible to all users of this host; "
                f"give the URL in the environment variable ORKI_{name.upper()} or in the configuration file"
            )
        values[name] = value
    return OrchestratorOptions(
        **{
            _OPTIONS[name].name: value / 1000 if _OPTIONS[name].type == "float" else value
            for name, value in values.items()
        }
    )


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        # The URL is malformed; its validation follows, and its message does not show the URL.
        return False


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
    for name, value in table.items():
        where = f"the configuration file {file}: {name} under [{TABLE}]"
        if name not in _KINDS:
            raise InvalidSetting(f"{where} is unknown; known: {', '.join(_KINDS)}")
        if type(value) is not _KINDS[name]:
            raise InvalidSetting(f"{where} must be {'a number' if _KINDS[name] is int else 'text'}, not {value!r}")
    return table


def _typed(text: str, kind: type, where: str) -> Any:
    if kind is str:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise InvalidSetting(f"{where} must be a whole number, not {text[:40]!r}") from error
