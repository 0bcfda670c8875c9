"""An import-linter contract: what a distribution imports, its pyproject.toml declares.

In the workspace every distribution is installed, so an import of an undeclared one works here and fails at a user's.
"""

from __future__ import annotations

__all__ = ["Declared"]

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output

from nox_sessions.layout import Distribution, distributions

# Type checkers bring their own copy: an import under TYPE_CHECKING asks for no install.
STUBS = frozenset({"_typeshed", "typing_extensions"})


class Declared(Contract):
    """Each distribution imports itself, the standard library, and what it declares; nothing else."""

    type_name = "declared"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look at every import of every distribution's modules."""
        members = distributions(Path.cwd())
        own = {each.name: _packages(each) for each in members}
        providers = packages_distributions()
        roots = set(self.session_options["root_packages"])
        found = []
        for each in members:
            names = _declared(each)
            allowed = set(own[each.name])
            allowed.update(*(own.get(name, set()) for name in names))
            allowed.update(top for top, by in providers.items() if names & {_normal(name) for name in by})
            # Of a package that is no root here, the graph knows the top alone.
            allowed.update(top for name in own[each.name] if (top := name.partition(".")[0]) not in roots)
            for importer, imported in _imports(graph, own[each.name]):
                top = imported.partition(".")[0]
                if top not in sys.stdlib_module_names | STUBS and not any(
                    _is_within(imported, package) for package in allowed
                ):
                    found.append((each.name, importer, imported))
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each import that nothing declares."""
        for name, importer, imported in check.metadata["found"]:
            output.print_error(f"{importer} imports {imported}, which {name} does not declare", bold=False)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _packages(each: Distribution) -> set[str]:
    """Return the hand-written packages of a distribution, and the proto packages that it owns."""
    project = tomllib.loads((each.folder / "pyproject.toml").read_text(encoding="utf-8"))
    written = {file.parent.name for file in each.folder.glob("src/*/__init__.py")}
    return written | set(project.get("tool", {}).get("orki", {}).get("contracts", []))


def _declared(each: Distribution) -> set[str]:
    """Return the names of the distributions that one declares, those of its extras included."""
    project = tomllib.loads((each.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project.get("dependencies", []))
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    return {_normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def _imports(graph: ImportGraph, packages: set[str]) -> list[tuple[str, str]]:
    """Return every import by a module of these packages, as importer and imported, sorted."""
    importers = [module for module in graph.modules if any(_is_within(module, package) for package in packages)]
    return sorted((one, other) for one in importers for other in graph.find_modules_directly_imported_by(one))
