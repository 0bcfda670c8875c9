"""The import path of the shared module, and the copy of the workspace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planting import equal_copy


@pytest.fixture(scope="module")
def workspace() -> Path:
    """A copy of the workspace; unchanged files keep their times, so caches stay valid."""
    return equal_copy()
