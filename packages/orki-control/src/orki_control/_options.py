"""Settings of a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from orki_contract.backoff import JitterOptions
from orki_contract.errors import InvalidSetting
from orki_control.credentials import Credentials
from orki_control.session._options import DEFAULT_MESSAGE_BYTES

_BACKOFF: Final = JitterOptions(maximum=2.0)
_NO_CREDENTIALS: Final = Credentials()
ROOM: Final = 64 * 1024
"""Bytes of a Submit message reserved for fields other than payloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Settings of a client. Durations are seconds.

    Attributes:
        patience: How long calls are repeated while the orchestrator is unavailable; 0 for a single try.
        call_timeout: Maximum duration of one try.
        max_message_bytes: Maximum gRPC message size in either direction.
        insecure: Whether plaintext may leave this host.
        credentials: Own identity, and the trusted orchestrators; by default, none and plaintext.
        backoff: Waits between tries.
    """

    patience: float = 15.0
    call_timeout: float = 10.0
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    insecure: bool = False
    credentials: Credentials = _NO_CREDENTIALS
    backoff: JitterOptions = _BACKOFF

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise InvalidSetting(f"patience {self.patience}: use 0 or more seconds")
        if self.call_timeout <= 0:
            raise InvalidSetting(f"call_timeout {self.call_timeout}: use more than 0 seconds")
        if self.max_message_bytes < 2 * ROOM:
            raise InvalidSetting(f"max_message_bytes {self.max_message_bytes}: use at least {2 * ROOM}")
