"""The names that orki_server exports. All other modules are internal."""

from __future__ import annotations

import importlib
import pkgutil

import orki_server

PUBLIC = {"orki_server.embedded": ["EmbeddedOptions", "EmbeddedServer"]}


def test_public_modules_export_exactly_these_names() -> None:
    for name, expected in PUBLIC.items():
        module = importlib.import_module(name)
        assert sorted(module.__all__) == expected
        assert all(hasattr(module, each) for each in expected)


def test_all_other_modules_are_marked_internal() -> None:
    names = [found.name for found in pkgutil.iter_modules(orki_server.__path__, "orki_server.")]
    assert [name for name in names if not name.startswith("orki_server._")] == list(PUBLIC)
