"""From proto names to Python names."""

from __future__ import annotations

import pytest

from orki_contract.naming import class_name, constant_name, frame_class, module_path, snake_name, unused


@pytest.mark.parametrize(
    ("name", "snake"),
    [
        ("ReadFile", "read_file"),
        ("readFile", "read_file"),
        ("GetHTTPUrl", "get_http_url"),
        ("GetURL", "get_url"),
        ("ListV2Things", "list_v2_things"),
        ("A", "a"),
        ("already_snake", "already_snake"),
        ("review-findings.v2", "review_findings_v2"),
    ],
)
def test_snake_and_constant(name: str, snake: str) -> None:
    assert snake_name(name) == snake
    assert constant_name(name) == snake.upper()


def test_classes() -> None:
    assert class_name("review_findings") == "ReviewFindings"
    assert class_name("orders.placed-v2") == "OrdersPlacedV2"
    assert frame_class("acme.v1.Outer.Inner", "acme.v1") == "Outer_Inner"
    assert frame_class("Inner", "") == "Inner"


def test_modules_as_protoc_names_them() -> None:
    assert module_path("acme/v1/my-file.proto", "_pb2") == "acme/v1/my_file_pb2.py"


def test_names_that_are_taken_get_underscores() -> None:
    assert unused("oc", {"pb"}) == "oc"
    assert unused("oc", {"oc", "oc_"}) == "oc__"
