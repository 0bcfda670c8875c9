"""The values that actors send and checks expect, and the protocol between actors and the driver.

An actor runs in one of the environments and imports only installed wheels. It writes one JSON object per line: first
`ready`, finally `done` or `refused`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

BEDS = 7


def bed(number: int) -> str:
    """Return the bed of a task or a reading."""
    return f"bed-{number % BEDS}"


def watering(number: int) -> dict[str, Any]:
    """Return the fields of a WaterRequest; `reason` is unknown to v1."""
    return {
        "bed": bed(number),
        "millilitres": 1_000 + number,
        "asked_us": -(2**40) - number,
        "reason": f"dry {number} ü",
    }


def reading(number: int) -> dict[str, Any]:
    """Return the fields of a MoistureEvent; `sensor` is unknown to v1."""
    return {"bed": bed(number), "fraction": number / 1_024, "reading": 2**53 + number, "sensor": f"sensor {number}"}


def measuring(number: int) -> dict[str, Any]:
    """Return the fields of a MeasureRequest; `temperature` is unknown to v1."""
    return {"depth": 2**40 + number, "times": number, "probe": f"probe {number} ü", "temperature": 300_000 + number}


def known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values whose fields exist in a message class."""
    return {name: value for name, value in values.items() if name in kind.DESCRIPTOR.fields_by_name}


def stream(module: Any, message: str) -> Any:
    """Return the stream of a message in a generated module; None if there is none."""
    found = (
        each for each in vars(module).values() if getattr(getattr(each, "message", None), "__name__", "") == message
    )
    return next(found, None)


def report(**facts: Any) -> None:
    """Write one line for the driver."""
    print(json.dumps(facts), flush=True)


def report_error(what: str, error: Exception) -> None:
    """Write one line with an error and its class."""
    report(**{what: {"type": type(error).__name__, "message": str(getattr(error, "message", error))}})


def instructions() -> dict[str, Any]:
    """Return the instructions of this actor: one JSON object, its only argument."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    return wanted
