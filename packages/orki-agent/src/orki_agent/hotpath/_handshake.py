"""The handshake of both ends (hello, then welcome or error), and the contract check before a service's first call.

Frames carry no names, so a frame of another contract would be misread without an error. Once for each service and
connection, the client asks for the bridge's contract and compares it with its own by the rules of
`orki_contract.findings`. It calls no incompatible service. Code without an image (`contract.binpb`) is not checked.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

from orki.hotpath.v1.tool_orki import ContractAnswerFrame, ContractFrame, ErrorFrame, HelloFrame, WelcomeFrame
from orki_agent.hotpath import frames
from orki_agent.hotpath._handlers import ToolHandler
from orki_agent.hotpath._machine import ClientMachine, ReplyReceived
from orki_agent.hotpath._options import BridgeOptions
from orki_agent.hotpath._tool_codec import RemoteTool
from orki_agent.hotpath.frames import PROTOCOL, Frame
from orki_contract import Tool, errors
from orki_contract.findings import Fit, service_fit
from orki_contract.images import image_of, package_version, service_digest
from orki_contract.read import read_image

TOKEN_BYTES: Final = 32
_NAME_BYTES: Final = 256
HELLO_BYTES: Final = frames.HEADER_BYTES + 40 + _NAME_BYTES + 512
"""Longest frame before the handshake is complete; leaves room for fields of later versions."""

_CONTRACT: Final = Tool.declare(
    "orki.hotpath.v1.ToolBridge/Contract",
    opcode=frames.OP_CONTRACT,
    request=ContractFrame,
    response=ContractAnswerFrame,
)
CONTRACT_TOOL: Final = RemoteTool(_CONTRACT)
"""The tool by which a client asks for the bridge's contract."""

_PREFIX: Final = "sha256:"
_NO_DIGEST: Final = bytes(32)
_MAX_CACHED: Final = 64
_DIGITS: Final = 12


def hello_frame(token: bytes, name: str) -> bytes:
    """Return the client's first frame.

    Raises:
        InvalidSetting: Token or name have the wrong length.
    """
    if len(token) != TOKEN_BYTES:
        raise errors.InvalidSetting(f"the token has {len(token)} bytes, it must have {TOKEN_BYTES} bytes")
    if not 0 < len(name.encode()) <= _NAME_BYTES:
        raise errors.InvalidSetting(f"the client's name must have 1 to {_NAME_BYTES} bytes of UTF-8")
    return frames.encode_hello(HelloFrame(token=token, protocol_min=PROTOCOL, protocol_max=PROTOCOL, client=name))


def accept_hello(frame: Frame, token: bytes, options: BridgeOptions) -> tuple[str, bytes]:
    """Check a client's hello; return its name and the welcome frame.

    Raises:
        RemoteProtocolError: The frame has flags.
        FrameMalformed: The frame cannot be decoded.
        FrameVersion: Client and bridge have no protocol version in common.
        PeerRefused: The token is wrong.
        InvalidArgument: The name has the wrong length.
    """
    if frame.flags:
        raise errors.RemoteProtocolError(f"the hello has flags ({frame.flags:#04x}), it must have none")
    hello = HelloFrame.decode(frame.body, frame.block_length, frame.version)
    if not hmac.compare_digest(hello.token or b"", token):
        raise errors.PeerRefused("the token is not this bridge's")
    if not (hello.protocol_min or 0) <= PROTOCOL <= (hello.protocol_max or 0):
        raise errors.FrameVersion(
            f"the client speaks protocol versions {hello.protocol_min} to {hello.protocol_max}, the bridge {PROTOCOL}"
        )
    if not 0 < len(hello.client.encode()) <= _NAME_BYTES:
        raise errors.InvalidArgument(f"the client's name must have 1 to {_NAME_BYTES} bytes")
    welcome = WelcomeFrame(max_frame_bytes=options.max_frame_bytes, max_calls=options.max_calls, protocol=PROTOCOL)
    return hello.client, frames.encode_welcome(welcome)


