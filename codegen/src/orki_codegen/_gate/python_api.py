"""Compare the hand-written Python API with griffe; nothing is imported or run."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import griffe

from orki_codegen._gate.distributions import Member, Release
from orki_codegen._gate.findings import Finding
from orki_codegen._gate.signatures import RULES as SIGNATURE_RULES
from orki_codegen._gate.signatures import signature_changes
from orki_contract.descriptors import Location
from orki_contract.errors import InvalidSetting
from orki_contract.findings import Bump

_ADDED: Final = "API_ADDED"

_SENTENCES: Final[Mapping[griffe.BreakageKind, str]] = {
    griffe.BreakageKind.OBJECT_REMOVED: "was removed",
    griffe.BreakageKind.OBJECT_CHANGED_KIND: "is a different kind of object",
    griffe.BreakageKind.CLASS_REMOVED_BASE: "lost a base class",
    griffe.BreakageKind.PARAMETER_ADDED_REQUIRED: "requires one more argument",
    griffe.BreakageKind.PARAMETER_CHANGED_DEFAULT: "has a different default for a parameter",
    griffe.BreakageKind.PARAMETER_CHANGED_KIND: "has a different kind of parameter",
    griffe.BreakageKind.PARAMETER_CHANGED_REQUIRED: "requires an argument that was optional",
    griffe.BreakageKind.PARAMETER_MOVED: "has a parameter in a different position",
    griffe.BreakageKind.PARAMETER_REMOVED: "lost a parameter",
}

RULES: Final[Mapping[str, Bump]] = {
    _ADDED: Bump.MINOR,
    **{f"API_{kind.name}": Bump.MAJOR for kind in _SENTENCES},
    **dict.fromkeys(SIGNATURE_RULES, Bump.MAJOR),
}
"""The bump of each rule. A changed value, such as that of `__version__`, is no change of the API."""


def api_findings(root: Path, member: Member, release: Release, public: frozenset[str] | None) -> list[Finding]:
    """Return every change of the public names of a distribution's hand-written packages.

    Public names are those in `__all__`, or without `__all__`, those without a leading underscore.
    `public` are the public modules; None stands for all modules without a leading underscore.

    Raises:
        InvalidSetting: A module cannot be read.
    """
    sources = root / member.folder / "src"
    found: list[Finding] = []
    before, after = _packages(release.imports), _packages([sources])
    for name in sorted({*before, *after}):
        if name not in after:
            location = Location(f"{member.folder}/pyproject.toml")
            found.append(_finding(member, "API_OBJECT_REMOVED", name, location, f"the package {name} was removed"))
        elif name not in before:
            location = Location(f"{member.folder}/src/{name}/__init__.py", 1, 1)
            found.append(_finding(member, _ADDED, name, location, f"the package {name} is new"))
        elif _texts(before[name] / name) != _texts(after[name] / name):
            old, new = _load(name, before[name]), _load(name, after[name])
            for module in _roots(old, new, public):
                found += _compared(root, member, module, old, new)
    return list(_once(found))


def _once(found: Iterable[Finding]) -> Iterable[Finding]:
    """Keep one finding, that of the shortest name, for an object that is public under several names."""
    kept: dict[tuple[str, Location, str], Finding] = {}
    for each in sorted(found, key=lambda each: (len(each.subject), each.subject)):
        # Two findings of one rule on one line may concern two parameters.
        kept.setdefault((each.rule, each.location, each.message.removeprefix(each.subject.rpartition(".")[0])), each)
    return kept.values()


def _texts(package: Path) -> dict[str, bytes]:
    return {
        path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*.py*") if path.is_file()
    }


def _roots(old: Any, new: Any, public: frozenset[str] | None) -> list[str]:
    """Return the public modules that are not within another one; mark all others as private."""
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


def _compared(root: Path, member: Member, path: str, old: Any, new: Any) -> Iterator[Finding]:
    before, after = (_inside(top, path) for top in (old, new))
    if after is None:
        yield _finding(member, "API_OBJECT_REMOVED", path, _nearest(root, new, path), f"{path} was removed")
    elif before is None:
        yield _finding(member, _ADDED, path, _location(root, after), f"{path} is new")
    else:
        yield from _broken(root, member, before, after)
        yield from _changed_names(root, member, path, before, after)
        yield from _changed_signatures(root, member, path, before, after)


def _inside(top: Any, path: str) -> Any:
    try:
        return top[path.split(".")[1:]] if "." in path else top
    except KeyError:
        return None


def _packages(folders: Iterable[Path]) -> dict[str, Path]:
    """Return the hand-written top packages below some import roots; the contract covers generated code."""
    found: dict[str, Path] = {}
    for folder in folders:
        for init in sorted(folder.glob("*/__init__.py")):
            if not init.parent.name.startswith("_"):
                found.setdefault(init.parent.name, folder)
    return found


def _load(name: str, folder: Path) -> griffe.Object | griffe.Alias:
    # griffe logs aliases into other distributions, which it cannot and need not resolve.
    logging.getLogger("griffe").setLevel(logging.CRITICAL)
    try:
        return griffe.load(name, search_paths=[folder], allow_inspection=False, resolve_aliases=True)
    except (griffe.GriffeError, SyntaxError, OSError, UnicodeDecodeError, ImportError) as error:
        raise InvalidSetting(f"the Python package {name} in {folder} cannot be read: {error}") from error


def _broken(root: Path, member: Member, old: Any, new: Any) -> Iterator[Finding]:
    for each in griffe.find_breaking_changes(old, new):
        if each.kind not in _SENTENCES:
            continue
        removed = each.kind is griffe.BreakageKind.OBJECT_REMOVED
        path = each.obj.path
        detail = "" if removed else f": {_shown(each.old_value)} → {_shown(each.new_value)}"
        location = _nearest(root, new, path) if removed else _location(root, each.obj)
        yield _finding(member, f"API_{each.kind.name}", path, location, f"{path} {_SENTENCES[each.kind]}{detail}")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, griffe.Parameter):
        return str(value)
    return " ".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _changed_names(root: Path, member: Member, path: str, old: Any, new: Any) -> Iterator[Finding]:
    """Yield new names in a module or class, and names that exist but are no longer public, which griffe misses.

    New names within a new object are not listed.
    """
    before, after = _public(old), _public(new)
    for name in before:
        if name not in after and name in new.members:
            inner = f"{path}.{name}"
            location = _location(root, new.members[name])
            yield _finding(member, "API_OBJECT_REMOVED", inner, location, f"{inner} is no longer public")
    for name, each in after.items():
        inner = f"{path}.{name}"
        if name not in before:
            if name != "__init__":
                yield _finding(member, _ADDED, inner, _location(root, each), f"{inner} is new")
        elif _has_members(each) and _has_members(before[name]):
            yield from _changed_names(root, member, inner, before[name], each)


def _changed_signatures(root: Path, member: Member, path: str, old: Any, new: Any) -> Iterator[Finding]:
    """Yield changes of signatures and annotations, also of members inherited within the distribution."""
    before, after = (_public(each, inherited=each.is_class) for each in (old, new))
    for name in sorted(before.keys() & after.keys()):
        inner = f"{path}.{name}"
        if _has_members(before[name]) and _has_members(after[name]):
            yield from _changed_signatures(root, member, inner, before[name], after[name])
        elif not before[name].is_alias and not after[name].is_alias:
            location = _location(root, after[name])
            for rule, message in signature_changes(before[name], after[name], inner):
                yield _finding(member, rule, inner, location, message)


def _public(holder: Any, *, inherited: bool = False) -> dict[str, Any]:
    """Return the public members of a module or class, with imported names resolved."""
    found = {}
    for name, each in (holder.all_members if inherited else holder.members).items():
        if each.is_public:
            try:
                found[name] = each.final_target if each.is_alias else each
            except griffe.GriffeError:
                found[name] = each
    return found


def _has_members(each: Any) -> bool:
    """Return whether the members of an object are compared; those of another distribution's objects are not."""
    return not each.is_alias and (each.is_module or each.is_class)


