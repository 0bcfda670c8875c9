"""The contracts of one task service that are in use together: which one leads, and what their tasks are. No I/O.

Of any two of them one is a compatible evolution of the other, so there is one that is an evolution of all: it leads. It
has every task that any of them has. While several are in use, the operational values of a task (lease, timeouts,
attempts, grace, waits between attempts) are the most patient that any of them declares: nobody who was built against
one of them may find less time or fewer tries than it promised. A task keeps what it was submitted with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from orki_contract.errors import InvalidContract
from orki_contract.findings import Fit, service_fit
from orki_contract.images import service_digest
from orki_contract.model import TaskMethod
from orki_contract.read import ReadContract, read_image
from orki_server.store import Registered

__all__ = ["Family", "ServiceContract", "most_patient"]

_DIGITS: Final = 12


@dataclass(frozen=True, kw_only=True)
class ServiceContract:
    """One contract of a task service.

    Attributes:
        service: Full name of the service.
        digest: Of the contract: `sha256:` and 64 hex digits.
        image: The contract.
        version: Version of the package that holds it; empty where nobody knows.
    """

    service: str
    digest: str
    image: bytes = field(repr=False)
    version: str = ""

    @classmethod
    def of(cls, registered: Registered) -> ServiceContract:
        """One that is registered."""
        return cls(
            service=registered.service,
            digest=registered.digest,
            image=registered.image,
            version=registered.version,
        )

    @cached_property
    def read(self) -> ReadContract:
        """The contract; raises InvalidContract where the image is none."""
        return read_image(self.image)

    @cached_property
    def methods(self) -> Mapping[str, TaskMethod]:
        """Its tasks, by full name."""
        return {each.full_name: each for each in self.read.contract.tasks if each.service == self.service}

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers that its version begins with, such as (1, 2, 0); empty where none is known."""
        numbers = re.match(r"\d+(?:\.\d+)*", self.version)
        return tuple(map(int, numbers[0].split("."))) if numbers else ()

    def __str__(self) -> str:
        """Version, where it is known, and the digest's beginning."""
        short = self.digest[: len("sha256:") + _DIGITS]
        return f"{self.version} ({short})" if self.version else short

    def check(self) -> None:
        """Judges what an agent or an operator brings.

        Raises:
            InvalidContract: The image is none, lacks the service or its tasks, or has another digest than was said.
        """
        if not self.image:
            raise InvalidContract(
                f"the service {self.service} came without its contract's image; the package that declares it lacks "
                "contract.binpb"
            )
        digest = service_digest(self.image, self.service)
        if digest != self.digest:
            raise InvalidContract(
                f"the service {self.service}: its image has the digest {digest}, not {self.digest} as was said; "
                "generate the package again"
            )
        if not self.methods:
            raise InvalidContract(
                f"the service {self.service} declares no task; a tool service is not for the orchestrator"
            )


class Family:
    """Contracts of one service.

    Attributes:
        contracts: By digest.
        leading: The one that leads.
        methods: Tasks by full name, with the values that count.
    """

    def __init__(self, contracts: Iterable[ServiceContract]) -> None:
        """Args: contracts: at least one."""
        self.contracts = {each.digest: each for each in contracts}
        self.leading = _leading(list(self.contracts.values()))
        named: dict[str, list[TaskMethod]] = {}
        for each in self.contracts.values():
            for name, method in each.methods.items():
                named.setdefault(name, []).append(method)
        self.methods = {name: most_patient(found) for name, found in sorted(named.items())}


def most_patient(methods: Sequence[TaskMethod]) -> TaskMethod:
    """One task out of several versions of it: every value as the most patient has it, and news and directives if any.

    Args:
        methods: At least one, all of one name; 0 as a stall or total timeout is no limit, and so the most patient.
    """

    def limit(values: Iterable[int]) -> int:
        found = list(values)
        return 0 if 0 in found else max(found)

    backoff = max((each.backoff for each in methods), key=lambda each: (each.maximum_ms, each))
    return replace(
        methods[0],
        progress=max(each.progress for each in methods),
        directive=max(each.directive for each in methods),
        heartbeat_timeout_ms=max(each.heartbeat_timeout_ms for each in methods),
        attempt_timeout_ms=max(each.attempt_timeout_ms for each in methods),
        stall_timeout_ms=limit(each.stall_timeout_ms for each in methods),
        total_timeout_ms=limit(each.total_timeout_ms for each in methods),
        max_attempts=max(each.max_attempts for each in methods),
        backoff=backoff,
        cancel_grace_ms=max(each.cancel_grace_ms for each in methods),
    )


def _leading(contracts: list[ServiceContract]) -> ServiceContract:
    """The one that evolves most of the others; of equals the one with the highest digest, so that all agree."""

    def evolved(each: ServiceContract) -> tuple[int, str]:
        others = [other for other in contracts if other.digest != each.digest]
        return sum(not _fit(other, each).forward for other in others), each.digest

    return max(contracts, key=evolved) if len(contracts) > 1 else contracts[0]


def _fit(first: ServiceContract, second: ServiceContract) -> Fit:
    return service_fit(first.service, first.read, second.read)
