"""An import-linter contract: machines see nothing of the world, so that a test can play any history to them.

A list of what they may import rather than of what they may not: whatever brings clocks, sockets or chance is refused
without having been thought of, and so is a module of their own package that is no machine.
"""

from __future__ import annotations

__all__ = ["Machines"]

from typing import cast

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class Machines(Contract):
    """The named modules, and all below them, import each other and what is allowed; nothing else."""

    type_name = "machines"

    modules = fields.ListField(subfield=fields.StringField())
    allowed = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Look at every import by a machine."""
        modules = [str(module) for module in cast("list[str]", self.modules)]
        allowed = [*modules, *cast("list[str]", self.allowed)]
        unknown = [module for module in modules if module not in graph.modules]
        found = [
            (importer, imported)
            for importer in sorted(graph.modules)
            if _is_below(importer, modules)
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            if not _is_below(imported, allowed)
        ]
        return ContractCheck(kept=not found and not unknown, metadata={"found": found, "unknown": unknown})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each import that a machine may not have, and each name in the contract that is no module any more."""
        for importer, imported in check.metadata["found"]:
            output.print_error(f"{importer} is a machine and imports {imported}", bold=False)
        for module in check.metadata["unknown"]:
            output.print_error(f"{module} is named as a machine and does not exist", bold=False)


def _is_below(module: str, tops: list[str]) -> bool:
    return any(module == top or module.startswith(f"{top}.") for top in tops)
