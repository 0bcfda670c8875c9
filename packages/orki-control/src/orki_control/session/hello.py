"""How two ends greet: building and checking hello and welcome, as far as neither needs to know the fleet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from orki.control.v1.session_pb2 import HeldAttempt, Hello, Welcome
from orki_contract.errors import ProtocolVersion, RemoteProtocolError
from orki_control.session.options import AGENT_ID, MAX_SLOTS, PROTOCOL_MAX, PROTOCOL_MIN, AgentSessionOptions

__all__ = ["build_hello", "check_hello", "check_welcome", "chosen_protocol"]

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_INSTANCE_ID_BYTES: Final = 256


def build_hello(options: AgentSessionOptions, held: Iterable[HeldAttempt]) -> Hello:
    """The hello of an agent that holds these attempts."""
    return Hello(
        agent_id=options.agent_id,
        instance_id=options.instance_id,
        protocol_min=PROTOCOL_MIN,
        protocol_max=PROTOCOL_MAX,
        services=options.services,
        slots=options.slots,
        max_message_bytes=options.max_message_bytes,
        held=held,
    )


def check_hello(hello: Hello) -> None:
    """Checks everything that can be judged without knowing the fleet.

    Raises:
        ProtocolVersion: No protocol version suits both sides.
        RemoteProtocolError: A field is missing, malformed or out of its range.
    """
    if not 1 <= hello.protocol_min <= hello.protocol_max:
        raise RemoteProtocolError(f"hello: protocol versions {hello.protocol_min} to {hello.protocol_max} are no range")
    if hello.protocol_max < PROTOCOL_MIN or hello.protocol_min > PROTOCOL_MAX:
        raise ProtocolVersion(
            f"the agent speaks session protocol {hello.protocol_min} to {hello.protocol_max}, the orchestrator "
            f"{PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older of the two"
        )
    if not AGENT_ID.match(hello.agent_id):
        raise RemoteProtocolError(f"hello: agent_id {hello.agent_id[:160]!r} is not 1 to 128 of A-Z a-z 0-9 - _ .")
    if not hello.instance_id or len(hello.instance_id.encode()) > _INSTANCE_ID_BYTES:
        raise RemoteProtocolError(f"hello: instance_id is empty or longer than {_INSTANCE_ID_BYTES} bytes")
    if not 1 <= hello.slots <= MAX_SLOTS:
        raise RemoteProtocolError(f"hello: {hello.slots} slots are not 1 to {MAX_SLOTS}")
    if hello.max_message_bytes < 1024:
        raise RemoteProtocolError(f"hello: max_message_bytes {hello.max_message_bytes} is less than 1024")
    names = [served.service for served in hello.services]
    if len(set(names)) != len(names) or not all(names):
        raise RemoteProtocolError("hello: a service has no name, or is there twice")
    for served in hello.services:
        if not _DIGEST.match(served.digest):
            raise RemoteProtocolError(f"hello: {served.service} has no digest of the form sha256:<64 hex digits>")
    for held in hello.held:
        if not held.attempt.task_id or not held.attempt.fence:
            raise RemoteProtocolError("hello: a held attempt has no task or no fence")


def chosen_protocol(hello: Hello) -> int:
    """The highest version that both sides speak."""
    return min(hello.protocol_max, PROTOCOL_MAX)


def check_welcome(welcome: Welcome) -> None:
    """Checks what the agent is to go by.

    Raises:
        RemoteProtocolError: A field is missing or out of its range.
    """
    if not PROTOCOL_MIN <= welcome.protocol <= PROTOCOL_MAX:
        raise RemoteProtocolError(f"welcome: protocol {welcome.protocol} was not offered")
    if not welcome.heartbeat_interval_ms or welcome.max_message_bytes < 1024:
        raise RemoteProtocolError("welcome: no heartbeat interval, or messages of less than 1024 bytes")
