"""Contract types for import-linter, named in the workspace's pyproject.toml.

The import graph includes imports inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import re
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import cast

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nox_sessions.workspace import Distribution, distributions

# Type checkers ship these stubs, so an import under TYPE_CHECKING needs no install.
STUBS = frozenset({"_typeshed", "typing_extensions"})
TRANSITIONS = "orki_contract.transitions"


class _Faults(Contract):
    """A contract that is broken by a list of faults."""

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        found = list(self.faults(graph))
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["found"]:
            output.print_error(line, bold=False)

    @abstractmethod
    def faults(self, graph: ImportGraph) -> Iterator[str]:
        """Yield one sentence for each fault."""


class Declared(_Faults):
    """Each distribution imports only itself, the standard library and its declared dependencies.

    All distributions of the workspace are installed here, so an undeclared import would fail only for users.
    """

    type_name = "declared"

    def faults(self, graph: ImportGraph) -> Iterator[str]:
        """Yield each import that nothing declares."""
        members = distributions(Path.cwd())
        own = {each.name: _packages(each) for each in members}
        providers = packages_distributions()
        roots = set(self.session_options["root_packages"])
        for each in members:
            names = _declared(each)
            allowed = set(own[each.name])
            allowed.update(*(own.get(name, set()) for name in names))
            allowed.update(top for top, by in providers.items() if names & set(map(canonicalize_name, by)))
            # The graph holds only the top package of anything that is not one of its roots.
            allowed.update(top for name in own[each.name] if (top := name.partition(".")[0]) not in roots)
            for importer, imported in _imports(graph, own[each.name]):
                top = imported.partition(".")[0]
                if top not in sys.stdlib_module_names | STUBS and not _is_within(imported, allowed):
                    yield f"{importer} imports {imported}, which {each.name} does not declare"


class Internal(_Faults):
    """No distribution imports an underscored module of another distribution."""

    type_name = "internal"

    def faults(self, graph: ImportGraph) -> Iterator[str]:
        """Yield each import of another distribution's internal module."""
        own = {each.name: _packages(each) for each in distributions(Path.cwd())}
        everything = set().union(*own.values())
        for name, packages in own.items():
            for importer, imported in _imports(graph, packages):
                internal = any(re.match(r"_(?!_)", part) for part in imported.split("."))
                if internal and _is_within(imported, everything - packages):
                    yield f"{importer} of {name} imports {imported}, an internal module of another distribution"


class Acyclic(_Faults):
    """No modules import each other in a circle."""

    type_name = "acyclic"

    def faults(self, graph: ImportGraph) -> Iterator[str]:
        """Yield a circle, break it, and continue until none is left."""
        imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}
        while True:
            try:
                TopologicalSorter(imports).prepare()
            except CycleError as error:
                # graphlib lists each module before the one that imports it.
                circle = list(reversed(error.args[1]))
                yield f"circular import: {' -> '.join(circle)}"
                imports[circle[0]].discard(circle[1])
            else:
                return


class Machines(_Faults):
    """State machines import only each other and an allowed list, so they have no clock, socket or randomness.

    Every module that declares a transition table must be listed as a machine.
    """

    type_name = "machines"

    modules = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())
    table_readers = fields.ListField(subfield=fields.StringField(), required=False, default=[])

    def faults(self, graph: ImportGraph) -> Iterator[str]:
        """Yield each import that a machine may not have, and each wrong or missing entry of the list."""
        modules = [str(module) for module in cast("list[str]", self.modules)]
        allowed = [*modules, *cast("list[str]", self.allowed)]
        for module in modules:
            if module not in graph.modules:
                yield f"{module} is listed as a machine and does not exist"
        for importer in sorted(graph.modules):
            imported = sorted(graph.find_modules_directly_imported_by(importer))
            if _is_within(importer, modules):
                for each in imported:
                    if not _is_within(each, allowed):
                        yield f"{importer} is a machine and imports {each}"
            elif TRANSITIONS in imported and importer not in cast("list[str]", self.table_readers):
                yield f"{importer} imports {TRANSITIONS} and is not listed as a machine"


def _is_within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _packages(each: Distribution) -> set[str]:
    """Return a distribution's hand-written packages and the proto packages that it owns."""
    written = {file.parent.name for file in each.folder.glob("src/*/__init__.py")}
    return written | set(each.pyproject.get("tool", {}).get("orki", {}).get("contracts", []))


def _declared(each: Distribution) -> set[str]:
    """Return the names of the declared dependencies, those of extras included."""
    project = each.pyproject["project"]
    requirements = list(project.get("dependencies", []))
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    return {canonicalize_name(Requirement(each).name) for each in requirements}


def _imports(graph: ImportGraph, packages: set[str]) -> list[tuple[str, str]]:
    """Return every import by a module of these packages as (importer, imported), sorted."""
    importers = [module for module in graph.modules if _is_within(module, packages)]
    return sorted((one, other) for one in importers for other in graph.find_modules_directly_imported_by(one))