def read_welcome(machine: ClientMachine[Any], frame: Frame) -> WelcomeFrame:
    """Read the bridge's answer to the hello.

    Raises:
        OrkiError: The bridge refuses the connection with this error.
        RemoteProtocolError: The frame is no answer to a hello.
        FrameVersion: The bridge chose another protocol version.
    """
    if frame.opcode == frames.OP_ERROR:
        machine.receive(ErrorFrame)
        raise frames.decode_error(frame)
    machine.receive(WelcomeFrame if frame.opcode == frames.OP_WELCOME and not frame.correlation else ReplyReceived)
    welcome = WelcomeFrame.decode(frame.body, frame.block_length, frame.version)
    if welcome.protocol != PROTOCOL:
        raise errors.FrameVersion(
            f"the bridge chose protocol version {welcome.protocol}, this client speaks {PROTOCOL}"
        )
    return welcome


@dataclass(frozen=True, slots=True)
class _OwnContract:
    digest: bytes
    image: bytes


def contract_request(service: str) -> ContractFrame | None:
    """Return the request that a client sends before the first call of a service; None if its code has no image.

    The first request for a service in a process reads its image, which takes milliseconds.
    """
    own = _own_contract(service)
    return ContractFrame(digest=own.digest, service=service) if own else None


def check_contract(service: str, answer: ContractAnswerFrame) -> None:
    """Compare the bridge's contract of a service with this process's.

    Raises:
        ContractMismatch: Neither contract is a compatible evolution of the other.
        UnknownMethod: The bridge does not serve the service; its opcodes may belong to another service of the bridge.
        InvalidContract: The bridge's image cannot be read or lacks the service.
    """
    own = _own_contract(service)
    if own is None:
        return
    if not answer.served:
        raise errors.UnknownMethod(
            f"the tool bridge does not serve {service}: pass an instance of that service to ToolBridge"
        )
    if answer.digest in (own.digest, _NO_DIGEST):
        return
    fit = _fit(service, own.image, answer.image)
    if not fit.compatible:
        direction = "client's to the bridge's" if fit.breaks is fit.forward else "bridge's to the client's"
        raise errors.ContractMismatch(
            f"the tool bridge serves {service} under the contract {_short(answer.digest)}, which is incompatible with "
            f"this client's {_named(service, own.digest)}. From the {direction}, {fit}. Install compatible versions of "
            "the contract's package at both ends"
        )


def contract_handler(tools: Iterable[ToolHandler]) -> ToolHandler:
    """Return the handler of `CONTRACT_TOOL` for a bridge with these tools."""
    services = {tool.name.partition("/")[0] for tool in tools}

    def answer(request: ContractFrame, call: Any) -> ContractAnswerFrame:
        own = _own_contract(request.service) if request.service in services else None
        if own is None:
            return ContractAnswerFrame(digest=_NO_DIGEST, served=request.service in services)
        image = b"" if own.digest == request.digest else own.image
        return ContractAnswerFrame(digest=own.digest, served=True, image=image)

    return ToolHandler(_CONTRACT, answer, is_async=False)


@cache
def _own_contract(service: str) -> _OwnContract | None:
    try:
        image = image_of(service.rpartition(".")[0])
        digest = service_digest(image, service)
    except errors.InvalidContract:
        return None
    return _OwnContract(bytes.fromhex(digest.removeprefix(_PREFIX)), image)


@lru_cache(maxsize=_MAX_CACHED)
def _fit(service: str, own: bytes, other: bytes) -> Fit:
    read = read_image(other)
    if not any(tool.service == service for tool in read.contract.tools):
        raise errors.InvalidContract(f"the bridge's image of {service} declares no such tool service")
    return service_fit(service, read_image(own), read)


def _named(service: str, digest: bytes) -> str:
    version = package_version(service.rpartition(".")[0])
    return f"{version} ({_short(digest)})" if version else _short(digest)


def _short(digest: bytes | None) -> str:
    return f"{_PREFIX}{(digest or b'').hex()[:_DIGITS]}"
