"""How a client or an agent proves who it is, and which orchestrators it trusts.

TLS protects a connection as soon as `ca` is set. An identity is a certificate with a SPIFFE name, or a bearer token.
A token travels with each call, so it never leaves this host without TLS.
"""

from __future__ import annotations

__all__ = ["VARIABLES", "Credentials", "Metadata", "TokenChannel", "read_pem", "read_secret"]

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from orki_contract.errors import InvalidSetting

if TYPE_CHECKING:
    import grpc

Metadata: TypeAlias = tuple[tuple[str, str], ...]
"""Metadata of a call."""
VARIABLES: Final = {
    "ca": "ORKI_TLS_CA",
    "certificate": "ORKI_TLS_CERTIFICATE",
    "key": "ORKI_TLS_KEY",
    "server_name": "ORKI_TLS_SERVER_NAME",
    "token_file": "ORKI_TOKEN_FILE",
    "token": "ORKI_TOKEN",
}
"""Environment variable of each field of `Credentials`."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}\Z")
_FILE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Credentials of a client or an agent. Files are read again for every new channel, and the token for every call.

    Attributes:
        ca: PEM file with the authorities that may have signed an orchestrator's certificate. Turns TLS on.
        certificate: PEM file with the own certificate chain, whose URI name is `spiffe://DOMAIN/…`.
        key: PEM file with the key of the certificate.
        server_name: Name in the orchestrator's certificate; empty for the host that is connected to.
        token_file: File with the bearer token.
        token: The bearer token itself, for programs that get it from elsewhere.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""
    server_name: str = ""
    token_file: str = ""
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            given, missing = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise InvalidSetting(f"{_name(given)} needs {_name(missing)}: set both, or none")
        for name in ("certificate", "server_name"):
            if getattr(self, name) and not self.ca:
                raise InvalidSetting(f"{_name(name)} needs {_name('ca')}, which turns TLS on")
        if self.token and self.token_file:
            raise InvalidSetting(f"{_name('token')} and {_name('token_file')} are both set: set one")
        self.metadata()
        self._pem()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **given: str | None) -> Credentials:
        """Return the credentials of the environment.

        Args:
            environment: The process's environment.
            given: Fields that take precedence; empty ones do not.

        Raises:
            InvalidSetting: A file cannot be read or is malformed, or fields do not fit together.
        """
        found = {each.name: environment.get(VARIABLES[each.name], "") for each in fields(cls)}
        if given.get("token_file"):
            found["token"] = ""
        return cls(**(found | {name: value for name, value in given.items() if value}))

    @property
    def encrypted(self) -> bool:
        """Whether connections use TLS."""
        return bool(self.ca)

    @property
    def has_token(self) -> bool:
        return bool(self.token or self.token_file)

    def metadata(self) -> Metadata:
        """Return the metadata that proves the identity in a call.

        Raises:
            InvalidSetting: The token file cannot be read, or the token is malformed.
        """
        token, where = self.token, _name("token")
        if self.token_file:
            where = f"{_name('token_file')} {self.token_file}"
            token = read_secret(self.token_file, _name("token_file")).decode("ascii", "replace").strip()
        if not token and not self.token_file:
            return ()
        if not _TOKEN.match(token):
            raise InvalidSetting(f"{where} holds no token: 16 to 512 letters, digits or `._~+/=-` in one line")
        return (("authorization", f"Bearer {token}"),)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials for a channel with TLS.

        Raises:
            InvalidSetting: A file cannot be read or is not PEM.
        """
        import grpc

        ca, certificate, key = self._pem()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def _pem(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        return (
            read_pem(self.ca, _name("ca"), b"CERTIFICATE") if self.ca else None,
            read_pem(self.certificate, _name("certificate"), b"CERTIFICATE") if self.certificate else None,
            read_pem(self.key, _name("key"), b"PRIVATE KEY", secret=True) if self.key else None,
        )


def read_pem(file: str, setting: str, kind: bytes, *, secret: bool = False) -> bytes:
    """Return the content of a PEM file.

    Args:
        file: Its path.
        setting: Name of the setting, for the message.
        kind: What the file must contain, such as `CERTIFICATE`.
        secret: Whether other users must not be able to read it.

    Raises:
        InvalidSetting: It cannot be read, contains something else, or is readable by others.
    """
    content = read_secret(file, setting) if secret else _read(file, setting)
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind + rb"-----\s", content):
        raise InvalidSetting(f"{setting} {file}: the file contains no PEM block {kind.decode()}")
    return content


def read_secret(file: str, setting: str) -> bytes:
    """Return the content of a file that only its owner and group may read.

    Raises:
        InvalidSetting: It cannot be read, or others may read it.
    """
    content = _read(file, setting)
    if stat.S_IMODE(os.stat(file).st_mode) & 0o007:
        raise InvalidSetting(f"{setting} {file}: all users of this host can access the file; run chmod o= {file}")
    return content


def _read(file: str, setting: str) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the path is not valid"
        raise InvalidSetting(f"{setting} {file}: the file cannot be read: {reason}") from error
    if len(content) > _FILE_BYTES:
        raise InvalidSetting(f"{setting} {file}: the file is larger than {_FILE_BYTES} bytes")
    return content


def _name(field_name: str) -> str:
    return f"{field_name} ({VARIABLES[field_name]})"


class TokenChannel:
    """A gRPC channel that adds the metadata of credentials to each call.

    An interceptor of grpc.aio would put a task and a queue of its own before each stream.
    """

    def __init__(self, channel: grpc.aio.Channel, credentials: Credentials) -> None:
        self._channel = channel
        self._credentials = credentials

    async def __aenter__(self) -> Self:
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        return self._with_metadata(found) if name.endswith(("_unary", "_stream")) else found

    def _with_metadata(self, create: Any) -> Any:
        def multicallable(*arguments: Any, **named: Any) -> Any:
            call = create(*arguments, **named)

            def start(*arguments: Any, metadata: Any = (), **named: Any) -> Any:
                return call(*arguments, metadata=(*(metadata or ()), *self._credentials.metadata()), **named)

            return start

        return multicallable
