"""Files of a new repository, and the copies of orki files that a repository holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from keyword import iskeyword
from pathlib import Path
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from orki_contract.errors import InvalidSetting
from orki_contract.naming import constant_name

VENDORED: Final[Mapping[str, str]] = {
    "buf.yaml": "buf.yaml",
    "buf.gen.yaml": "buf.gen.yaml",
    "options.proto": "proto/orki/options/v1/options.proto",
}
"""The path of each copy, by its name in this package."""


def bring_up_to_date(root: Path) -> Iterator[str]:
    """Write missing files, update options.proto, and yield a line for each file.

    Raises:
        InvalidSetting: A file cannot be written.
    """
    for name, place in VENDORED.items():
        content = (resources.files("orki_codegen") / "vendored" / name).read_bytes()
        path = root / place
        if path.is_file() and (path.read_bytes() == content or name != "options.proto"):
            yield f"{place} exists already"
            continue
        word = "updated" if path.is_file() else "written"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise InvalidSetting(f"{place} cannot be written: {error.strerror}") from error
        yield f"{place} {word}"


RELEASED: Final[Mapping[str, str]] = {
    "orki-agent": "0.1.0",
    "orki-codegen": "0.1.0",
    "orki-contract": "0.1.0",
    "orki-control": "0.1.0",
    "orki-events": "0.1.0",
    "orki-server": "0.1.0",
}
"""The oldest supported release of each distribution; ranges end at the next release that may break."""

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PACKAGE: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\.v[1-9][0-9]*((alpha|beta)[1-9][0-9]*)?")
_LONGEST: Final = 40
_TAKEN: Final = frozenset({"google", "grpc", "mypy", "nox", "orki", "pytest", "tests"})

# The path of each template.
_FILES: Final[Mapping[str, str]] = {
    "README.md": "README.md",
    "constraints.txt": "constraints.txt",
    "gitattributes": ".gitattributes",
    "gitignore": ".gitignore",
    "noxfile.py": "noxfile.py",
    "noxw": "noxw",
    "pyproject.toml": "pyproject.toml",
    "workflow.yml": ".github/workflows/checks.yml",
    "text.proto": "proto/{folder}/text.proto",
    "tools.proto": "proto/{folder}/tools.proto",
    "distribution.toml": "packages/{name}/pyproject.toml",
    "distribution_readme.md": "packages/{name}/README.md",
    "package.py": "packages/{name}/src/{module}/__init__.py",
    "py.typed": "packages/{name}/src/{module}/py.typed",
    "agent.py": "packages/{name}/src/{module}/agent.py",
    "report.py": "packages/{name}/src/{module}/report.py",
    "demo.py": "packages/{name}/src/{module}/demo.py",
    "test_agent.py": "packages/{name}/tests/test_agent.py",
    "test_report.py": "packages/{name}/tests/test_report.py",
}
_PROGRAMS: Final = frozenset({"noxw"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names in a new repository.

    Attributes:
        name: The distribution, such as `acme-review`.
        package: The proto package, such as `acme.review.v1`.
        module: The import package of hand-written code, such as `acme_review`.
    """

    name: str
    package: str
    module: str


def names_for(name: str, package: str = "") -> Names:
    """Check the names of a distribution and its proto package, and derive the others.

    The package is derived from the distribution's name if it is empty.

    Raises:
        InvalidSetting: A name cannot be used.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise InvalidSetting(
            f'"{name}" is not a valid distribution name: give --name with lower-case letters, digits and single '
            f"dashes, beginning with a letter, at most {_LONGEST} characters, such as --name acme-review"
        )
    # A part of a package name cannot begin with a digit.
    package = package or re.sub(r"-(?=\d)", "_", name).replace("-", ".") + ".v1"
    if not _PACKAGE.fullmatch(package) or len(package) > _LONGEST + 3:
        raise InvalidSetting(
            f'"{package}" is not a valid proto package name: give --package with words of lower-case letters and '
            f"digits between dots, and a version at the end, at most {_LONGEST + 3} characters, "
            "such as --package acme.review.v1"
        )
    module = name.replace("-", "_")
    if module == package.partition(".")[0]:
        # A package with an __init__.py would hide the namespace package of the generated code.
        module += "_agent"
    for given, word in ((module, "--name"), (package.partition(".")[0], "--package")):
        if given in sys.stdlib_module_names or given in _TAKEN or given.startswith("orki_"):
            raise InvalidSetting(f'Python has another module named "{given}": give another {word}')
    for part in [module, *package.split(".")]:
        if iskeyword(part):
            raise InvalidSetting(f'"{part}" is a Python keyword and cannot name a module: give another name')
    return Names(name=name, package=package, module=module)


def lay_out(folder: Path, names: Names) -> tuple[list[str], list[str]]:
    """Write the files of a new repository; existing files are kept.

    Returns:
        The written and the kept paths, relative to the folder and sorted.

    Raises:
        InvalidSetting: A file cannot be written.
    """
    written, kept = [], []
    for place, content in sorted(_contents(names).items()):
        path = folder / place
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(content)
            if place in _PROGRAMS:
                path.chmod(0o755)
        except FileExistsError:
            if not path.is_file():
                raise InvalidSetting(f"{path} exists and is not a file") from None
            kept.append(place)
        except OSError as error:
            raise InvalidSetting(f"{path} cannot be written: {error.strerror}") from error
        else:
            written.append(place)
    return written, kept


def _contents(names: Names) -> dict[str, bytes]:
    """Return every file by its path."""
    environment = Environment(
        loader=PackageLoader("orki_codegen", "templates/repository"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        # The default `{#` appears in shell code.
        comment_start_string="<#",
        comment_end_string="#>",
    )
    folder = names.package.replace(".", "/")
    stream = f"{names.name.replace('-', '_')}_counts"
    values = {
        "name": names.name,
        "package": names.package,
        "module": names.module,
        "folder": folder,
        "stream": stream,
        "handle": constant_name(stream),
        "imports": _imports,
        "ranges": {name: _range(version) for name, version in RELEASED.items()},
    }
    found = {
        place.format(name=names.name, module=names.module, folder=folder): environment.get_template(f"{template}.j2")
        .render(values)
        .encode()
        for template, place in _FILES.items()
    }
    for name, place in VENDORED.items():
        found[place] = (resources.files("orki_codegen") / "vendored" / name).read_bytes()
    return found


def _imports(modules: Iterable[tuple[str, str]]) -> str:
    """Return the import statements of one section in the format of ruff."""
    lines = []
    for module, names in sorted(modules):
        line = f"from {module} import {names}"
        if len(line) > 120:
            line = "\n".join([f"from {module} import (", *(f"    {name}," for name in names.split(", ")), ")"])
        lines.append(line)
    return "\n".join(lines)


def _range(version: str) -> str:
    """Return the range from a release to the next one that may break: before 1.0 the next minor release."""
    major, minor, *_ = (int(part) for part in re.findall(r"\d+", version)[:3])
    return f">={version},<{major + 1}" if major else f">={version},<0.{minor + 1}.0"
