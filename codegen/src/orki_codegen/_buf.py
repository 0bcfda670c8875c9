"""Runs buf, which compiles the protos and calls the plugins of buf.gen.yaml."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from orki_contract.errors import InvalidContract, InvalidSetting

_FOUND: Final = 100
"""Exit status of buf for findings."""


# A compile error of buf.
_REFUSAL: Final = re.compile(r"^(?P<path>\S.*?:\d+:\d+): ?(?P<message>.+)$", re.MULTILINE)


class BufFailed(InvalidContract):
    """buf refused the protos; the message is its output, with compile errors in the form of orki violations."""


class Buf:
    """Runs buf in one workspace, with the environment of this interpreter first in PATH."""

    def __init__(self, root: Path) -> None:
        """Find buf.

        Raises:
            InvalidSetting: buf is not installed.
        """
        beside = str(Path(sys.executable).parent)
        self._path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
        self._root = root
        program = shutil.which("buf", path=self._path)
        if program is None:
            raise InvalidSetting(
                "buf is not installed beside this Python, nor on the PATH: run the generator in the environment of "
                "orki-codegen, which installs buf (`nox -s generate`)"
            )
        self._program = program

    def image(self) -> bytes:
        """Return all protos as a FileDescriptorSet with source information."""
        return self._run("build", "--as-file-descriptor-set", "--output", "-")

    def files(self) -> Mapping[str, str]:
        """Return the path of each proto file relative to the root, by its import path."""
        lines = self._run("ls-files", "--format", "json").decode().splitlines()
        entries = [json.loads(line) for line in lines if line]
        return {entry["import_path"]: entry["path"] for entry in entries}

    def breaking(self, before: Path, after: Path, config: str) -> list[str]:
        """Compare two images by the rules of a configuration in JSON, and return buf's findings as JSON lines."""
        arguments = [str(after), "--against", str(before), "--config", config, "--error-format", "json"]
        return self._run("breaking", *arguments, also=_FOUND).decode().splitlines()

    def configured_rules(self, kind: str) -> list[str]:
        """Return the rules of a kind, `breaking` or `lint`, that buf.yaml enables, as JSON lines."""
        listed = self._run("config", f"ls-{kind}-rules", "--configured-only", "--format", "json")
        return listed.decode().splitlines()

    def generate(self, paths: Sequence[str], out: Path) -> None:
        """Run buf.gen.yaml for some paths; its folders are created below `out`."""
        chosen = [argument for path in paths for argument in ("--path", path)]
        self._run("generate", "--output", str(out), *chosen)

    def _run(self, *arguments: str, also: int = 0) -> bytes:
        environment = {**os.environ, "PATH": self._path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [self._program, *arguments]
        ran = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, check=False)
        if ran.returncode not in (0, also):
            output = ran.stderr.decode(errors="replace").strip() or f"buf {arguments[0]} failed without output"
            raise BufFailed(
                _REFUSAL.sub(r"\g<path>: \g<message> [COMPILE]", output) if arguments[0] == "build" else output
            )
        return ran.stdout
