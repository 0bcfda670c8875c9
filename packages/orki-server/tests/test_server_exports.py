"""The names that orki_server exports."""

from __future__ import annotations

import importlib

PUBLIC = {"orki_server.embedded": ["EmbeddedOptions", "EmbeddedServer"]}


def test_public_modules_export_exactly_these_names() -> None:
    for name, expected in PUBLIC.items():
        module = importlib.import_module(name)
        assert sorted(module.__all__) == expected
        assert all(hasattr(module, each) for each in expected)
