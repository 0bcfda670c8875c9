"""What `orki contract list` shows: a row for each registered version of each service and stream."""

from __future__ import annotations

__all__ = ["ContractRow", "registered_rows"]

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from orki_events.connection import Connection
from orki_events.registry import RegisteredStream, StreamRegistry
from orki_server._admission import Admission, Liveness, ServiceContract
from orki_server._store.contracts import Contracts, RegisteredContract
from orki_server.observers.stream_figures import StreamFigures, stream_figures

_DIGITS: Final = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractRow:
    """One registered version.

    Attributes:
        kind: `service` or `stream`.
        name: Of the service or stream.
        version: Version of its package; empty where nobody knows.
        digest: Of the service's contract, or of the image of the stream's package; empty without one.
        state: `live`, `applied` or `idle`.
        leading: Whether it is the one that counts.
        agents: Who serves it.
        unfinished_tasks: Tasks of it that have not ended.
        groups: A stream's groups: name, number of consumers, whether the server lacks it.
    """

    kind: str
    name: str
    version: str
    digest: str
    state: str
    leading: bool
    agents: tuple[str, ...] = ()
    unfinished_tasks: int = 0
    groups: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The row with stable keys."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        name = f"{self.name} *" if self.leading and self.kind == "service" else self.name
        return self.kind, name, self.version or "-", self.digest[:_DIGITS] or "-", self.state, self._served()

    def _served(self) -> str:
        told = list(self.agents)
        if self.unfinished_tasks:
            told.append(f"{self.unfinished_tasks} unfinished task{'s' if self.unfinished_tasks > 1 else ''}")
        for group in self.groups:
            count = "missing" if group["missing"] else str(group["consumers"])
            told.append(f"{group['name']} ({count})")
        return ", ".join(told) or "-"


async def registered_rows(admission: Admission, contracts: Contracts, link: Connection) -> list[ContractRow]:
    """All registered versions: services, then streams, by name.

    Raises:
        OrkiError: A server does not answer or refuses.
    """
    rows: list[ContractRow] = []
    leading = {each.service: each.digest for each in await contracts.leading()}
    for name, seen in sorted((await contracts.registered(sorted(leading))).items()):
        live = await admission.liveness(name, seen)
        rows += [_service(each, live[each.digest], leading[name]) for each in seen]
    streams = await StreamRegistry().streams(link)
    figures = await stream_figures(link, streams)
    rows += [_stream(each, shown) for each, shown in zip(streams, figures, strict=True)]
    return rows


def _service(registered: RegisteredContract, live: Liveness, leading: str) -> ContractRow:
    contract = ServiceContract.of(registered)
    return ContractRow(
        kind="service",
        name=contract.service,
        version=contract.version,
        digest=contract.digest,
        state="live" if live.agents or live.tasks else "applied" if live.ahead else "idle",
        leading=contract.digest == leading,
        agents=live.agents,
        unfinished_tasks=live.tasks,
    )


def _stream(registered: RegisteredStream, figures: StreamFigures) -> ContractRow:
    return ContractRow(
        kind="stream",
        name=registered.contract.name,
        version=registered.version,
        digest=registered.digest,
        state="applied" if registered.ahead else "live",
        leading=True,
        groups=tuple(_groups(figures)),
    )


def _groups(figures: StreamFigures) -> Iterable[dict[str, Any]]:
    for each in figures.groups:
        yield {"name": each.group, "consumers": each.consumers, "missing": each.missing}
