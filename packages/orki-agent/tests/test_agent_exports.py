"""What `orki_agent` offers is what it says, name by name."""

from __future__ import annotations

import importlib
import pkgutil

import orki_agent


def test_the_front_door_holds_exactly_these() -> None:
    assert orki_agent.__all__ == ["Agent", "RunSettings", "ToolsAt"]


def test_every_module_says_what_it_offers_and_has_it() -> None:
    for found in pkgutil.walk_packages(orki_agent.__path__, "orki_agent."):
        if "._" in found.name:
            continue
        module = importlib.import_module(found.name)
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, f"{found.name} says it offers {missing}"
