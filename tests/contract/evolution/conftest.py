"""Makes the modules beside the tests importable: how pairs are read, and what judges mutants."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the size of the soundness run."""
    parser.addoption("--mutants", type=int, default=1000, help="mutants of the soundness test (1000)")
    parser.addoption("--mutant-seed", type=int, default=20261101, help="seed of the soundness test")
