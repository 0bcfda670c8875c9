"""`orki submit`: submits a task of any registered method, with a JSON request."""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import sys
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, NamedTuple

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
from orki_server._cli.options import ORCHESTRATOR, json_option, open_client, with_orchestrator
from orki_server._cli.placement import with_placement
from orki_server._cli.tasks import state_name, task_json
from orki_server._observers.redaction import Redaction, safe_json, safe_text
from orki_server._store.placement import MAX_DELAY_MS


def request_from_json(text: str, kind: type[Message]) -> Message:
    """Parse a request from JSON (proto3 JSON mapping; field names as in the proto or in lowerCamelCase).

    Raises:
        InvalidArgument: The text is not a JSON object or does not fit the message type; the error names the position
            or the field.
    """
    name = kind.DESCRIPTOR.full_name
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"the request is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"use an object such as {_example(kind)}"
        ) from error
    except RecursionError as error:
        raise InvalidArgument("the request is nested too deeply") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the request must be a JSON object such as {_example(kind)}")
    message = kind()
    try:
        json_format.ParseDict(value, message, descriptor_pool=_pool(message))
    except (json_format.ParseError, TypeError, ValueError) as error:
        details = " ".join(str(error).split())
        known = ", ".join(field.name for field in kind.DESCRIPTOR.fields) or "none"
        raise InvalidArgument(f"the request is not a valid {name}: {details} (fields: {known})") from error
    return message


def message_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON with every field, named as in the proto."""
    shown: dict[str, Any] = json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        descriptor_pool=_pool(message),
    )
    return shown


def _pool(message: Message) -> Any:
    # Resolves the types inside an Any. Typed as Any because the stubs have two names for this class.
    return message.DESCRIPTOR.file.pool


def _example(kind: type[Message]) -> str:
    fields = kind.DESCRIPTOR.fields
    return json.dumps({fields[0].name: "…"}, ensure_ascii=False) if fields else "{}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f'the request has the key "{twice}" twice')
    return found


class _Method(NamedTuple):
    contract: TaskMethod
    image: bytes

    def kind(self, full_name: str) -> type[Message]:
        return message_class(self.image, full_name)


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the methods that the orchestrator knows; return none if it does not answer within a second."""
    orchestrator = str(ctx.params.get("orchestrator") or ORCHESTRATOR)

    async def names() -> list[str]:
        async with open_client(orchestrator, bool(ctx.params.get("insecure")), patience=0) as client:
            services = await asyncio.wait_for(client.list_services(), 1.0)
        return sorted(each.contract.full_name.replace("/", ".") for each in registered_methods(services))

    try:
        return [name for name in asyncio.run(names()) if incomplete.replace("/", ".").lower() in name.lower()]
    except (OrkiError, TimeoutError):
        return []


@click.command(
    epilog="""\b
Examples:
  orki submit ReviewService.ReviewFile '{"path": "a.py"}'
  orki submit acme.review.v1.ReviewService/ReviewFile - < request.json
  TASK=$(orki submit ReviewService.ReviewFile '{"path": "a.py"}' --no-wait)
  orki submit ReviewService.ReviewFile '{"path": "a.py"}' --no-wait --priority 9 --delay 3600

\b
Exit codes:
  0  the task succeeded, or was submitted with --no-wait
  1  the task was refused, failed or was cancelled, or has not ended within --timeout
  2  wrong usage, or an invalid setting
""",
)
@click.argument("method", metavar="SERVICE.METHOD", shell_complete=_complete)
@click.argument("request_text", metavar="JSON", default="{}")
@click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Wait for the result, or print the task id at once."
)
@click.option(
    "--idempotency-key",
    default="",
    metavar="KEY",
    help="Submitting the same key and request again returns the same task.",
)
@with_placement
@click.option(
    "--delay",
    type=click.FloatRange(0, MAX_DELAY_MS / 1000),
    metavar="SECONDS",
    help="Do not start the task before this time has passed.",
)
@click.option(
    "--start-at",
    metavar="TIME",
    callback=lambda ctx, param, value: _time(value),
    help="Do not start the task before this time, as 2026-12-24T18:00:00Z.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Maximum wait for the result; the task continues afterwards.  [default: no limit]",
)
@json_option
@with_orchestrator
def submit(
    request_text: str,
    delay: float | None,
    start_at: int,
    placement: Submission,
    **options: Any,
) -> None:
    """Submit a task, wait for it, and print its response as JSON.

    SERVICE.METHOD may omit the package if only one service has that name. JSON is the request; `-` reads it from
    standard input, and without JSON the request is empty. Progress is printed to standard error.
    """
    _place(placement, delay, start_at)
    # Read before the event loop starts: asyncio would not let Ctrl-C interrupt it.
    text = sys.stdin.read() if request_text == "-" else request_text
    asyncio.run(_submit(text, placement=placement, **options))


def _time(text: str | None) -> int:
    """Return a time in RFC 3339 as microseconds since the Unix epoch; 0 for None."""
    if text is None:
        return 0
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise click.BadParameter(f"{text!r} is no time with a time zone, such as 2026-12-24T18:00:00Z.")
    return max(1, round(time.timestamp() * 1_000_000))


