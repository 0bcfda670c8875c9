"""Small workspaces for tests, and the evaluation of one against others."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path

from orki_codegen._buf import Buf
from orki_codegen._gate.accepted import parse_accepted
from orki_codegen._gate.contracts import read_tree
from orki_codegen._gate.distributions import Baseline, Release, find_members
from orki_codegen._gate.evaluate import Policy, evaluate
from orki_codegen._gate.findings import Evaluation
from orki_contract.images import package_images
from orki_contract.versions import ContractVersion, version_at

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = "orki/options/v1/options.proto"
TODAY = date(2026, 11, 20)
BUILD = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
only-include = ["gen", "src"]
sources = ["gen", "src"]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The contents of a workspace.

    Attributes:
        protos: Text by path below proto/, without the syntax and the import of the options.
        versions: The version of each distribution, which owns the proto packages that begin with its name.
        needs: The dependencies of a distribution.
        sources: Hand-written modules by path, such as `acme-review/src/acme_review/__init__.py`.
    """

    protos: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def edited(self, path: str, before: str, after: str) -> Tree:
        """Return the tree with one proto or module changed."""
        for name, texts in (("protos", self.protos), ("sources", self.sources)):
            if path in texts:
                assert before in texts[path], f"{path} holds no {before}"
                return replace(self, **{name: {**texts, path: texts[path].replace(before, after)}})
        raise LookupError(path)

    def promising(self, **versions: str) -> Tree:
        """Return the tree with other versions; `_` in a name means `-`."""
        return replace(
            self, versions={**self.versions, **{name.replace("_", "-"): each for name, each in versions.items()}}
        )

    def lay_out(self, root: Path) -> Path:
        """Write it to a folder."""
        for path, text in self.protos.items():
            package = path.rpartition("/")[0].replace("/", ".")
            head = f'syntax = "proto3";\npackage {package};\nimport "{OPTIONS}";\n'
            _write(root / "proto" / path, head + text)
        for name, version in self.versions.items():
            prefix = name.replace("-", "/")
            contracts = sorted(
                {path.rpartition("/")[0].replace("/", ".") for path in self.protos if path.startswith(f"{prefix}/")}
            )
            table = f'[project]\nname = "{name}"\nversion = "{version}"\n'
            table += "dependencies = [\n" + "".join(f'    "{each}",\n' for each in self.needs.get(name, ())) + "]\n"
            table += f"[tool.orki]\ncontracts = {contracts}\n{BUILD}"
            _write(root / "packages" / name / "pyproject.toml", table)
        for path, text in self.sources.items():
            _write(root / "packages" / path, text)
        _write(root / "proto" / OPTIONS, (ROOT / "proto" / OPTIONS).read_text(encoding="utf-8"))
        shutil.copy(ROOT / "buf.yaml", root)
        return root


@cache
def contract_of(root: Path) -> ContractVersion:
    """Return a workspace's contract, cached because many tests share a baseline."""
    return version_at(str(root))


def evaluation_of(
    old: Path | Sequence[Path], new: Path, *, accepted: str = "", today: date = TODAY, streams_only: Sequence[bool] = ()
) -> Evaluation:
    """Evaluate a workspace against one or several others, the last release first."""
    baselines = []
    olds = [old] if isinstance(old, Path) else list(old)
    for index, each in enumerate(olds):
        releases = {
            member.name: Release(
                name=member.name,
                version=member.version,
                origin="the baseline",
                packages=member.contracts,
                imports=(each / member.folder / "src",),
                folder=each / member.folder,
                extras=frozenset(member.extras),
                python=member.python,
            )
            for member in find_members(each).values()
        }
        limited = index < len(streams_only) and streams_only[index]
        baselines.append(Baseline(releases=releases, contract=contract_of(each), streams_only=limited))
    buf = Buf(new)
    tree = read_tree(new, find_members(new), buf)
    return evaluate(baselines, tree, Policy(accepted=parse_accepted(accepted), today=today, lenient=True), buf)


def generated(root: Path) -> Path:
    """Write the images to the generator's paths; the gate reads no other generated code."""
    image = Buf(root).image()
    for member in find_members(root).values():
        for package, content in package_images(image, member.contracts).items():
            home = root / member.folder / "gen" / package.replace(".", "/")
            home.mkdir(parents=True, exist_ok=True)
            (home / "contract.binpb").write_bytes(content)
    return root


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
