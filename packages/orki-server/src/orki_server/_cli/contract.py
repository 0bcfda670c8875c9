"""`orki contract`: which contracts the fleet uses, registering one ahead, and withdrawing one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

import click

from orki_contract.errors import InvalidContract, OrkiError
from orki_events.connection import Connection
from orki_events.registry import RegisteredStream, StreamRegistry
from orki_server._admission import Admission, Liveness, ServiceContract
from orki_server._apply import Applied, Declared, apply, check_declared, open_admission, read_declared
from orki_server._cli.formats import Column, print_json, print_table
from orki_server._cli.options import events_link, json_option, redis_option, run
from orki_server._cli.root import LazyGroup, Refused
from orki_server._observers.stream_stats import StreamFigures, stream_figures
from orki_server._store.contracts import Contracts, RegisteredContract

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


_APPLIED = (
    Column(name="KIND", whole=True),
    Column(name="NAME"),
    Column(name="VERSION"),
    Column(name="DIGEST"),
    Column(name="OUTCOME", whole=True),
)
_LISTED = (
    Column(name="KIND", whole=True),
    Column(name="NAME", wraps=True),
    Column(name="VERSION"),
    Column(name="DIGEST", whole=True),
    Column(name="STATE", whole=True, judged=True),
    Column(name="SERVED BY", wraps=True),
)

events_option = click.option(
    "--events",
    "events_url",
    metavar="URL",
    default="",
    help="Redis that holds the event plane; the same when left out.",
)


@click.group(
    cls=LazyGroup,
    lazy={
        "apply": ("orki_server._cli.contract:apply_command", "Register a contract ahead of those who use it."),
        "list": ("orki_server._cli.contract:list_command", "Show the contracts that the fleet uses."),
        "withdraw": ("orki_server._cli.contract:withdraw_command", "Forget a contract that nobody uses."),
    },
    epilog="""\b
Examples:
  orki contract list
  orki contract apply acme_review-1.3.0-py3-none-any.whl
""",
)
def contract() -> None:
    """Look at the contracts that the fleet uses, and register new ones ahead.

    A task service is known by every contract under which agents serve it; during a rolling upgrade there are several.
    A new one passes when it fits all that are live: one of each two is a compatible evolution of the other. What breaks
    is refused by the names of the rules (docs/compatibility.md has them all); `orki-contract diff OLD NEW` tells the
    same about two wheels without any fleet.
    """


@click.command(
    "apply",
    epilog="""\b
SOURCE is one of:
  acme-1.3.0-….whl   a wheel; every contract.binpb in it is read
  contract.binpb     the image of one proto package, as wheels ship it
  review.binpb       any other image (buf build -o review.binpb), for all packages in it
  packages/acme      a folder with images
  acme-review        an installed distribution, or an installed proto package

\b
Examples:
  orki contract apply --check dist/acme_review-1.3.0-py3-none-any.whl
  orki contract apply gen/acme/review/v1/contract.binpb --package-version 1.3.0

