"""`orki submit`: any registered task, by its name and JSON."""

from __future__ import annotations

import asyncio
import difflib
import json
import sys
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import ServiceSnapshot, Submission, TaskSnapshot
from orki_contract.errors import InvalidArgument, InvalidResponse, OrkiError, UnknownMethod, WaitTimeout
from orki_contract.images import message_class
from orki_contract.model import TaskMethod
from orki_contract.read import read_image
from orki_contract.trace import new_span
from orki_control import Client, error_of
from orki_server._cli.formats import print_json, stderr_console
from orki_server._cli.options import json_option, open_client, run, with_orchestrator
from orki_server._cli.tasks import state_name, task_json
from orki_server._observers.redaction import Redaction, safe_json, safe_text


def request_from_json(text: str, kind: type[Message]) -> Message:
    """The message that the JSON says (proto3 JSON mapping; field names as in the proto or in lowerCamelCase).

    Raises:
        InvalidArgument: It is no JSON object, or does not fit the message; the message names place or field.
    """
    name = kind.DESCRIPTOR.full_name
    try:
        value = json.loads(text, object_pairs_hook=_no_repetition)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"the request is no JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"give an object such as {_example(kind)}"
        ) from error
    except RecursionError as error:
        raise InvalidArgument("the request is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the request must be a JSON object such as {_example(kind)}")
    message = kind()
    try:
        json_format.ParseDict(value, message, descriptor_pool=_pool(message))
    except (json_format.ParseError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        known = ", ".join(field.name for field in kind.DESCRIPTOR.fields) or "none"
        raise InvalidArgument(f"the request does not fit {name}: {words} (fields: {known})") from error
    return message


def message_json(message: Message) -> dict[str, Any]:
    """The message as JSON, every field of it, names as in the proto."""
    shown: dict[str, Any] = json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        descriptor_pool=_pool(message),
    )
    return shown


def _pool(message: Message) -> Any:
    # Where the types inside an Any are looked for; the stubs know two names of the one class.
    return message.DESCRIPTOR.file.pool


def _example(kind: type[Message]) -> str:
    fields = kind.DESCRIPTOR.fields
    return json.dumps({fields[0].name: "…"}, ensure_ascii=False) if fields else "{}"


