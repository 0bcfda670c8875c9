"""Files that change while the orchestrator runs: certificates, tokens and the policy."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

import grpc

from orki_contract.errors import InvalidSetting
from orki_control.credentials import read_pem

V = TypeVar("V")

_LOOK_INTERVAL: Final = 0.5
"""Seconds between two looks at a file."""
_log = logging.getLogger("orki.server.identity")


class WatchedFiles(Generic[V]):
    """A value that is read from files, and again when one of them changes. Malformed files change nothing.

    Args:
        files: Their paths.
        load: Reads the value.

    Attributes:
        value: The newest valid value.

    Raises:
        InvalidSetting: A file cannot be read or is malformed.
    """

    def __init__(self, files: Sequence[str], load: Callable[[], V]) -> None:
        self._files = files
        self._load = load
        self._stamps = self._stamp()
        self.value = load()

    def refresh(self) -> None:
        """Read the value again if a file has changed."""
        stamps = self._stamp()
        if stamps == self._stamps:
            return
        self._stamps = stamps
        try:
            self.value = self._load()
            _log.warning("%s: the new content applies", ", ".join(self._files))
        except InvalidSetting as error:
            _log.error("%s; the former content still applies", error.message)

    def _stamp(self) -> list[object]:
        """Return what changes with the content of the files."""
        stamps: list[object] = []
        for file in self._files:
            try:
                found = os.stat(file)
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                stamps.append(None)
        return stamps


async def watch_files(watched: Sequence[WatchedFiles[Any]]) -> None:
    """Keep values up to date with their files until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_INTERVAL)
        for each in watched:
            each.refresh()


def watch_certificates(certificate: str, key: str, client_ca: str) -> WatchedFiles[grpc.ServerCertificateConfiguration]:
    """Return the server's certificate, its key, and the authorities of its clients.

    Args:
        certificate: PEM file with the certificate chain.
        key: PEM file with its key.
        client_ca: PEM file with the authorities of clients' certificates; empty if clients need none.

    Raises:
        InvalidSetting: A file cannot be read or is malformed, or the key is not the certificate's.
    """

    def load() -> grpc.ServerCertificateConfiguration:
        chain = read_pem(certificate, "server_certificate", b"CERTIFICATE")
        private = read_pem(key, "server_key", b"PRIVATE KEY", secret=True)
        ca = read_pem(client_ca, "client_ca", b"CERTIFICATE") if client_ca else None
        try:
            # gRPC would refuse every handshake instead.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except (ssl.SSLError, OSError) as error:
            raise InvalidSetting(
                f"server_key {key} is not a key without password for server_certificate {certificate}: {error}"
            ) from error
        return grpc.ssl_server_certificate_configuration([(private, chain)], root_certificates=ca)

    return WatchedFiles([file for file in (certificate, key, client_ca) if file], load)


def server_credentials(
    certificates: WatchedFiles[grpc.ServerCertificateConfiguration], *, ask_clients: bool
) -> grpc.ServerCredentials:
    """Return gRPC's credentials. Each handshake uses the newest certificate; open connections stay."""
    # gRPC asks in a thread of its own, so the files are not read there.
    return grpc.dynamic_ssl_server_credentials(
        certificates.value, lambda: certificates.value, require_client_authentication=ask_clients
    )
