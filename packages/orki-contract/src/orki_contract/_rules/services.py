"""Task services and tool services."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, Final

from orki_contract._rules.report import Report, Rule
from orki_contract.descriptors import Location, MethodNode, ServiceNode
from orki_contract.model import TASK_MESSAGES, Backoff, duration_text
from orki_contract.read import PROGRESS_POLICIES, resolve, seconds_of

RULES: Final[dict[Rule, str]] = {
    "ORKI_SERVICE_MIXED": "The methods of a service are all plain gRPC, all tasks, or all tools.",
    "ORKI_METHOD_ONE_KIND": "A method is a task or a tool, not both.",
    "ORKI_METHOD_UNARY": "A task or tool has one request and one response; it does not stream.",
    "ORKI_TASK_FRAME": "A task's messages are not frames.",
    "ORKI_TASK_MESSAGE": "A task's progress, directive, checkpoint and answer name existing messages.",
    "ORKI_TASK_MESSAGE_IMPORT": "A task's messages are declared in its own file or in an imported one.",
    "ORKI_TASK_MAX_ATTEMPTS": "A task has 1 to 1000 attempts.",
    "ORKI_TASK_PROGRESS_POLICY": "A task's progress policy is known to this version.",
    "ORKI_TASK_BUDGET": "A task's budget limits something, by at most 2^53.",
    "ORKI_TASK_DURABILITY": "A task's durability is memory, fsync, or replicas:N with N from 1 to 9.",
    "ORKI_TASK_BACKOFF_MULTIPLIER": "The retry multiplier is finite and at least 1.",
    "ORKI_TASK_BACKOFF_ORDER": "The initial retry delay does not exceed the maximum.",
    "ORKI_TOOL_OPCODE": "A tool's opcode is between 0x0100 and 0xffff.",
    "ORKI_TOOL_OPCODE_UNIQUE": "A tool's opcode is unique.",
}

_DURABILITY: Final = re.compile("|memory|fsync|replicas:[1-9]")
_TASK_DURATIONS: Final = ("heartbeat_timeout", "attempt_timeout", "stall_timeout", "total_timeout", "cancel_grace")


def check(report: Report) -> None:
    """Check every service that has a method with an orki option."""
    opcodes = _opcodes(report)
    for service in report.schema.services.values():
        kinds = {}
        for method in service.methods:
            task = report.schema.option(method.proto.options, "task")
            tool = report.schema.option(method.proto.options, "tool")
            kinds[method.full_name] = "task" if task is not None else "tool" if tool is not None else "plain"
            if task is not None and tool is not None:
                place = report.schema.locate(service.file.name, method.path, method.proto.options, "tool")
                text = f"{method.full_name} is a task and a tool: keep one of the two options"
                report.add("ORKI_METHOD_ONE_KIND", place, text)
            if task is not None:
                _task(report, service, method, task)
            if tool is not None:
                _tool(report, service, method, tool, opcodes)
            if task is not None or tool is not None:
                _unary(report, service, method)
        if len(set(kinds.values())) > 1:
            parts = ", ".join(
                f"{name.partition('/')[2]} is {'a ' * (kind != 'plain')}{kind}" for name, kind in kinds.items()
            )
            text = f"{service.full_name} mixes kinds of methods ({parts}): split it into one service per kind"
            report.add("ORKI_SERVICE_MIXED", report.schema.location(service.file.name, service.path), text)


def _opcodes(report: Report) -> dict[int, list[tuple[str, Location]]]:
    """Return the full name and the location of every tool by opcode."""
    found: dict[int, list[tuple[str, Location]]] = {}
    for service in report.schema.services.values():
        for method in service.methods:
            options = method.proto.options
            tool = report.schema.option(options, "tool")
            if tool is not None:
                place = report.schema.locate(service.file.name, method.path, options, "tool", "opcode")
                found.setdefault(tool.opcode, []).append((method.full_name, report.shown(place)))
    return found


def _unary(report: Report, service: ServiceNode, method: MethodNode) -> None:
    if method.proto.client_streaming or method.proto.server_streaming:
        text = f"{method.full_name} streams: remove `stream` (tasks report progress with their progress message)"
        report.add("ORKI_METHOD_UNARY", report.schema.location(service.file.name, method.path), text)


def _task(report: Report, service: ServiceNode, method: MethodNode, option: Any) -> None:
    place = partial(report.schema.locate, service.file.name, method.path, method.proto.options, "task")
    subject = method.full_name
    for name in _TASK_DURATIONS:
        report.duration(place(name), option, name, subject)
    if option.max_attempts > 1000:
        text = f"{subject} has max_attempts = {option.max_attempts}: set it to 1 to 1000"
        report.add("ORKI_TASK_MAX_ATTEMPTS", place("max_attempts"), text)
    if (policy := getattr(option, "progress_policy", 0)) not in PROGRESS_POLICIES:
        text = f"{subject} has a progress policy that this version does not know: {policy}"
        report.add("ORKI_TASK_PROGRESS_POLICY", place("progress_policy"), text)
    if hasattr(option, "budget") and option.HasField("budget"):
        amounts = (option.budget.tokens, option.budget.cost_micros, option.budget.calls)
        if not 0 < max(amounts) <= 1 << 53:
            text = f"{subject} has a budget of {max(amounts)}: set one amount or more, from 1 to 2^53"
            report.add("ORKI_TASK_BUDGET", place("budget"), text)
    if not _DURABILITY.fullmatch(durability := getattr(option, "durability", "")):
        text = f"{subject} has the durability {durability!r}: use memory, fsync, or replicas:N with N from 1 to 9"
        report.add("ORKI_TASK_DURABILITY", place("durability"), text)
    _backoff(report, option, place("retry_backoff"), place, subject)
    for name in TASK_MESSAGES:
        # An image may hold options of an older version.
        _message(report, service, getattr(option, name, ""), place(name), f"the {name} of {subject}")
    named = {"request": method.proto.input_type, "response": method.proto.output_type}
    for name, message in named.items():
        _no_frame(report, message.removeprefix("."), place(), f"the {name} of {subject}")


def _backoff(report: Report, option: Any, whole: Location, place: Any, subject: str) -> None:
    backoff = option.retry_backoff
    for name in ("initial", "maximum"):
        report.duration(place("retry_backoff", name), backoff, name, f"the retry_backoff of {subject}")
    if backoff.multiplier and not (math.isfinite(backoff.multiplier) and backoff.multiplier >= 1):
        text = f"the retry multiplier of {subject} is {backoff.multiplier:g}: set it to at least 1"
        report.add("ORKI_TASK_BACKOFF_MULTIPLIER", place("retry_backoff", "multiplier"), text)
    default = Backoff()
    first = seconds_of(backoff.initial if backoff.HasField("initial") else None, default.initial)
    longest = seconds_of(backoff.maximum if backoff.HasField("maximum") else None, default.maximum)
    if first > longest:
        text = (
            f"the initial retry delay of {subject} ({duration_text(first)}) exceeds the maximum "
            f"({duration_text(longest)}): lower initial or raise maximum"
        )
        report.add("ORKI_TASK_BACKOFF_ORDER", whole, text)


def _message(report: Report, service: ServiceNode, name: str, place: Location, subject: str) -> None:
    if not name:
        return
    full_name = resolve(service.file.package, name)
    node = report.schema.messages.get(full_name)
    if node is None:
        text = f'{subject} names the unknown message "{full_name}": correct the name or add its package'
        report.add("ORKI_TASK_MESSAGE", place, text)
        return
    if node.file.name not in report.schema.imports(service.file.name):
        text = f'{subject} is declared in {node.file.name}, which this file must import: import "{node.file.name}";'
        report.add("ORKI_TASK_MESSAGE_IMPORT", place, text)
    _no_frame(report, full_name, place, subject)


def _no_frame(report: Report, full_name: str, place: Location, subject: str) -> None:
    node = report.schema.messages.get(full_name)
    if node is not None and report.schema.option(node.proto.options, "frame") is not None:
        report.add("ORKI_TASK_FRAME", place, f"{subject} is the frame {full_name}: tasks use plain messages only")


def _tool(
    report: Report,
    service: ServiceNode,
    method: MethodNode,
    option: Any,
    opcodes: dict[int, list[tuple[str, Location]]],
) -> None:
    place = partial(report.schema.locate, service.file.name, method.path, method.proto.options, "tool")
    report.duration(place("timeout"), option, "timeout", method.full_name)
    if not 0x0100 <= option.opcode <= 0xFFFF:
        text = f"{method.full_name} has the opcode 0x{option.opcode:04x}: use 0x0100 to 0xffff"
        report.add("ORKI_TOOL_OPCODE", place("opcode"), text)
        return
    others = [f"{name} at {spot}" for name, spot in opcodes[option.opcode] if name != method.full_name]
    if others:
        text = f"{method.full_name} shares the opcode 0x{option.opcode:04x} with {', '.join(others)}: use another one"
        report.add("ORKI_TOOL_OPCODE_UNIQUE", place("opcode"), text)