def _no_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f'the request names "{twice}" twice')
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Method:
    """A registered method with its message classes."""

    contract: TaskMethod
    image: bytes

    def kind(self, full_name: str) -> type[Message]:
        return message_class(self.image, full_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What the command line asked for."""

    wait: bool
    idempotency_key: str
    timeout: float | None
    as_json: bool


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Methods that an orchestrator knows; none when it does not answer at once."""
    orchestrator = str(ctx.params.get("orchestrator") or "127.0.0.1:50051")

    async def names() -> list[str]:
        async with open_client(orchestrator, bool(ctx.params.get("insecure")), patience=0) as client:
            services = await asyncio.wait_for(client.list_services(), 1.0)
        return sorted(each.contract.full_name.replace("/", ".") for each in registered_methods(services))

    try:
        return [name for name in run(names()) if incomplete.replace("/", ".").lower() in name.lower()]
    except (OrkiError, TimeoutError):
        return []


@click.command(
    epilog="""\b
Examples:
  orki submit ReviewService.ReviewFile '{"path": "a.py"}'
  orki submit acme.review.v1.ReviewService/ReviewFile - < request.json
  TASK=$(orki submit ReviewService.ReviewFile '{"path": "a.py"}' --no-wait)
""",
)
@click.argument("method", metavar="SERVICE.METHOD", shell_complete=_complete)
@click.argument("request_text", metavar="JSON", default="{}")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the result, or print the task's id.")
@click.option("--idempotency-key", default="", metavar="KEY", help="The same key and request give the same task again.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Wait no longer; the task goes on.  [default: no limit]",
)
@json_option
@with_orchestrator
def submit(method: str, request_text: str, orchestrator: str, insecure: bool, **wish: Any) -> None:
    """Submit a task, wait for it, and print its response as JSON.

    SERVICE.METHOD may leave out the package where only one service has that name. JSON is the request (`-` reads it
    from standard input; left out, it is empty). Progress goes to standard error. The exit code is 1 when the task
    fails.
    """
    text = sys.stdin.read() if request_text == "-" else request_text
    run(_submit(open_client(orchestrator, insecure), method, text, _Wish(**wish)))


async def _submit(client: Client, name: str, text: str, wish: _Wish) -> None:
    async with client:
        method = find_method(name, registered_methods(await client.list_services()))
        request = request_from_json(text, method.kind(method.contract.request))
        submission = Submission(
            method=method.contract.full_name,
            request=request.SerializeToString(),
            # A call whose answer is lost is made again: with a key it finds the same task.
            idempotency_key=wish.idempotency_key or f"once-{uuid.uuid4().hex}",
            traceparent=new_span().traceparent,
        )
        (task,) = await client.submit_raw([submission])
        if not wish.wait:
            if wish.as_json:
                print_json(task_json(task))
            else:
                click.echo(task.task_id)
            return
        task = await _wait(client, method, task, wish.timeout)
    _print_result(method, task, wish.as_json)


async def _wait(client: Client, method: _Method, task: TaskSnapshot, timeout: float | None) -> TaskSnapshot:
    say = stderr_console()
    redaction = Redaction(read_image(method.image).contract.sensitive)
    progress = method.kind(method.contract.progress) if method.contract.progress else None
    said = ""
    say.print(f"task {task.task_id}")
    try:
        async with asyncio.timeout(timeout), aclosing(client.watch(task.task_id)) as responses:
            async for response in responses:
                if response.WhichOneof("news") == "task":
                    task = response.task
                    said, before = _state_text(task), said
                    if said != before:
                        say.print(safe_text(said))
                elif progress is not None:
                    try:
                        shown = safe_json(redaction.redacted(progress.FromString(response.progress.payload)))
                    except DecodeError:
                        shown = f"progress that is no {method.contract.progress}"
                    say.print(f"attempt {response.progress.attempt}: {shown}")
    except TimeoutError:
        raise WaitTimeout(
            f"task {task.task_id} has not ended within {timeout:g} s; it goes on: see orki trace {task.task_id}"
        ) from None
    except asyncio.CancelledError:
        say.print(f"task {task.task_id} goes on; end it with: orki cancel {task.task_id}")
        raise
    return task


def _print_result(method: _Method, task: TaskSnapshot, as_json: bool) -> None:
    response: dict[str, Any] | None = None
    if task.state == TaskState.TASK_STATE_SUCCEEDED:
        try:
            response = message_json(method.kind(method.contract.response).FromString(task.response))
        except DecodeError as error:
            raise InvalidResponse(f"the response of task {task.task_id} is no {method.contract.response}") from error
    if as_json:
        print_json(task_json(task, response))
    elif response is not None:
        click.echo(json.dumps(response, indent=2, ensure_ascii=False))
    if task.state != TaskState.TASK_STATE_SUCCEEDED:
        raise error_of(task)


def _state_text(task: TaskSnapshot) -> str:
    if not task.HasField("attempt"):
        return state_name(task.state)
    return f"{state_name(task.state)}, attempt {task.attempt.attempt} on {task.agent_id}"


def registered_methods(services: Sequence[ServiceSnapshot]) -> list[_Method]:
    """The methods of registered services, read from the contracts that came with them."""
    return [
        _Method(contract=contract, image=service.image)
        for service in services
        for contract in read_image(service.image).contract.tasks
        if contract.service == service.service
    ]


def find_method(name: str, methods: Sequence[_Method]) -> _Method:
    """The method that a name stands for: a whole one, or the end of exactly one.

    Raises:
        UnknownMethod: There is none, or several; the message says which are near.
    """
    wanted = name.replace("/", ".")
    dotted = {each.contract.full_name.replace("/", "."): each for each in methods}
    if wanted in dotted:
        return dotted[wanted]
    ends = sorted(full for full in dotted if full.endswith(f".{wanted}"))
    if len(ends) == 1:
        return dotted[ends[0]]
    if ends:
        raise UnknownMethod(f'"{name}" may mean {" or ".join(ends)}; give more of the name')
    if not dotted:
        raise UnknownMethod(f'no method "{name}": no agent has brought a task service to this orchestrator yet')
    shorts = {full.split(".", full.count(".") - 1)[-1]: full for full in dotted}
    near = difflib.get_close_matches(wanted, [*shorts, *dotted], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"registered: {', '.join(sorted(dotted))}"
    raise UnknownMethod(f'no method "{name}" is registered; {hint}')
