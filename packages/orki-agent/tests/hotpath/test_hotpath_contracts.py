"""Clients and bridges of different contracts: compatible ones work, others are refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet
from hotpath_tools import WAIT_SECONDS, SampleTools
from sourcereview.v1.tools_orki import (
    MeasureFileRequest,
    MeasureFileResponse,
    SourceToolServiceClient,
    SourceToolServiceSyncBase,
    SourceToolServiceSyncClient,
)
from sourcereview.v1.tools_pb2 import ReadFileRequest, ReadFileResponse

from orki.hotpath.v1.tool_orki import ContractAnswerFrame
from orki_agent.hotpath import AsyncToolClient, SyncToolClient, ToolBridge
from orki_agent.hotpath._handshake import check_contract
from orki_agent.hotpath.frames import OP_CONTRACT
from orki_contract import ToolCall
from orki_contract.errors import ContractMismatch, InvalidContract, OrkiError, UnknownMethod
from orki_contract.images import image_of, service_digest

SERVICE = "sourcereview.v1.SourceToolService"
PACKAGE = "sourcereview.v1"


class Source(SourceToolServiceSyncBase):
    """Tools that count their calls."""

    calls = 0

    def measure_file(self, request: MeasureFileRequest, call: ToolCall) -> MeasureFileResponse:
        Source.calls += 1
        return MeasureFileResponse(size=len(request.path), newlines=0)

    def read_file(self, request: ReadFileRequest, call: ToolCall) -> ReadFileResponse:
        Source.calls += 1
        return ReadFileResponse(content=request.path, end=True)


def edited(edit: Callable[[DescriptorProto], None]) -> bytes:
    """Return the image of the tools with an edited ReadFileRequest."""
    image = FileDescriptorSet.FromString(image_of(PACKAGE))
    (message,) = (each for file in image.file for each in file.message_type if each.name == "ReadFileRequest")
    edit(message)
    return image.SerializeToString(deterministic=True)


def grown(message: DescriptorProto) -> None:
    """Add a field."""
    kind = FieldDescriptorProto
    message.field.add(name="follow", number=9, type=kind.TYPE_BOOL, label=kind.LABEL_OPTIONAL, json_name="follow")


def retyped(message: DescriptorProto) -> None:
    """Change the type of a field."""
    (field,) = (each for each in message.field if each.name == "length")
    field.type = FieldDescriptorProto.TYPE_STRING


@contextmanager
def serving(folder: Path, image: bytes) -> Iterator[tuple[str, bytes, subprocess.Popen[str]]]:
    """Run a bridge in a process whose generated package has another image."""
    home = folder.joinpath(*PACKAGE.split("."))
    home.mkdir(parents=True)
    (home / "contract.binpb").write_bytes(image)
    # Both folders are parts of one namespace package; the image is in the first.
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{_BRIDGE}", str(Path(__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            path, token = process.stdout.readline().split()
            yield path, bytes.fromhex(token), process
        finally:
            process.communicate(timeout=WAIT_SECONDS)


_BRIDGE = """
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
sys.path.insert(1, str(Path(sys.argv[1]).parent))
spec = spec_from_file_location("served", sys.argv[1])
served = module_from_spec(spec)
sys.modules["served"] = served
spec.loader.exec_module(served)
with served.ToolBridge(served.Source()) as bridge:
    print(bridge.path, bridge.token.hex(), flush=True)
    sys.stdin.read()
print(served.Source.calls, flush=True)
"""


def both(path: str, token: bytes) -> list[Any]:
    """Return the results or errors of calls through each client."""
    request = MeasureFileRequest(path=b"four")

    async def call() -> Any:
        client = AsyncToolClient(path, token, name="x")
        try:
            tools = SourceToolServiceClient(client)
            return await asyncio.gather(*(tools.measure_file(request) for _ in range(3)), return_exceptions=True)
        finally:
            await client.close()

    with SyncToolClient(path, token, name="x") as client:
        tools = SourceToolServiceSyncClient(client)
        outcomes: list[Any] = []
        for _ in range(2):
            try:
                outcomes.append(tools.measure_file(request))
            except OrkiError as error:
                outcomes.append(error)
    return [*outcomes, *asyncio.run(call())]


def test_equal_and_compatible_contracts_are_served(tmp_path: Path) -> None:
    for name, image in (("same", image_of(PACKAGE)), ("grown", edited(grown))):
        with serving(tmp_path / name, image) as (path, token, process):
            assert both(path, token) == [MeasureFileResponse(size=4, newlines=0)] * 5
            out, _ = process.communicate(timeout=WAIT_SECONDS)
        assert out == "5\n"


def test_an_incompatible_contract_is_refused_before_any_call(tmp_path: Path) -> None:
    image = edited(retyped)
    with serving(tmp_path, image) as (path, token, process):
        outcomes = both(path, token)
        out, _ = process.communicate(timeout=WAIT_SECONDS)
    assert out == "0\n"
    assert [type(each) for each in outcomes] == [ContractMismatch] * 5
    for words in (str(each) for each in outcomes):
        assert "ORKI_FIELD_RETYPED" in words
        assert service_digest(image, SERVICE)[:19] in words
        assert service_digest(image_of(PACKAGE), SERVICE)[:19] in words


def test_a_service_that_the_bridge_lacks_is_not_called() -> None:
    with ToolBridge(SampleTools()) as bridge:
        outcomes = both(bridge.path, bridge.token)
    assert [type(each) for each in outcomes] == [UnknownMethod] * 5
    assert SERVICE in str(outcomes[0])


def test_a_bridge_without_the_contract_check_is_called() -> None:
    bridge = ToolBridge(Source())
    del bridge._tools[OP_CONTRACT]
    with bridge:
        assert both(bridge.path, bridge.token) == [MeasureFileResponse(size=4, newlines=0)] * 5


@pytest.mark.parametrize("image", [b"", b"\xff\xff", image_of("orki.hotpath.v1")])
def test_an_answer_without_a_contract_is_refused(image: bytes) -> None:
    answer = ContractAnswerFrame(digest=bytes(31) + b"\1", served=True, image=image)
    with pytest.raises(InvalidContract):
        check_contract(SERVICE, answer)


def test_code_without_an_image_is_not_checked() -> None:
    assert check_contract(SERVICE, ContractAnswerFrame(digest=bytes(32), served=True)) is None
