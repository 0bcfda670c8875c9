"""What `orki_control` offers is what it says, name by name."""

from __future__ import annotations

import importlib
import pkgutil

import orki_control
import orki_control.session


def test_the_front_door_holds_exactly_these() -> None:
    assert orki_control.__all__ == ["Client", "ClientOptions", "JitterOptions", "SubmittedTask"]


def test_every_module_says_what_it_offers_and_has_it() -> None:
    for found in pkgutil.walk_packages(orki_control.__path__, "orki_control."):
        module = importlib.import_module(found.name)
        assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name)), found.name
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, f"{found.name} says it offers {missing}"
    assert set(orki_control.session.__all__) > {"AgentSession", "OrchestratorSession", "AGENT", "ORCHESTRATOR"}
