"""Every reason has one error class and one status code."""

from __future__ import annotations

import pytest

from orki.errors.v1.errors_pb2 import Reason
from orki_contract import errors

CLASSES = [
    error
    for error in map(errors.__dict__.get, errors.__all__)
    if isinstance(error, type) and issubclass(error, errors.OrkiError) and error is not errors.OrkiError
]


def test_each_reason_has_one_error_class() -> None:
    assert sorted(error.reason for error in CLASSES) == sorted(set(Reason.values()) - {Reason.REASON_UNSPECIFIED})


@pytest.mark.parametrize("reason", [value for value in Reason.values() if value])
def test_a_received_reason_becomes_its_error(reason: int) -> None:
    error = errors.error_for(reason, "what happened")  # type: ignore[arg-type]  # values() gives plain numbers
    assert error.reason == reason
    assert error.message == str(error) == "what happened"
    assert errors.status_of(reason) is not errors.Status.UNKNOWN or reason in (  # type: ignore[arg-type]
        Reason.REASON_HANDLER_FAILED,
        Reason.REASON_TOOL_FAILED,
    )


def test_an_unknown_reason_becomes_a_plain_error_with_its_number() -> None:
    error = errors.error_for(9_999, "new trouble")  # type: ignore[arg-type]
    assert type(error) is errors.OrkiError
    assert "9999" in error.message
    assert errors.status_of(9_999) is errors.Status.UNKNOWN  # type: ignore[arg-type]


def test_some_errors_carry_extra_fields() -> None:
    assert errors.error_for(Reason.REASON_PEER_LOST, "x").fully_written is True  # type: ignore[attr-defined]
    assert errors.PeerLost("x", fully_written=False).fully_written is False
    assert errors.ToolFailed("x", code=7).code == 7
