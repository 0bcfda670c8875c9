"""Whether buf is told to use every rule: what buf.yaml leaves out it passes over, and only warns."""

from __future__ import annotations

__all__ = ["check_configuration"]

import json
from pathlib import Path
from typing import Final

from orki_codegen.buf import Buf
from orki_codegen.checks.rulebook import BREAKING
from orki_contract.errors import InvalidSetting

_BUF_RULES: Final = "FILE"


def check_configuration(root: Path, buf: Buf) -> None:
    """Makes sure that `buf breaking` uses every rule of orki's, and buf's own by file.

    This starts the plugin: one that is missing or fails ends here too.

    Raises:
        InvalidContract: buf or the plugin failed.
        InvalidSetting: A rule is not used.
    """
    rules = [json.loads(line) for line in buf.configured_rules("breaking")]
    used = {each["id"] for each in rules}
    missing = sorted(set(BREAKING) - used)
    if missing:
        raise InvalidSetting(
            f'buf.yaml: "breaking" does not use {", ".join(missing)}. buf would pass over such breaks with a warning: '
            "put the categories ORKI_… back into its `use`, as `orki-codegen init` writes them"
        )
    if not any(_BUF_RULES in (each["categories"] or ()) for each in rules if not each["id"].startswith("ORKI_")):
        raise InvalidSetting(
            f'buf.yaml: "breaking" does not use buf\'s own rules: put {_BUF_RULES} back into its `use`'
        )
