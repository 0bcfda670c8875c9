"""For tests of the hot path: real bridges on real sockets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What several test modules share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from hotpath_tools import AsyncSampleTools, SampleTools

from orki_agent.hotpath import SyncToolClient, ToolBridge


@pytest.fixture
def bridge() -> Iterator[ToolBridge]:
    """A bridge with all sample tools."""
    with ToolBridge(SampleTools(), AsyncSampleTools()) as running:
        yield running


@pytest.fixture
def client(bridge: ToolBridge) -> Iterator[SyncToolClient]:
    """A blocking client of it."""
    with SyncToolClient(bridge.path, bridge.token, name="tester") as made:
        yield made
