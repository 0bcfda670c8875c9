"""Fixtures of the hot path tests: bridges on real sockets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For `hotpath_tools`, which the test modules share.
sys.path.insert(0, str(Path(__file__).parent))

from hotpath_tools import AsyncSampleTools, SampleTools

from orki_agent.hotpath import SyncToolClient, ToolBridge


@pytest.fixture
def bridge() -> Iterator[ToolBridge]:
    """A running bridge with all sample tools."""
    with ToolBridge(SampleTools(), AsyncSampleTools()) as running:
        yield running


@pytest.fixture
def client(bridge: ToolBridge) -> Iterator[SyncToolClient]:
    """A sync client of `bridge`."""
    with SyncToolClient(bridge.path, bridge.token, name="tester") as made:
        yield made
