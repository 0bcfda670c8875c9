"""Compare contracts with orki's rules of change, and with buf's own rules on the same two images."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from orki_codegen._buf import Buf
from orki_codegen._gate.distributions import Baseline, Member
from orki_codegen._gate.findings import Finding
from orki_codegen.checks._procedures import BREAKING
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidContract, InvalidSetting
from orki_contract.findings import RULES, Bump, Category, Plane
from orki_contract.findings import Finding as ContractFinding
from orki_contract.findings import findings as contract_changes
from orki_contract.images import IMAGE_NAME, package_images
from orki_contract.read import read_image
from orki_contract.versions import ContractVersion

_BUF_RULES: Final = "FILE"
# The affected parties of a finding include streams in this form: `stream "findings"`.
_STREAM: Final = "stream "


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The current tree; `stale` maps proto packages to the paths of generated images that differ from the protos."""

    root: Path
    members: Mapping[str, Member]
    contract: ContractVersion
    stale: Mapping[str, str]

    def owner(self, package: str) -> str | None:
        """Return the distribution that owns a proto package."""
        return next((each.name for each in self.members.values() if package in each.contracts), None)


def check_configuration(buf: Buf) -> None:
    """Check that `buf breaking` uses all of orki's rules and buf's FILE rules; buf only warns about missing rules.

    This also starts the plugin, so a missing or failing one is reported here.

    Raises:
        InvalidContract: buf or the plugin failed.
        InvalidSetting: A rule is not used.
    """
    rules = [json.loads(line) for line in buf.configured_rules("breaking")]
    used = {each["id"] for each in rules}
    missing = sorted(set(BREAKING) - used)
    if missing:
        raise InvalidSetting(
            f'buf.yaml: "breaking" does not use {", ".join(missing)}, so buf would only warn about such breaks: '
            "put the categories ORKI_… back into its `use`, as `orki-codegen init` writes them"
        )
    if not any(_BUF_RULES in (each["categories"] or ()) for each in rules if not each["id"].startswith("ORKI_")):
        raise InvalidSetting(f'buf.yaml: "breaking" does not use buf\'s rules: put {_BUF_RULES} back into its `use`')


def read_tree(root: Path, members: Mapping[str, Member], buf: Buf) -> Tree:
    """Compile the tree's protos.

    Raises:
        InvalidContract: The protos cannot be compiled.
    """
    with ThreadPoolExecutor(2) as pool:
        compiled, listed = pool.submit(buf.image), pool.submit(buf.files)
        image, paths = compiled.result(), listed.result()
    texts = {name: (root / path).read_text(encoding="utf-8") for name, path in paths.items()}
    read = read_image(image, texts)
    contract = ContractVersion(label="the tree", read=read, packages=None, paths=paths)
    known = {file.package for file in read.files}
    owned = {package: each for each in members.values() for package in each.contracts}
    stale = {}
    for package, content in package_images(image, sorted(known & set(owned))).items():
        path = f"{owned[package].folder}/gen/{package.replace('.', '/')}/{IMAGE_NAME}"
        if not (root / path).is_file() or (root / path).read_bytes() != content:
            stale[package] = path
    return Tree(root=root, members=members, contract=contract, stale=stale)


def contract_findings(baseline: Baseline, tree: Tree, buf: Buf | None) -> list[Finding]:
    """Return every contract change of a distribution in the tree; buf's own rules are left out if `buf` is None.

    Raises:
        InvalidContract: buf cannot compare the contracts.
    """
    found = []
    for change in contract_changes(baseline.contract.read, tree.contract.read):
        package = _responsible(change.package, baseline, tree)
        if package is None or (baseline.streams_only and not _concerns_streams(change)):
            continue
        paths = baseline.contract.paths if change.gone else {**baseline.contract.paths, **tree.contract.paths}
        found.append(
            Finding(
                rule=change.rule,
                package=package,
                subject=change.subject,
                location=replace(change.location, file=paths.get(change.location.file, change.location.file)),
                message=change.message,
                bump=change.bump,
                wire=change.wire,
                affected=change.affected,
            )
        )
    if buf is not None and not baseline.streams_only:
        found += _buf_findings(baseline, tree, buf)
    return found


def _responsible(package: str, baseline: Baseline, tree: Tree) -> str | None:
    """Return the distribution whose version must reflect a change of a proto package, if it was released before."""
    former = (each.name for each in baseline.releases.values() if package in each.packages)
    name = tree.owner(package) or next(former, None)
    return name if name in baseline.releases and name in tree.members else None


def _concerns_streams(change: ContractFinding) -> bool:
    """Return whether a break concerns entries that were written before the break."""
    if not change.wire:
        return False
    if RULES[change.rule].category is Category.STREAM or change.plane is Plane.EVENTS:
        return True
    return any(each.startswith(_STREAM) for each in change.affected)


def _buf_findings(baseline: Baseline, tree: Tree, buf: Buf) -> Iterator[Finding]:
    # Packages without a responsible distribution are left out of both sides.
    wanted = {package for each in baseline.releases.values() for package in each.packages}
    wanted |= {
        package for name in baseline.releases if name in tree.members for package in tree.members[name].contracts
    }
    before, after = (_image(side, wanted) for side in (baseline.contract, tree.contract))
    # buf refuses an empty image; orki's own rules report everything that was removed.
    if not before.file or not after.file:
        return
    with tempfile.TemporaryDirectory(prefix="orki-gate-") as folder:
        files = Path(folder, "before.binpb"), Path(folder, "after.binpb")
        for file, image in zip(files, (before, after), strict=True):
            file.write_bytes(image.SerializeToString())
        lines = buf.breaking(*files, json.dumps({"version": "v2", "breaking": {"use": [_BUF_RULES]}}))
    packages = {file.name: file.package for image in (before, after) for file in image.file}
    for line in lines:
        yield from _buf_finding(json.loads(line), packages, baseline, tree)


def _image(side: ContractVersion, wanted: Iterable[str]) -> FileDescriptorSet:
    """Return the files of some packages and all their imports."""
    files = side.read.schema.plain
    chosen = {path for name, file in files.items() if file.package in wanted for path in side.read.schema.imports(name)}
    return FileDescriptorSet(file=[files[name] for name in sorted(chosen)])


def _buf_finding(
    entry: Mapping[str, Any], packages: Mapping[str, str], baseline: Baseline, tree: Tree
) -> Iterator[Finding]:
    quoted = re.findall(r'"([^"]*)"', entry["message"])
    # Only the message names a removed file.
    file = entry.get("path") or next((each for each in quoted if each in packages), "")
    if file not in packages:
        raise InvalidContract(f"buf reports an unknown file: {entry['message']} ({entry['type']})")
    package = _responsible(packages[file], baseline, tree)
    if package is None:
        return
    paths = {**baseline.contract.paths, **tree.contract.paths}
    line, column = (entry["start_line"], entry["start_column"]) if entry.get("path") else (0, 0)
    yield Finding(
        rule=entry["type"],
        package=package,
        subject=" ".join(quoted),
        location=Location(paths.get(file, file), line, column),
        message=entry["message"].removesuffix("."),
        bump=Bump.MAJOR,
    )
