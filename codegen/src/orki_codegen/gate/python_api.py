"""The hand-written Python API against what users have, as griffe reads both; nothing is imported or run."""

from __future__ import annotations

__all__ = ["RULES", "api_remarks"]

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import griffe

from orki_codegen.gate.members import Member
from orki_codegen.gate.past import Release
from orki_codegen.gate.remarks import Remark
from orki_codegen.gate.signatures import RULES as SIGNATURE_RULES
from orki_codegen.gate.signatures import signature_changes
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting
from orki_contract.findings import Bump

_ADDED: Final = "API_ADDED"

_SENTENCES: Final[Mapping[griffe.BreakageKind, str]] = {
    griffe.BreakageKind.OBJECT_REMOVED: "is gone",
    griffe.BreakageKind.OBJECT_CHANGED_KIND: "is something else now",
    griffe.BreakageKind.CLASS_REMOVED_BASE: "lost a base class",
    griffe.BreakageKind.PARAMETER_ADDED_REQUIRED: "asks for one more argument",
    griffe.BreakageKind.PARAMETER_CHANGED_DEFAULT: "has another default for a parameter",
    griffe.BreakageKind.PARAMETER_CHANGED_KIND: "takes a parameter in another way",
    griffe.BreakageKind.PARAMETER_CHANGED_REQUIRED: "asks for an argument that could be left out",
    griffe.BreakageKind.PARAMETER_MOVED: "has a parameter at another position",
    griffe.BreakageKind.PARAMETER_REMOVED: "lost a parameter",
}

RULES: Final[Mapping[str, Bump]] = {
    _ADDED: Bump.MINOR,
    **{f"API_{kind.name}": Bump.MAJOR for kind in _SENTENCES},
    **dict.fromkeys(SIGNATURE_RULES, Bump.MAJOR),
}
"""What each rule asks for. A changed value is none: constants and `__version__` are no promises."""


def api_remarks(root: Path, member: Member, release: Release, public: frozenset[str] | None) -> list[Remark]:
    """Every change of the public names of a distribution's hand-written packages.

    Public is what `__all__` lists, or has no underscore in front where there is no `__all__`.

    Args:
        root: The workspace.
        member: The distribution as it is now.
        release: As users have it.
        public: The modules that are public; None for all without an underscore in front.

    Raises:
        InvalidSetting: A module cannot be read.
    """
    sources = root / member.folder / "src"
    remarks: list[Remark] = []
    before, after = _packages(release.imports), _packages([sources])
    for name in sorted({*before, *after}):
        if name not in after:
            place = Location(f"{member.folder}/pyproject.toml")
            remarks.append(_remark(member, "API_OBJECT_REMOVED", name, place, f"the package {name} is gone"))
        elif name not in before:
            place = Location(f"{member.folder}/src/{name}/__init__.py", 1, 1)
            remarks.append(_remark(member, _ADDED, name, place, f"the package {name} is new"))
        elif _texts(before[name] / name) != _texts(after[name] / name):
            old, new = _load(name, before[name]), _load(name, after[name])
            for module in _roots(old, new, public):
                remarks += _compared(root, member, module, old, new)
    return list(_once(remarks))


def _once(remarks: Iterable[Remark]) -> Iterable[Remark]:
    """What is public under several names is told by the shortest."""
    kept: dict[tuple[str, Location, str], Remark] = {}
    for each in sorted(remarks, key=lambda each: (len(each.subject), each.subject)):
        # Two of one rule on one line may still be two parameters.
        kept.setdefault((each.rule, each.place, each.message.removeprefix(each.subject.rpartition(".")[0])), each)
    return kept.values()


def _texts(package: Path) -> dict[str, bytes]:
    return {
        path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py*") if path.is_file()
    }


def _roots(old: Any, new: Any, public: frozenset[str] | None) -> list[str]:
    """The public modules, without those that lie within another one; all others are marked as private."""
    for top in (old, new):
        for module in _modules(top):
            hidden = any(part.startswith("_") for part in module.path.split("."))
            module.public = not hidden and (public is None or module.path in public)
    paths = {module.path for top in (old, new) for module in _modules(top) if module.public}
    return sorted(path for path in paths if path.rpartition(".")[0] not in paths)


def _modules(top: Any) -> Iterator[Any]:
    yield top
    for each in top.members.values():
        if not each.is_alias and each.is_module:
            yield from _modules(each)


def _compared(root: Path, member: Member, path: str, old: Any, new: Any) -> Iterator[Remark]:
    before, after = (_inside(top, path) for top in (old, new))
    if after is None:
        yield _remark(member, "API_OBJECT_REMOVED", path, _nearest(root, new, path), f"{path} is gone")
    elif before is None:
        yield _remark(member, _ADDED, path, _place(root, after), f"{path} is new")
    else:
        yield from _broken(root, member, before, after)
        yield from _listed(root, member, path, before, after)
        yield from _resigned(root, member, path, before, after)


