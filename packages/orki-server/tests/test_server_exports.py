"""What the server's modules offer is what they say."""

from __future__ import annotations

import importlib
import pkgutil

import orki_server
from orki_server import store


def test_every_module_says_what_it_offers_and_has_it() -> None:
    for found in pkgutil.walk_packages(orki_server.__path__, "orki_server."):
        if found.ispkg or found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, f"{found.name} says it offers {missing}"


def test_the_store_s_front_door_holds_what_it_says() -> None:
    assert len(store.__all__) == len(set(store.__all__))
    assert [name for name in store.__all__ if not hasattr(store, name)] == []
