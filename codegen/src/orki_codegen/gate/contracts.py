"""Contracts against what users have: orki's rules of change, and buf's own on the same two images."""

from __future__ import annotations

__all__ = ["Present", "contract_remarks", "present"]

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_codegen.buf import Buf
from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Past
from orki_codegen.gate.remarks import Remark
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract
from orki_contract.findings import RULES, Bump, Category, Finding, Plane, findings
from orki_contract.images import IMAGE_NAME, package_images
from orki_contract.read import read_image
from orki_contract.versions import ContractVersion

_BUF_RULES: Final = "FILE"
# Of a declaration that carries entries: `stream "findings"`, as findings name those who are concerned.
_STREAM: Final = "stream "


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """The tree as it is now.

    Attributes:
        root: Its folder.
        members: Its distributions, by name.
        contract: What its protos say.
        images: What each proto package's wheel is to ship.
        drifted: Where the generated image of a package is not what the protos say, by package.
    """

    root: Path
    members: Mapping[str, Member]
    contract: ContractVersion
    images: Mapping[str, bytes]
    drifted: Mapping[str, str]

    def owner(self, package: str) -> str | None:
        """The distribution that owns a proto package."""
        return next((each.name for each in self.members.values() if package in each.contracts), None)


def present(root: Path, members: Mapping[str, Member], buf: Buf) -> Present:
    """Compiles the tree's protos.

    Raises:
        InvalidContract: They cannot be compiled.
    """
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(buf.image), pool.submit(buf.files)
        image, paths = asked[0].result(), asked[1].result()
    texts = {name: (root / path).read_text(encoding="utf-8") for name, path in paths.items()}
    read = read_image(image, texts)
    contract = ContractVersion(label="the tree", read=read, packages=None, paths=paths)
    known = {file.package for file in read.files}
    owned = {package: each for each in members.values() for package in each.contracts}
    images = package_images(image, sorted(known & set(owned)))
    drifted = {}
    for package, content in images.items():
        place = f"{owned[package].folder}/gen/{package.replace('.', '/')}/{IMAGE_NAME}"
        path = root / place
        if not path.is_file() or path.read_bytes() != content:
            drifted[package] = place
    return Present(root=root, members=members, contract=contract, images=images, drifted=drifted)


def contract_remarks(past: Past, now: Present, buf: Buf | None) -> list[Remark]:
    """Every change of a contract that somebody in the tree answers for.

    Args:
        past: What users have.
        now: The tree.
        buf: For buf's own rules; None leaves them out.

    Raises:
        InvalidContract: buf cannot compare the two.
    """
    remarks = []
    for finding in findings(past.contract.read, now.contract.read):
        package = _answering(finding.package, past, now)
        if package is None or (past.streams_only and not _lies_in_streams(finding)):
            continue
        reached = past.contract.paths if finding.gone else {**past.contract.paths, **now.contract.paths}
        place = replace(finding.location, file=reached.get(finding.location.file, finding.location.file))
        remarks.append(
            Remark(
                rule=finding.rule,
                package=package,
                subject=finding.subject,
                place=place,
                message=finding.message,
                bump=finding.bump,
                wire=finding.wire,
                affected=finding.affected,
            )
        )
    if buf is not None and not past.streams_only:
        remarks += _of_buf(past, now, buf)
    return remarks


def _answering(package: str, past: Past, now: Present) -> str | None:
    """The distribution whose version must tell of a change in a proto package, if users have an earlier version."""
    former = (each.name for each in past.releases.values() if package in each.packages)
    name = now.owner(package) or next(former, None)
    return name if name in past.releases and name in now.members else None


def _lies_in_streams(finding: Finding) -> bool:
    """Whether a break concerns entries that were written long ago."""
    if not finding.wire:
        return False
    if RULES[finding.rule].category is Category.STREAM or finding.plane is Plane.EVENTS:
        return True
    return any(each.startswith(_STREAM) for each in finding.affected)


def _of_buf(past: Past, now: Present, buf: Buf) -> Iterator[Remark]:
    # Of the packages that nobody answers for, the old side has nothing: both sides hold the same then.
    wanted = {package for each in past.releases.values() for package in each.packages}
    wanted |= {package for name in past.releases if name in now.members for package in now.members[name].contracts}
    before, after = (_image(side, wanted) for side in (past.contract, now.contract))
    # buf refuses an image without files; orki's own rules tell of all that is gone.
    if not before.file or not after.file:
        return
    with tempfile.TemporaryDirectory(prefix="orki-gate-") as folder:
        places = Path(folder, "before.binpb"), Path(folder, "after.binpb")
        for place, image in zip(places, (before, after), strict=True):
            place.write_bytes(image.SerializeToString())
        lines = buf.breaking(*places, json.dumps({"version": "v2", "breaking": {"use": [_BUF_RULES]}}))
    packages = {file.name: file.package for image in (before, after) for file in image.file}
    for line in lines:
        yield from _remark(json.loads(line), packages, past, now)


def _image(side: ContractVersion, wanted: Iterable[str]) -> FileDescriptorSet:
    """The files of some packages, with all that they import."""
    files = side.read.schema.plain
    chosen = {path for name, file in files.items() if file.package in wanted for path in side.read.schema.imports(name)}
    return FileDescriptorSet(file=[files[name] for name in sorted(chosen)])


def _remark(said: Mapping[str, Any], packages: Mapping[str, str], past: Past, now: Present) -> Iterator[Remark]:
    quoted = re.findall(r'"([^"]*)"', said["message"])
    # Of a file that is gone, the message alone tells which it was.
    file = said.get("path") or next((each for each in quoted if each in packages), "")
    if file not in packages:
        raise InvalidContract(f"buf says of no file that is known: {said['message']} ({said['type']})")
    package = _answering(packages[file], past, now)
    if package is None:
        return
    paths = {**past.contract.paths, **now.contract.paths}
    line, column = (said["start_line"], said["start_column"]) if said.get("path") else (0, 0)
    yield Remark(
        rule=said["type"],
        package=package,
        subject=" ".join(quoted),
        place=Location(paths.get(file, file), line, column),
        message=said["message"].removesuffix("."),
        bump=Bump.MAJOR,
    )
