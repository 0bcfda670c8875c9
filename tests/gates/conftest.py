"""Makes the module beside the tests importable, and the copy of the workspace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planting import equal_copy


@pytest.fixture(scope="module")
def workspace() -> Path:
    """A copy that equals the workspace; what did not change keeps its times, so caches stay good."""
    return equal_copy()
