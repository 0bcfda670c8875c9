"""The import path of the shared modules, and the pairs of the rules of change."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "evolution"):
    sys.path.insert(0, str(folder))
