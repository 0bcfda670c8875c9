"""`orki answer`: answers a suspended task, which goes on."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from orki_contract.errors import UnknownMethod
from orki_server._cli.formats import print_json
from orki_server._cli.options import json_option, open_client, with_orchestrator
from orki_server._cli.submit import find_method, registered_methods, request_from_json
from orki_server._cli.tasks import state_name, task_json


@click.command(
    epilog="""\b
Examples:
  orki answer TASK '{"approved": true}'
  orki tasks --state suspended
""",
)
@click.argument("task_id", metavar="TASK")
@click.argument("text", metavar="ANSWER", default="")
@click.option(
    "--suspension",
    type=click.IntRange(0),
    default=0,
    metavar="NUMBER",
    help="Only if this suspension of the task is the current one.  [default: any]",
)
@json_option
@with_orchestrator
def answer(text: str, **options: Any) -> None:
    """Answer a suspended task, which goes on.

    ANSWER is the method's answer message as JSON, or a text if the method declares none; `-` reads it from standard
    input. Answering with the same answer again has no effect.
    """
    asyncio.run(_answer(sys.stdin.read() if text == "-" else text, **options))


async def _answer(text: str, task_id: str, suspension: int, as_json: bool, **connection: Any) -> None:
    async with open_client(**connection) as client:
        name = (await client.get(task_id)).method
        try:
            method = find_method(name, registered_methods(await client.list_services(name.partition("/")[0])))
        except UnknownMethod:
            method = None
        payload = text.encode()
        if method is not None and method.contract.answer:
            payload = request_from_json(text or "{}", method.kind(method.contract.answer)).SerializeToString()
        task = await client.answer(task_id, payload, suspension=suspension)
    if as_json:
        print_json(task_json(task))
    else:
        click.echo(f"{task.task_id} is {state_name(task.state)}")