def _inside(top: Any, path: str) -> Any:
    try:
        return top[path.split(".")[1:]] if "." in path else top
    except KeyError:
        return None


def _packages(folders: Iterable[Path]) -> dict[str, Path]:
    """The hand-written top packages below some import roots. Generated code is judged by its contract."""
    found: dict[str, Path] = {}
    for folder in folders:
        for init in sorted(folder.glob("*/__init__.py")):
            if not init.parent.name.startswith("_"):
                found.setdefault(init.parent.name, folder)
    return found


def _load(name: str, folder: Path) -> griffe.Object | griffe.Alias:
    # Of an alias into another distribution griffe logs that it cannot follow it; it need not.
    logging.getLogger("griffe").setLevel(logging.CRITICAL)
    try:
        return griffe.load(name, search_paths=[folder], allow_inspection=False, resolve_aliases=True)
    except (griffe.GriffeError, SyntaxError, OSError, UnicodeDecodeError, ImportError) as error:
        raise InvalidSetting(f"the Python package {name} in {folder} cannot be read: {error}") from error


def _broken(root: Path, member: Member, old: Any, new: Any) -> Iterator[Remark]:
    for each in griffe.find_breaking_changes(old, new):
        if each.kind not in _SENTENCES:
            continue
        gone = each.kind is griffe.BreakageKind.OBJECT_REMOVED
        path = each.obj.path
        detail = "" if gone else f": {_shown(each.old_value)} → {_shown(each.new_value)}"
        place = _nearest(root, new, path) if gone else _place(root, each.obj)
        yield _remark(member, f"API_{each.kind.name}", path, place, f"{path} {_SENTENCES[each.kind]}{detail}")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, griffe.Parameter):
        return str(value)
    return " ".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _listed(root: Path, member: Member, path: str, old: Any, new: Any) -> Iterator[Remark]:
    """What is new in a module or a class; what is new within something new is not told apart.

    And what is there still, and is public no more: griffe looks for names alone.
    """
    before, after = _public(old), _public(new)
    for name in before:
        if name not in after and name in new.members:
            inner = f"{path}.{name}"
            place = _place(root, new.members[name])
            yield _remark(member, "API_OBJECT_REMOVED", inner, place, f"{inner} is public no more")
    for name, each in after.items():
        inner = f"{path}.{name}"
        if name not in before:
            if name != "__init__":
                yield _remark(member, _ADDED, inner, _place(root, each), f"{inner} is new")
        elif _holds(each) and _holds(before[name]):
            yield from _listed(root, member, inner, before[name], each)


def _resigned(root: Path, member: Member, path: str, old: Any, new: Any) -> Iterator[Remark]:
    """What is called or annotated otherwise, in a class what it inherits from the same distribution included."""
    before, after = (_public(each, inherited=each.is_class) for each in (old, new))
    for name in sorted(before.keys() & after.keys()):
        inner = f"{path}.{name}"
        if _holds(before[name]) and _holds(after[name]):
            yield from _resigned(root, member, inner, before[name], after[name])
        elif not before[name].is_alias and not after[name].is_alias:
            place = _place(root, after[name])
            for rule, message in signature_changes(before[name], after[name], inner):
                yield _remark(member, rule, inner, place, message)


def _public(holder: Any, *, inherited: bool = False) -> dict[str, Any]:
    """The public members of a module or a class; of what is imported, what it stands for."""
    found = {}
    for name, each in (holder.all_members if inherited else holder.members).items():
        if each.is_public:
            try:
                found[name] = each.final_target if each.is_alias else each
            except griffe.GriffeError:
                found[name] = each
    return found


def _holds(each: Any) -> bool:
    """Whether something has members of its own that are judged; an alias into another distribution has not."""
    return not each.is_alias and (each.is_module or each.is_class)


def _nearest(root: Path, top: Any, path: str) -> Location:
    """Where the nearest thing around what is gone stands."""
    parts = path.split(".")[1:-1]
    while parts:
        try:
            return _place(root, top[parts])
        except KeyError:
            parts.pop()
    return _place(root, top)


def _place(root: Path, each: Any) -> Location:
    file = each.filepath
    shown = file.relative_to(root).as_posix() if isinstance(file, Path) and file.is_relative_to(root) else str(file)
    line = (each.alias_lineno if each.is_alias else each.lineno) or 1
    return Location(shown, line, 1)


def _remark(member: Member, rule: str, subject: str, place: Location, message: str) -> Remark:
    return Remark(rule=rule, package=member.name, subject=subject, place=place, message=message, bump=RULES[rule])
