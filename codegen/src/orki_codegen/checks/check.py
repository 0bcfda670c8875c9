"""One check: contracts as buf hands them over, violations and findings as annotations."""

from __future__ import annotations

__all__ = ["Refused", "check"]

from collections.abc import Iterable, Iterator
from typing import Any

from orki_codegen.checks.rulebook import BREAKING, LINT
from orki_codegen.checks.wire import CHECK, Wire
from orki_contract.descriptors import Location, Schema
from orki_contract.findings import findings
from orki_contract.read import ReadContract, read_schema
from orki_contract.validate import validate


class Refused(Exception):
    """The request cannot be answered."""


class _Side:
    """The files of one side, in a pool of their own; their order means nothing."""

    def __init__(self, wire: Wire, descriptors: Iterable[Any]) -> None:
        self._wire = wire
        self._files = {each.file_descriptor_proto.name: each for each in descriptors}
        files = [each.file_descriptor_proto for each in self._files.values()]
        image = wire.new("google.protobuf.FileDescriptorSet", file=files)
        self.read: ReadContract = read_schema(Schema(image.SerializeToString()))

    def judged(self, location: Location) -> bool:
        """Whether a file is one that buf asks about, and not only imported."""
        file = self._files.get(location.file)
        return file is not None and not file.is_import

    def holds(self, path: str) -> bool:
        """Whether there is such a file."""
        return path in self._files

    def place(self, location: Location) -> Any:
        """A location by the source path of what begins there."""
        found = self._wire.new("buf.plugin.descriptor.v1.FileLocation", file_name=location.file)
        known = self._files.get(location.file)
        for each in known.file_descriptor_proto.source_code_info.location if known is not None else ():
            if each.path and list(each.span[:2]) == [location.line - 1, location.column - 1]:
                found.source_path.extend(each.path)
                break
        return found


def check(wire: Wire, request: Any) -> Iterator[Any]:
    """What a CheckRequest's rules find.

    Raises:
        Refused: It asks for rules or options that there are not, or for breaking rules without the other side.
        orki_contract.errors.InvalidContract: A side is no whole set of files.
    """
    for option in request.options:
        raise Refused(f'orki-checks has no option "{option.key}": it has none')
    wanted = frozenset(request.rule_ids)
    for rule in sorted(wanted - LINT.keys() - BREAKING.keys()):
        raise Refused(f'orki-checks has no rule "{rule}"')
    new = _Side(wire, request.file_descriptors)
    if not wanted or wanted & LINT.keys():
        yield from _lint(wire, new, wanted)
    if request.against_file_descriptors and (not wanted or wanted & BREAKING.keys()):
        yield from _breaking(wire, _Side(wire, request.against_file_descriptors), new, wanted)


def _lint(wire: Wire, side: _Side, wanted: frozenset[str]) -> Iterator[Any]:
    for violation in validate(side.read):
        if (not wanted or violation.rule in wanted) and side.judged(violation.location):
            yield wire.new(
                f"{CHECK}.Annotation",
                rule_id=violation.rule,
                message=f"{violation.message} [{violation.rule}]",
                file_location=side.place(violation.location),
            )


def _breaking(wire: Wire, old: _Side, new: _Side, wanted: frozenset[str]) -> Iterator[Any]:
    for finding in findings(old.read, new.read):
        if finding.rule not in (wanted or BREAKING.keys()):
            continue
        if not (old if finding.gone else new).judged(finding.location):
            continue
        annotation = wire.new(f"{CHECK}.Annotation", rule_id=finding.rule)
        annotation.message = f"{finding.message} [{finding.rule}]"
        if finding.gone and finding.location.line:
            annotation.message = f"{finding.message}, which stood at {finding.location} [{finding.rule}]"
        if not finding.gone:
            annotation.file_location.CopyFrom(new.place(finding.location))
        elif new.holds(finding.location.file):
            annotation.file_location.CopyFrom(new.place(Location(finding.location.file)))
        if finding.before.file:
            annotation.against_file_location.CopyFrom(old.place(finding.before))
        yield annotation
