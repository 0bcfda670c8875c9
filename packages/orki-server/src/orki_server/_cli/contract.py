"""`orki contract`: lists the registered contracts, registers new ones and withdraws unused ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Final

import click

from orki_contract.errors import InvalidContract, OrkiError
from orki_events.connection import Connection
from orki_events.registry import StreamRegistry, StreamVersion
from orki_server._admission import Admission, Liveness, ServiceContract
from orki_server._apply import Applied, apply, check_declared, open_admission, read_declared
from orki_server._cli.formats import Columns, counted, print_json, print_rows, print_table
from orki_server._cli.options import F, json_option, open_redis, redis_option, run_async
from orki_server._cli.root import CommandError
from orki_server._observers.stream_stats import StreamStats, read_stream_stats
from orki_server._store.contracts import Contracts, RegisteredContract

_DIGEST_CHARS: Final = 19


async def _registered(admission: Admission, contracts: Contracts, link: Connection) -> list[dict[str, Any]]:
    """Return all registered versions as JSON with stable keys: services, then streams, by name."""
    rows: list[dict[str, Any]] = []
    leading = {each.service: each.digest for each in await contracts.leading()}
    for name, seen in sorted((await contracts.registered(sorted(leading))).items()):
        live = await admission.liveness(name, seen)
        rows += [_service(each, live[each.digest], leading[name]) for each in seen]
    streams = await StreamRegistry().streams(link)
    figures = await read_stream_stats(link, streams)
    rows += [_stream(each, shown) for each, shown in zip(streams, figures, strict=True)]
    return rows


def _service(registered: RegisteredContract, live: Liveness, leading: str) -> dict[str, Any]:
    contract = ServiceContract.of(registered)
    return {
        "kind": "service",
        "name": contract.service,
        "version": contract.version,
        "digest": contract.digest,
        "state": "live" if live.agents or live.tasks else "applied" if live.ahead else "idle",
        "leading": contract.digest == leading,
        "agents": live.agents,
        "unfinished_tasks": live.tasks,
        "groups": [],
    }


def _stream(registered: StreamVersion, figures: StreamStats) -> dict[str, Any]:
    return {
        "kind": "stream",
        "name": registered.contract.name,
        "version": registered.version,
        "digest": registered.digest,
        "state": "applied" if registered.ahead else "live",
        "leading": True,
        "agents": [],
        "unfinished_tasks": 0,
        "groups": [
            {"name": each.group, "consumers": each.consumers, "missing": each.missing} for each in figures.groups
        ],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = f"{row['name']} *" if row["leading"] and row["kind"] == "service" else row["name"]
    users = [*row["agents"]]
    if row["unfinished_tasks"]:
        users.append(counted(row["unfinished_tasks"], "unfinished task"))
    users += [f"{each['name']} ({'missing' if each['missing'] else each['consumers']})" for each in row["groups"]]
    digest = row["digest"][:_DIGEST_CHARS]
    return row["kind"], name, row["version"] or "-", digest or "-", row["state"], ", ".join(users) or "-"


_APPLIED: Final = Columns(("KIND", "NAME", "VERSION", "DIGEST", "OUTCOME"), uncut={"KIND", "OUTCOME"})
_LISTED: Final = Columns(
    ("KIND", "NAME", "VERSION", "DIGEST", "STATE", "SERVED BY"), uncut={"KIND", "DIGEST"}, wraps={"NAME", "SERVED BY"}
)


def _servers(command: F) -> F:
    """Add `--redis` and `--events`."""
    text = "Redis for the event plane; by default, the same as --redis."
    return redis_option(click.option("--events", "events_url", metavar="URL", default="", help=text)(command))


@asynccontextmanager
async def _open(redis_url: str, events_url: str) -> AsyncIterator[tuple[Admission, Contracts, Connection]]:
    async with open_admission(redis_url) as (admission, contracts, _), open_redis(events_url or redis_url) as link:
        yield admission, contracts, link


@click.group(
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


@contract.command(
    "apply",
    short_help="Register a contract before it is used.",
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
@_servers
@run_async
async def apply_command(
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
    registry = StreamRegistry()
    done: list[Applied] = []
    async with _open(redis_url, events_url) as (admission, _, link):
        refusals = await check_declared(declared, admission, registry, link)
        if not refusals and not check:
            done = await apply(declared, admission, registry, link)
    if as_json:
        print_json({"applied": [asdict(each) for each in done], "refused": refusals})
    elif done:
        rows = [(each.kind, each.name, each.version or "-", each.digest[:_DIGEST_CHARS], each.outcome) for each in done]
        print_table(_APPLIED, rows)
    elif not refusals:
        click.echo("everything is compatible with the live and registered contracts; nothing was written (--check)")
    if refusals:
        raise CommandError("; ".join(refusals))


@contract.command(
    "list",
    short_help="List the registered contracts and their users.",
    epilog="""\b
Examples:
  orki contract list
  orki contract list --json | jq '.[] | select(.state == "applied")'
""",
)
@json_option
@_servers
@run_async
async def list_command(as_json: bool, redis_url: str, events_url: str) -> None:
    """List every registered version of each task service and stream.

    \b
    STATE      live: agents serve it or its tasks have not ended; a stream was published or consumed
               applied: registered with `orki contract apply` and not used yet
               idle: registered and no longer used; it blocks no other contract
    *          new tasks are submitted under this version
    SERVED BY  agents and unfinished tasks, or a stream's groups with their numbers of consumers
    """
    async with _open(redis_url, events_url) as servers:
        rows = await _registered(*servers)
    print_rows(as_json, rows, _LISTED, map(_cells, rows), empty="no contracts yet: nothing has registered one")


@contract.command(
    "withdraw",
    short_help="Remove the registration of an unused contract.",
    epilog="""\b
Examples:
  orki contract withdraw acme.review.v1.ReviewService sha256:1f0c
  orki contract withdraw review_findings
""",
)
@click.argument("name")
@click.argument("digest", required=False, default="")
@_servers
@run_async
async def withdraw_command(name: str, digest: str, redis_url: str, events_url: str) -> None:
    """Remove the registration of the task service or stream NAME.

    If a service has several contracts, DIGEST or its beginning selects one. A contract that agents serve or that has
    unfinished tasks is not removed. For a stream, only the registration is removed: entries and groups stay, and the
    next publisher registers the stream again. Stop its old publishers and consumers first.
    """
    async with _open(redis_url, events_url) as (admission, contracts, link):
        found = [each for each in (await contracts.registered([name]))[name] if each.digest.startswith(digest)]
        if len(found) > 1:
            digests = ", ".join(each.digest[:_DIGEST_CHARS] for each in found)
            raise click.UsageError(f"{name} has {len(found)} contracts: add the digest of one of them ({digests})")
        if found:
            if not await admission.withdraw(found[0]):
                raise OrkiError(
                    f"{name} is in use under {found[0].digest[:_DIGEST_CHARS]}: stop its agents and let its tasks end"
                )
            click.echo(f"service {name}: {found[0].digest[:_DIGEST_CHARS]} is withdrawn")
            return
        if not digest and await StreamRegistry().withdraw(link, name):
            click.echo(f"stream {name}: its registration is withdrawn; entries and groups stay")
            return
    which = " with that digest" if digest else ""
    raise OrkiError(f"no service or stream {name!r} is registered{which}; see: orki contract list")