def _place(submission: Submission, delay: float | None, start_at: int) -> None:
    if delay is not None and math.isnan(delay):
        raise click.BadParameter("nan is no time.", param_hint="--delay")
    if delay is not None and start_at:
        raise click.UsageError("--delay cannot be combined with --start-at.")
    if delay is not None:
        submission.delay_ms = math.ceil(delay * 1000)
    elif start_at:
        submission.start_at_us = start_at


async def _submit(
    text: str,
    method: str,
    wait: bool,
    idempotency_key: str,
    timeout: float | None,
    as_json: bool,
    placement: Submission,
    **connection: Any,
) -> None:
    async with open_client(**connection) as client:
        found = find_method(method, registered_methods(await client.list_services()))
        request = request_from_json(text, found.kind(found.contract.request))
        submission = Submission(
            method=found.contract.full_name,
            request=request.SerializeToString(),
            # The client repeats a call whose reply was lost. With a key, the repeated call finds the same task.
            idempotency_key=idempotency_key or f"once-{uuid.uuid4().hex}",
            traceparent=new_span().traceparent,
        )
        submission.MergeFrom(placement)
        (task,) = await client.submit_raw([submission])
        if wait:
            task = await _wait(client, found, task, timeout)
    if wait:
        _print_result(found, task, as_json)
    elif as_json:
        print_json(task_json(task))
    else:
        click.echo(task.task_id)


async def _wait(client: Client, method: _Method, task: TaskSnapshot, timeout: float | None) -> TaskSnapshot:
    console = stderr_console()
    redaction = Redaction(read_image(method.image).contract.sensitive)
    progress = method.kind(method.contract.progress) if method.contract.progress else None
    printed = ""
    console.print(f"task {task.task_id}")
    try:
        async with asyncio.timeout(timeout), aclosing(client.watch(task.task_id)) as responses:
            async for response in responses:
                if response.WhichOneof("news") == "task":
                    task = response.task
                    printed, before = _state_text(task), printed
                    if printed != before:
                        console.print(safe_text(printed))
                elif response.WhichOneof("news") == "gap":
                    gap = response.gap
                    text = f"attempt {gap.attempt}: progress {gap.first_index} to {gap.last_index} is missing"
                    console.print(text)
                elif progress is not None:
                    try:
                        shown = safe_json(redaction.redacted(progress.FromString(response.progress.payload)))
                    except DecodeError:
                        shown = f"progress that is not a valid {method.contract.progress}"
                    console.print(f"attempt {response.progress.attempt}: {shown}")
    except TimeoutError:
        raise WaitTimeout(
            f"task {task.task_id} has not ended within {timeout:g} s; it continues; see orki trace {task.task_id}"
        ) from None
    except asyncio.CancelledError:
        console.print(f"task {task.task_id} continues; cancel it with: orki cancel {task.task_id}")
        raise
    return task


def _print_result(method: _Method, task: TaskSnapshot, as_json: bool) -> None:
    response: dict[str, Any] | None = None
    if task.state == TaskState.TASK_STATE_SUCCEEDED:
        try:
            response = message_json(method.kind(method.contract.response).FromString(task.response))
        except DecodeError as error:
            raise InvalidResponse(
                f"the response of task {task.task_id} is not a valid {method.contract.response}"
            ) from error
    if as_json:
        print_json(task_json(task, response))
    elif response is not None:
        print_json(response)
    if task.state != TaskState.TASK_STATE_SUCCEEDED:
        raise error_of(task)


def _state_text(task: TaskSnapshot) -> str:
    attempt = f", attempt {task.attempt.attempt} on {task.agent_id}" if task.HasField("attempt") else ""
    return f"{state_name(task.state)}{attempt}"


def registered_methods(services: Sequence[ServiceSnapshot]) -> list[_Method]:
    """Return the methods of registered services, read from their contracts."""
    return [
        _Method(contract, service.image)
        for service in services
        for contract in read_image(service.image).contract.tasks
        if contract.service == service.service
    ]


def find_method(name: str, methods: Sequence[_Method]) -> _Method:
    """Return the method with a full name, or the only one whose name ends with it.

    Raises UnknownMethod, with similar names, if no method or several match.
    """
    wanted = name.replace("/", ".")
    dotted = {each.contract.full_name.replace("/", "."): each for each in methods}
    if wanted in dotted:
        return dotted[wanted]
    ends = sorted(full for full in dotted if full.endswith(f".{wanted}"))
    if len(ends) == 1:
        return dotted[ends[0]]
    if ends:
        raise UnknownMethod(f'"{name}" is ambiguous: {" or ".join(ends)}; use a longer name')
    if not dotted:
        raise UnknownMethod(f'no method "{name}": no task service is registered with this orchestrator yet')
    shorts = {full.split(".", full.count(".") - 1)[-1]: full for full in dotted}
    near = difflib.get_close_matches(wanted, [*shorts, *dotted], 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"registered: {', '.join(sorted(dotted))}"
    raise UnknownMethod(f'no method "{name}" is registered; {hint}')
