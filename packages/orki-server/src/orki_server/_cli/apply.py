"""`orki streams apply`: groups, scripts and users of the registered streams."""

from __future__ import annotations

import re

import click

from orki.events.v1.agent_orki import AGENTS
from orki.events.v1.audit_orki import AUDIT
from orki.events.v1.task_orki import TASKS
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.usage_orki import USAGE
from orki_contract.errors import OrkiError
from orki_events import connect
from orki_events.connection import Connection
from orki_events.groups import checked
from orki_events.registry import StreamRegistry
from orki_events.scripts import load_scripts
from orki_server._acl import Role, roles
from orki_server._cli.formats import counted, print_json
from orki_server._cli.options import json_option, open_redis, redis_option, run_async
from orki_server._health.findings import parse_info


@click.command(
    epilog="""\b
Examples:
  orki streams apply
  orki streams apply --print > users.acl
  orki streams apply --users acme && redis-cli ACL SETUSER acme-publisher on '>PASSWORD'

A new user is off and has no password: set both once with ACL SETUSER. A later run changes neither. Store the users in
the server's ACL file (ACL SAVE). Run it again when streams or groups were added, and after the server lost its scripts.
""",
)
@click.option(
    "--users", "prefix", default="orki", show_default=True, metavar="PREFIX", help="Begin of the users' names."
)
@click.option(
    "--print", "only_print", is_flag=True, help="Print the commands that define the users, and change nothing."
)
@json_option
@redis_option
@run_async
async def apply(prefix: str, only_print: bool, as_json: bool, redis_url: str) -> None:
    """Create the groups of all registered streams, load the scripts, and define users.

    Each user has the least privilege for its role. orki's own streams are registered first.

    \b
    PREFIX-publisher              publishes to every stream
    PREFIX-consumer-STREAM-GROUP  consumes a stream in a group
    PREFIX-observer               runs the observers
    PREFIX-orchestrator           runs orchestrators, and trims streams
    PREFIX-operator               runs all commands of orki, this one included
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", prefix):
        raise click.UsageError("--users: use 1 to 64 letters, digits, `-`, `_` or `.`")
    async with open_redis(redis_url) as link:
        info = parse_info((await link.execute((b"INFO", b"server"))).decode())
        version = tuple(int(each) for each in re.findall(r"\d+", info.get("redis_version", ""))[:3])
        if not only_print:
            async with connect(redis_url) as events:
                for own in (AGENTS, AUDIT, TASKS, TOOLS, USAGE):
                    await events.prepare(own)
        streams = [each.contract for each in await StreamRegistry().streams(link)]
        found = roles(streams, prefix=prefix, version=version)
        if only_print:
            for role in found:
                click.echo(str(role))
            return
        async with connect(redis_url) as events:
            for stream in streams:
                await events.create_groups(stream)
        loaded = await load_scripts(link)
        await _define(link, found)
    if as_json:
        print_json({"users": [role.user for role in found], "streams": len(streams), "scripts_loaded": loaded})
        return
    for role in found:
        click.echo(role.user)
    click.echo(f"{counted(len(streams), 'stream')}, {counted(len(found), 'user')}", err=True)


async def _define(link: Connection, found: list[Role]) -> None:
    for role in found:
        try:
            checked(await link.execute((b"ACL", b"SETUSER", role.user, *role.rules)))
        except OrkiError as error:
            raise type(error)(f"the user {role.user} cannot be defined: {error.message}") from error