def _nearest(root: Path, top: Any, path: str) -> Location:
    """Return the location of the nearest existing parent of a removed object."""
    parts = path.split(".")[1:-1]
    while parts:
        try:
            return _location(root, top[parts])
        except KeyError:
            parts.pop()
    return _location(root, top)


def _location(root: Path, each: Any) -> Location:
    file = each.filepath
    shown = file.relative_to(root).as_posix() if isinstance(file, Path) and file.is_relative_to(root) else str(file)
    line = (each.alias_lineno if each.is_alias else each.lineno) or 1
    return Location(shown, line, 1)


def _finding(member: Member, rule: str, subject: str, location: Location, message: str) -> Finding:
    return Finding(
        rule=rule, package=member.name, subject=subject, location=location, message=message, bump=RULES[rule]
    )


def imported_modules(root: Path, members: Mapping[str, Member]) -> frozenset[str]:
    """Return every module that a hand-written module of another distribution imports, or imports names from.

    Raises:
        InvalidSetting: A module cannot be read.
    """
    found: set[str] = set()
    for member in members.values():
        sources = root / member.folder / "src"
        own = {path.name for path in sources.glob("*")}
        for path in sorted(sources.rglob("*.py")):
            found.update(name for name in _imports(path) if name.partition(".")[0] not in own)
    return frozenset(found)


def _imports(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise InvalidSetting(f"{path} cannot be read: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            # A name that is imported from a package may be a module.
            yield from (f"{node.module}.{each.name}" for each in node.names)
