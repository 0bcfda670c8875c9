"""`orki contract`: lists the registered contracts, registers new ones and withdraws unused ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

import click

from orki_contract.errors import InvalidContract, OrkiError
from orki_events.connection import Connection
from orki_events.registry import StreamRegistry, StreamVersion
from orki_server._admission import Admission, Liveness, ServiceContract
from orki_server._apply import Applied, Declared, apply, check_declared, open_admission, read_declared
from orki_server._cli.formats import Column, counted, print_json, print_table
from orki_server._cli.options import json_option, open_redis, redis_option, run
from orki_server._cli.root import CommandError, LazyGroup
from orki_server._observers.stream_stats import StreamStats, read_stream_stats
from orki_server._store.contracts import Contracts, RegisteredContract

_DIGEST_CHARS: Final = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractRow:
    """One registered version of a service or stream.

    Attributes:
        kind: `service` or `stream`.
        name: Name of the service or stream.
        version: Version of its package; empty if unknown.
        digest: Digest of the service's contract, or of the image of the stream's package; empty without one.
        state: `live`, `applied` or `idle`.
        leading: Whether new tasks are submitted under this version; always true for a stream.
        agents: Ids of the agents that serve it.
        unfinished_tasks: Number of its tasks that have not ended.
        groups: The stream's groups: name, number of consumers, and whether the group is missing in Redis.
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
        """Return the row as JSON with stable keys."""
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table row."""
        name = f"{self.name} *" if self.leading and self.kind == "service" else self.name
        return self.kind, name, self.version or "-", self.digest[:_DIGEST_CHARS] or "-", self.state, self._served()

    def _served(self) -> str:
        users = list(self.agents)
        if self.unfinished_tasks:
            users.append(counted(self.unfinished_tasks, "unfinished task"))
        for group in self.groups:
            count = "missing" if group["missing"] else str(group["consumers"])
            users.append(f"{group['name']} ({count})")
        return ", ".join(users) or "-"


async def registered_rows(admission: Admission, contracts: Contracts, link: Connection) -> list[ContractRow]:
    """Return all registered versions: services, then streams, by name.

    Raises:
        OrkiError: A server does not answer or refuses the command.
    """
    rows: list[ContractRow] = []
    leading = {each.service: each.digest for each in await contracts.leading()}
    for name, seen in sorted((await contracts.registered(sorted(leading))).items()):
        live = await admission.liveness(name, seen)
        rows += [_service(each, live[each.digest], leading[name]) for each in seen]
    streams = await StreamRegistry().streams(link)
    figures = await read_stream_stats(link, streams)
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


def _stream(registered: StreamVersion, figures: StreamStats) -> ContractRow:
    return ContractRow(
        kind="stream",
        name=registered.contract.name,
        version=registered.version,
        digest=registered.digest,
        state="applied" if registered.ahead else "live",
        leading=True,
        groups=tuple(_groups(figures)),
    )


def _groups(figures: StreamStats) -> Iterable[dict[str, Any]]:
    for each in figures.groups:
        yield {"name": each.group, "consumers": each.consumers, "missing": each.missing}


_APPLIED = (
    Column(name="KIND", uncut=True),
    Column(name="NAME"),
    Column(name="VERSION"),
    Column(name="DIGEST"),
    Column(name="OUTCOME", uncut=True),
)
_LISTED = (
    Column(name="KIND", uncut=True),
    Column(name="NAME", wraps=True),
    Column(name="VERSION"),
    Column(name="DIGEST", uncut=True),
    Column(name="STATE", uncut=True, colored=True),
    Column(name="SERVED BY", wraps=True),
)

events_option = click.option(
    "--events",
    "events_url",
    metavar="URL",
    default="",
    help="Redis for the event plane; by default, the same as --redis.",
)


@click.group(
    cls=LazyGroup,
    lazy={
        "apply": ("orki_server._cli.contract:apply_command", "Register a contract before it is used."),
        "list": ("orki_server._cli.contract:list_command", "List the registered contracts and their users."),
        "withdraw": ("orki_server._cli.contract:withdraw_command", "Remove the registration of an unused contract."),
    },
    epilog="""\b
Examples:
  orki contract list
  orki contract apply acme_review-1.3.0-py3-none-any.whl
