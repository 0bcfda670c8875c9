"""The handshake of both ends: hello, and welcome or refusal."""

from __future__ import annotations

import hmac
from typing import Final

from orki.hotpath.v1.tool_orki import HelloFrame, WelcomeFrame
from orki_agent.hotpath.frames import (
    HEADER_BYTES,
    OP_ERROR,
    OP_HELLO,
    OP_WELCOME,
    PROTOCOL,
    Frame,
    decode_error,
    encode_hello,
    encode_welcome,
)
from orki_agent.hotpath.options import BridgeOptions
from orki_contract.errors import FrameVersion, InvalidArgument, InvalidSetting, PeerRefused, RemoteProtocolError

__all__ = ["HELLO_BYTES", "TOKEN_BYTES", "greet", "hello_frame", "read_welcome"]

TOKEN_BYTES: Final = 32
NAME_BYTES: Final = 256
HELLO_BYTES: Final = HEADER_BYTES + 40 + NAME_BYTES + 512
"""Longest frame before the handshake is done; leaves room for fields of later versions."""


def hello_frame(token: bytes, name: str) -> bytes:
    """The client's first frame.

    Raises:
        InvalidSetting: Token or name cannot be sent.
    """
    if len(token) != TOKEN_BYTES:
        raise InvalidSetting(f"the token must be {TOKEN_BYTES} bytes, as the bridge's `token` is")
    if not 0 < len(name.encode()) <= NAME_BYTES:
        raise InvalidSetting(f"the client's name must have 1 to {NAME_BYTES} bytes of UTF-8")
    return encode_hello(HelloFrame(token=token, protocol_min=PROTOCOL, protocol_max=PROTOCOL, client=name))


def greet(frame: Frame, token: bytes, options: BridgeOptions) -> tuple[str, bytes]:
    """Looks at a client's first frame; gives its name and the answer.

    Raises:
        RemoteProtocolError: It is no hello.
        FrameMalformed: It is a broken one.
        FrameVersion: No version suits both.
        PeerRefused: The token is not the bridge's.
    """
    if frame.opcode != OP_HELLO or frame.flags or frame.correlation:
        raise RemoteProtocolError(f"a connection begins with a hello, this one began with opcode {frame.opcode:#06x}")
    hello = HelloFrame.decode(frame.body, frame.block_length, frame.version)
    if not hmac.compare_digest(hello.token or b"", token):
        raise PeerRefused("the token is not this bridge's")
    if not (hello.protocol_min or 0) <= PROTOCOL <= (hello.protocol_max or 0):
        raise FrameVersion(
            f"the client speaks protocol versions {hello.protocol_min} to {hello.protocol_max}, the bridge {PROTOCOL}"
        )
    if not 0 < len(hello.client.encode()) <= NAME_BYTES:
        raise InvalidArgument(f"the client's name must have 1 to {NAME_BYTES} bytes")
    welcome = WelcomeFrame(max_frame_bytes=options.max_frame_bytes, max_calls=options.max_calls, protocol=PROTOCOL)
    return hello.client, encode_welcome(welcome)


def read_welcome(frame: Frame) -> WelcomeFrame:
    """The bridge's answer to the hello.

    Raises:
        OrkiError: The typed error by which the bridge refuses.
        RemoteProtocolError: It is no answer to a hello.
    """
    if frame.opcode == OP_ERROR:
        raise decode_error(frame)
    if frame.opcode != OP_WELCOME or frame.correlation:
        raise RemoteProtocolError(f"the bridge answered the hello with opcode {frame.opcode:#06x}")
    welcome = WelcomeFrame.decode(frame.body, frame.block_length, frame.version)
    if welcome.protocol != PROTOCOL:
        raise FrameVersion(f"the bridge chose protocol version {welcome.protocol}, this client speaks {PROTOCOL}")
    return welcome