Exit status: 0, everything stands; 1, something does not fit what is live, and nothing was written; 2, SOURCE cannot be
read or declares nothing to register.
""",
)
@click.argument("source")
@click.option("--check", is_flag=True, help="Only judge; write nothing.")
@click.option(
    "--package-version", default="", metavar="VERSION", help="Version of the packages, where SOURCE does not tell it."
)
@json_option
@redis_option
@events_option
def apply_command(
    source: str, check: bool, package_version: str, as_json: bool, redis_url: str, events_url: str
) -> None:
    """Register the contracts of SOURCE ahead of those who use them.

    Task services are known from then on: tasks may be submitted, and agents that would break with them are refused.
    Streams are registered, and the groups that they and their readers declare are created, so that what is published
    before any consumer runs waits for it. All is judged first; where anything does not fit, nothing is written.
    Applying again is harmless.
    """
    try:
        declared = read_declared(source, package_version)
    except InvalidContract as error:
        raise click.UsageError(error.message) from error
    done, refusals = run(_apply(declared, redis_url, events_url, check))
    if as_json:
        print_json({"applied": [asdict(each) for each in done], "refused": refusals})
    elif done:
        rows = [(each.kind, each.name, each.version or "-", each.digest[:19], each.outcome) for each in done]
        print_table(_APPLIED, rows, empty="")
    elif not refusals:
        click.echo("everything fits what is live and registered; nothing was written (--check)")
    if refusals:
        raise Refused("; ".join(refusals))


async def _apply(declared: Declared, redis_url: str, events_url: str, check: bool) -> tuple[list[Applied], list[str]]:
    registry = StreamRegistry()
    async with open_admission(redis_url) as (admission, _, _), events_link(events_url or redis_url) as link:
        refusals = await check_declared(declared, admission, registry, link)
        if refusals or check:
            return [], refusals
        return await apply(declared, admission, registry, link), []


@click.command(
    "list",
    epilog="""\b
Examples:
  orki contract list
  orki contract list --json | jq '.[] | select(.state == "applied")'
""",
)
@json_option
@redis_option
@events_option
def list_command(as_json: bool, redis_url: str, events_url: str) -> None:
    """Show task services and streams, each registered version of them, and who serves it.

    STATE is live (agents serve it, or tasks of it have not ended; of a stream: it was published or consumed), applied
    (registered ahead, used by nobody yet), or idle (registered, and in nobody's way). A star marks the version that
    leads: new tasks are submitted under it. SERVED BY names agents, unfinished tasks, or a stream's groups with their
    consumers.
    """
    rows = run(_rows(redis_url, events_url))
    if as_json:
        print_json([each.to_json() for each in rows])
    else:
        print_table(_LISTED, [each.cells() for each in rows], empty="no contracts yet: no agent, publisher or consumer")


async def _rows(redis_url: str, events_url: str) -> list[ContractRow]:
    async with open_admission(redis_url) as (admission, contracts, _), events_link(events_url or redis_url) as link:
        return await registered_rows(admission, contracts, link)


@click.command(
    "withdraw",
    epilog="""\b
Examples:
  orki contract withdraw acme.review.v1.ReviewService sha256:1f0c
  orki contract withdraw review_findings
""",
)
@click.argument("name")
@click.argument("digest", required=False, default="")
@redis_option
@events_option
def withdraw_command(name: str, digest: str, redis_url: str, events_url: str) -> None:
    """Forget the contract of a task service or stream NAME.

    Of a service with several contracts DIGEST, or its beginning, says which one. One that agents serve or that has
    unfinished tasks stays. Of a stream the registration goes, and nothing else: entries and groups stay, and the next
    one who publishes registers it anew. So make sure that its old publishers and consumers are gone.
    """
    click.echo(run(_withdraw(name, digest, redis_url, events_url)))


async def _withdraw(name: str, digest: str, redis_url: str, events_url: str) -> str:
    async with open_admission(redis_url) as (admission, contracts, _), events_link(events_url or redis_url) as link:
        found = [each for each in (await contracts.registered([name]))[name] if each.digest.startswith(digest)]
        if len(found) > 1:
            digests = ", ".join(each.digest[:19] for each in found)
            raise click.UsageError(f"{name} has {len(found)} contracts: give the digest of one of them ({digests})")
        if found:
            if not await admission.withdraw(found[0]):
                raise OrkiError(f"{name} is used under {found[0].digest[:19]}: stop its agents and let its tasks end")
            return f"service {name}: {found[0].digest[:19]} is withdrawn"
        if not digest and await StreamRegistry().withdraw(link, name):
            return f"stream {name}: its registration is withdrawn; entries and groups stay"
    which = " with that digest" if digest else ""
    raise OrkiError(f"no service or stream {name!r} is registered{which}; see: orki contract list")
