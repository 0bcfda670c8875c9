"""What every actor and the judge agree on: the values that travel, and how an actor speaks with the driver.

An actor runs inside one of the environments and imports what the wheels there brought, never the tree. It writes one
JSON object a line: first `ready`, at last `done` or `refused`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

BEDS = 7


def bed(number: int) -> str:
    """Name of the bed of a task or a reading."""
    return f"bed-{number % BEDS}"


def watering(number: int) -> dict[str, Any]:
    """Fields of a WaterRequest; `reason` is unknown to v1."""
    return {
        "bed": bed(number),
        "millilitres": 1_000 + number,
        "asked_us": -(2**40) - number,
        "reason": f"dry {number} ü",
    }


def reading(number: int) -> dict[str, Any]:
    """Fields of a MoistureEvent; `sensor` is unknown to v1."""
    return {"bed": bed(number), "fraction": number / 1_024, "reading": 2**53 + number, "sensor": f"sensor {number}"}


def measuring(number: int) -> dict[str, Any]:
    """Fields of a MeasureRequest; `temperature` is unknown to v1."""
    return {"depth": 2**40 + number, "times": number, "probe": f"probe {number} ü", "temperature": 300_000 + number}


def known(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values whose fields a message class has here."""
    return {name: value for name, value in values.items() if name in kind.DESCRIPTOR.fields_by_name}


def stream(module: Any, message: str) -> Any:
    """The stream of a message in a generated module, whatever its name; None where there is none."""
    found = (
        each for each in vars(module).values() if getattr(getattr(each, "message", None), "__name__", "") == message
    )
    return next(found, None)


def tell(**facts: Any) -> None:
    """One line for the driver."""
    print(json.dumps(facts), flush=True)


def tell_error(what: str, error: Exception) -> None:
    """One line about an error, with its class."""
    tell(**{what: {"type": type(error).__name__, "message": str(getattr(error, "message", error))}})


def asked() -> dict[str, Any]:
    """What the driver wants of this actor: one JSON object, the only argument."""
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    return wanted
