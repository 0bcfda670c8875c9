"""buf, the one program that is run: it compiles the protos, and calls the plugins of buf.gen.yaml."""

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
"""buf's exit status where it ran well and found something."""


# How buf writes down what its compiler refuses, such as a wrong word or a type that is not there.
_REFUSAL: Final = re.compile(r"^(?P<place>\S.*?:\d+:\d+): ?(?P<message>.+)$", re.MULTILINE)


class BufFailed(InvalidContract):
    """buf refused the protos; the message is what it said, a compiler's complaints in the form of our own."""


class Buf:
    """buf in one workspace, with this interpreter's environment first on the PATH."""

    def __init__(self, root: Path) -> None:
        """Finds buf.

        Raises:
            InvalidSetting: There is none.
        """
        beside = str(Path(sys.executable).parent)
        self._path = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)])
        self._root = root
        program = shutil.which("buf", path=self._path)
        if program is None:
            raise InvalidSetting(
                "buf is not installed beside this Python, nor on the PATH: it comes with orki-codegen, "
                "so run the generator in the environment that holds it (`nox -s generate`)"
            )
        self._program = program

    def image(self) -> bytes:
        """The whole tree as a FileDescriptorSet with source information."""
        return self._run("build", "--as-file-descriptor-set", "--output", "-")

    def files(self) -> Mapping[str, str]:
        """Where each proto file lies: its path relative to the root, by the path under which it is imported."""
        lines = self._run("ls-files", "--format", "json").decode().splitlines()
        entries = [json.loads(line) for line in lines if line]
        return {entry["import_path"]: entry["path"] for entry in entries}

    def breaking(self, before: Path, after: Path, config: str) -> list[str]:
        """What buf's own rules say of two images; each line is a JSON object.

        Args:
            before: The old image.
            after: The new image.
            config: What stands for buf.yaml: that of the workspace would judge by its own modules.
        """
        arguments = [str(after), "--against", str(before), "--config", config, "--error-format", "json"]
        return self._run("breaking", *arguments, also=_FOUND).decode().splitlines()

    def configured_rules(self, kind: str) -> list[str]:
        """The rules that buf.yaml switches on; each line is a JSON object.

        Args:
            kind: `breaking` or `lint`.
        """
        listed = self._run("config", f"ls-{kind}-rules", "--configured-only", "--format", "json")
        return listed.decode().splitlines()

    def generate(self, paths: Sequence[str], out: Path) -> None:
        """Runs buf.gen.yaml on some files; the folders named in it are made below `out`."""
        chosen = [argument for path in paths for argument in ("--path", path)]
        self._run("generate", "--output", str(out), *chosen)

    def _run(self, *arguments: str, also: int = 0) -> bytes:
        environment = {**os.environ, "PATH": self._path, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [self._program, *arguments]
        ran = subprocess.run(command, cwd=self._root, env=environment, capture_output=True, check=False)
        if ran.returncode not in (0, also):
            said = ran.stderr.decode(errors="replace").strip() or f"buf {arguments[0]} failed without a word"
            raise BufFailed(
                _REFUSAL.sub(r"\g<place>: \g<message> [COMPILE]", said) if arguments[0] == "build" else said
            )
        return ran.stdout
