"""The table of errors covers the enum of reasons, both ways."""

from __future__ import annotations

import pytest

from orki.errors.v1.errors_pb2 import Reason
from orki_contract import errors
from orki_contract.exceptions import __all__ as exception_names


def test_every_reason_has_one_exception() -> None:
    reasons = set(Reason.values()) - {Reason.REASON_UNSPECIFIED}
    classes = [getattr(errors, name) for name in exception_names if name != "OrkiError"]
    assert {cls.reason for cls in classes} == reasons
    assert len(classes) == len(reasons)


@pytest.mark.parametrize("reason", [value for value in Reason.values() if value])
def test_a_reason_off_the_wire_becomes_its_exception(reason: int) -> None:
    error = errors.error_for(reason, "what happened")  # type: ignore[arg-type]  # values() gives plain numbers
    assert error.reason == reason
    assert error.message == str(error) == "what happened"
    assert errors.status_of(reason) is not errors.Status.UNKNOWN or reason in (  # type: ignore[arg-type]
        Reason.REASON_HANDLER_FAILED,
        Reason.REASON_TOOL_FAILED,
    )


def test_a_newer_peers_reason_is_a_plain_error_that_names_the_number() -> None:
    error = errors.error_for(9_999, "new trouble")  # type: ignore[arg-type]
    assert type(error) is errors.OrkiError
    assert "9999" in error.message
    assert errors.status_of(9_999) is errors.Status.UNKNOWN  # type: ignore[arg-type]


def test_what_only_some_errors_carry() -> None:
    assert errors.error_for(Reason.REASON_PEER_LOST, "x").fully_written is True  # type: ignore[attr-defined]
    assert errors.PeerLost("x", fully_written=False).fully_written is False
    assert errors.ToolFailed("x", code=7).code == 7


def test_everything_is_exported() -> None:
    assert set(exception_names) < set(errors.__all__)
    assert all(hasattr(errors, name) for name in errors.__all__)
