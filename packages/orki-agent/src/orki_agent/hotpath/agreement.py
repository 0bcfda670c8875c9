"""Whether a tool client and a bridge were made for contracts that fit; asked once for each service and connection.

Opcodes and layouts carry no names, so a frame of another contract would be misread without a word. The client asks, and
judges: it learns the bridge's contract, compares it with its own by the rules of `orki_contract.findings`, and calls
nothing of a service that does not fit. Code without an image (`contract.binpb`) has nothing to compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

from orki.hotpath.v1.tool_orki import ContractAnswerFrame, ContractFrame
from orki_agent.hotpath.frames import OP_CONTRACT
from orki_agent.hotpath.plans import Plan
from orki_agent.hotpath.served import ServedTool
from orki_contract import Tool
from orki_contract.errors import ContractMismatch, InvalidContract, UnknownMethod
from orki_contract.findings import Fit, service_fit
from orki_contract.images import image_of, service_digest
from orki_contract.provenance import package_version
from orki_contract.read import read_image

__all__ = ["ASKING", "check_answer", "contract_tool", "question"]

_CONTRACT: Final = Tool.declare(
    "orki.hotpath.v1.ToolBridge/Contract",
    opcode=OP_CONTRACT,
    request=ContractFrame,
    response=ContractAnswerFrame,
)
ASKING: Final = Plan(_CONTRACT)
"""How the question travels: as any call does."""

_PREFIX: Final = "sha256:"
_NO_DIGEST: Final = bytes(32)
_IMAGES: Final = 64
_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class _Own:
    digest: bytes
    image: bytes


def question(service: str) -> ContractFrame | None:
    """What a client asks of a service before its first call; None where its code has no image.

    The first question of a service in a process reads its image, which takes milliseconds.
    """
    own = _own(service)
    return ContractFrame(digest=own.digest, service=service) if own else None


def check_answer(service: str, answer: ContractAnswerFrame) -> None:
    """Judges what the bridge said.

    Raises:
        ContractMismatch: Neither contract is a compatible evolution of the other.
        UnknownMethod: The bridge does not serve the service: its opcodes may be another's there.
        InvalidContract: The bridge's image is none, or lacks the service.
    """
    own = _own(service)
    if own is None:
        return
    if not answer.served:
        raise UnknownMethod(
            f"the tool bridge does not serve {service}; give its ToolBridge an instance of that service"
        )
    if answer.digest in (own.digest, _NO_DIGEST):
        return
    fit = _fit(service, own.image, answer.image)
    if not fit.compatible:
        way = "client's to the bridge's" if fit.breaks is fit.forward else "bridge's to the client's"
        raise ContractMismatch(
            f"the tool bridge serves {service} under the contract {_short(answer.digest)}, which does not fit "
            f"{_named(service, own.digest)}, for which this client was made. From the {way}, {fit}. Install the "
            "package of that contract in versions that fit, at both ends"
        )


def contract_tool(tools: Iterable[ServedTool]) -> ServedTool:
    """What answers the question at a bridge with these tools."""
    services = {tool.name.partition("/")[0] for tool in tools}

    def answer(request: ContractFrame, call: Any) -> ContractAnswerFrame:
        own = _own(request.service) if request.service in services else None
        if own is None:
            return ContractAnswerFrame(digest=_NO_DIGEST, served=request.service in services)
        image = b"" if own.digest == request.digest else own.image
        return ContractAnswerFrame(digest=own.digest, served=True, image=image)

    return ServedTool(_CONTRACT, answer, is_async=False)


@cache
def _own(service: str) -> _Own | None:
    try:
        image = image_of(service.rpartition(".")[0])
        digest = service_digest(image, service)
    except InvalidContract:
        return None
    return _Own(bytes.fromhex(digest.removeprefix(_PREFIX)), image)


@lru_cache(maxsize=_IMAGES)
def _fit(service: str, own: bytes, other: bytes) -> Fit:
    read = read_image(other)
    if not any(tool.service == service for tool in read.contract.tools):
        raise InvalidContract(f"the bridge's image of the service {service} declares no such tool service")
    return service_fit(service, read_image(own), read)


def _named(service: str, digest: bytes) -> str:
    """A contract of this process, with the version of the distribution that brought it."""
    version = package_version(service.rpartition(".")[0])
    return f"{version} ({_short(digest)})" if version else _short(digest)


def _short(digest: bytes | None) -> str:
    return f"{_PREFIX}{(digest or b'').hex()[:_DIGITS]}"