""",
)
def contract() -> None:
    """List, register and withdraw contracts.

    A task service is registered with every contract that agents serve it under; during a rolling upgrade there are
    several. A new contract is accepted if it is compatible with every live one: of each two, one is a compatible
    evolution of the other. A breaking contract is refused with the names of the broken rules, which
    docs/compatibility.md explains. `orki-contract diff OLD NEW` compares two wheels without a fleet.
    """


@click.command(
    "apply",
    epilog="""\b
SOURCE is one of:
  acme-1.3.0-….whl   a wheel; every contract.binpb in it is read
  contract.binpb     the image of one proto package, as shipped in a wheel
  review.binpb       another image (buf build -o review.binpb); all its packages are read
  packages/acme      a folder with images
  acme-review        an installed distribution, or an installed proto package

\b
Examples:
  orki contract apply --check dist/acme_review-1.3.0-py3-none-any.whl
  orki contract apply gen/acme/review/v1/contract.binpb --package-version 1.3.0

\b
Exit codes:
  0  everything is registered, or would be with --check
  1  something is incompatible with a live contract; nothing was written
  2  SOURCE cannot be read or declares nothing to register
""",
)
@click.argument("source")
@click.option("--check", is_flag=True, help="Check compatibility only; write nothing.")
@click.option("--package-version", default="", metavar="VERSION", help="Version of the packages, if SOURCE has none.")
@json_option
@redis_option
@events_option
def apply_command(
    source: str, check: bool, package_version: str, as_json: bool, redis_url: str, events_url: str
) -> None:
    """Register the contracts of SOURCE before they are used.

    Once a task service is registered, tasks of it can be submitted, and agents with an incompatible contract are
    refused. Streams are registered and their declared groups are created, including those that other packages declare.
    Events published before a consumer runs are kept for it. All contracts are checked first; if one is incompatible,
    nothing is written. Applying a contract again has no effect.
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
        click.echo("everything is compatible with the live and registered contracts; nothing was written (--check)")
    if refusals:
        raise CommandError("; ".join(refusals))


async def _apply(declared: Declared, redis_url: str, events_url: str, check: bool) -> tuple[list[Applied], list[str]]:
    registry = StreamRegistry()
    async with open_admission(redis_url) as (admission, _, _), open_redis(events_url or redis_url) as link:
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
    """List every registered version of each task service and stream.

    \b
    STATE      live: agents serve it or its tasks have not ended; a stream was published or consumed
               applied: registered with `orki contract apply` and not used yet
               idle: registered and no longer used; it blocks no other contract
    *          new tasks are submitted under this version
    SERVED BY  agents and unfinished tasks, or a stream's groups with their numbers of consumers
    """
    rows = run(_rows(redis_url, events_url))
    if as_json:
        print_json([each.to_json() for each in rows])
    else:
        print_table(
            _LISTED,
            [each.cells() for each in rows],
            empty="no contracts yet: nothing has registered one",
        )


async def _rows(redis_url: str, events_url: str) -> list[ContractRow]:
    async with open_admission(redis_url) as (admission, contracts, _), open_redis(events_url or redis_url) as link:
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
    """Remove the registration of the task service or stream NAME.

    If a service has several contracts, DIGEST or its beginning selects one. A contract that agents serve or that has
    unfinished tasks is not removed. For a stream, only the registration is removed: entries and groups stay, and the
    next publisher registers the stream again. Stop its old publishers and consumers first.
    """
    click.echo(run(_withdraw(name, digest, redis_url, events_url)))


async def _withdraw(name: str, digest: str, redis_url: str, events_url: str) -> str:
    async with open_admission(redis_url) as (admission, contracts, _), open_redis(events_url or redis_url) as link:
        found = [each for each in (await contracts.registered([name]))[name] if each.digest.startswith(digest)]
        if len(found) > 1:
            digests = ", ".join(each.digest[:19] for each in found)
            raise click.UsageError(f"{name} has {len(found)} contracts: add the digest of one of them ({digests})")
        if found:
            if not await admission.withdraw(found[0]):
                raise OrkiError(f"{name} is in use under {found[0].digest[:19]}: stop its agents and let its tasks end")
            return f"service {name}: {found[0].digest[:19]} is withdrawn"
        if not digest and await StreamRegistry().withdraw(link, name):
            return f"stream {name}: its registration is withdrawn; entries and groups stay"
    which = " with that digest" if digest else ""
    raise OrkiError(f"no service or stream {name!r} is registered{which}; see: orki contract list")
