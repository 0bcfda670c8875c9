"""Constants of a submitters' session, and the checks of hello and welcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from orki.control.v1.submitter_pb2 import SubmitterHello, SubmitterWelcome
from orki_contract.errors import InvalidSetting, ProtocolVersion, RemoteProtocolError
from orki_control.session import DEFAULT_MESSAGE_BYTES, BatchBounds

PROTOCOL_MIN: Final = 1
"""Lowest supported version of the submitters' protocol."""
PROTOCOL_MAX: Final = 1
"""Highest supported version of the submitters' protocol."""
SILENT_INTERVALS: Final = 3
"""Number of pings without an answer after which the orchestrator counts as lost (law 12)."""
NUMBER_BYTES: Final = 16
"""Upper estimate of the size of a request's number and of the message's header."""
OVERHEAD_BYTES: Final = 320
"""Upper estimate of a message's size without its payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSessionOptions:
    """Settings of the client's end.

    Attributes:
        max_message_bytes: Maximum size of a received gRPC message.
        hello_timeout: Maximum wait for the welcome in seconds.
        bounds: Bounds of a batch.
    """

    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    hello_timeout: float = 10.0
    bounds: BatchBounds = field(default_factory=BatchBounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """Settings of the orchestrator's end.

    Attributes:
        orchestrator_id: Name of the orchestrator.
        max_message_bytes: Maximum size of a received gRPC message.
        hello_timeout: Maximum wait for the hello in seconds.
        max_requests: Maximum number of unanswered requests.
        max_request_bytes: Maximum size of unanswered requests.
        max_watches: Maximum number of open watches.
        ping_interval: Time without a message after which the client pings, in seconds.
        bounds: Bounds of a batch.
    """

    orchestrator_id: str
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    hello_timeout: float = 10.0
    max_requests: int = 4096
    max_request_bytes: int = 32 << 20
    max_watches: int = 65_536
    ping_interval: float = 3.0
    bounds: BatchBounds = BatchBounds()

    def __post_init__(self) -> None:
        if not self.orchestrator_id:
            raise InvalidSetting("orchestrator_id is empty: give the orchestrator a name")
        if min(self.max_requests, self.max_request_bytes, self.max_watches) < 1:
            raise InvalidSetting("a session needs room for at least one request and one watch")
        if self.hello_timeout <= 0 or self.ping_interval <= 0:
            raise InvalidSetting("hello_timeout and ping_interval: use more than 0 seconds")


def check_hello(hello: SubmitterHello) -> None:
    """Check a hello.

    Raises:
        ProtocolVersion: The two sides have no protocol version in common.
        RemoteProtocolError: A field is missing or out of its range.
    """
    if not 1 <= hello.protocol_min <= hello.protocol_max:
        raise RemoteProtocolError(
            f"hello: {hello.protocol_min} to {hello.protocol_max} is not a range of protocol versions"
        )
    if hello.protocol_max < PROTOCOL_MIN or hello.protocol_min > PROTOCOL_MAX:
        raise ProtocolVersion(
            f"the client speaks submitters' protocol {hello.protocol_min} to {hello.protocol_max}, the orchestrator "
            f"{PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older of the two"
        )
    if hello.max_message_bytes < 1024:
        raise RemoteProtocolError(f"hello: max_message_bytes {hello.max_message_bytes} is less than 1024")


def check_welcome(welcome: SubmitterWelcome) -> None:
    """Check a welcome.

    Raises:
        RemoteProtocolError: A field is missing or out of its range.
    """
    if not PROTOCOL_MIN <= welcome.protocol <= PROTOCOL_MAX:
        raise RemoteProtocolError(f"welcome: protocol {welcome.protocol} was not offered")
    bounds = (welcome.max_requests, welcome.max_request_bytes, welcome.max_watches, welcome.ping_interval_ms)
    if not all(bounds) or welcome.max_message_bytes < 1024:
        raise RemoteProtocolError("welcome: a bound or the ping interval is missing, or messages are below 1024 bytes")
