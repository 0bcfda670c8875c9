"""Changes of services: tasks, tools and plain gRPC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from orki_contract._findings.comparison import Comparison, Places, Plane, Side, left_at, was
from orki_contract.descriptors import Location
from orki_contract.model import TASK_MESSAGES, Backoff, Budget, ProgressPolicy, TaskMethod, ToolMethod, duration_text
from orki_contract.read import PROGRESS_POLICIES

_PLANES: Final = {"task": Plane.CONTROL, "tool": Plane.HOTPATH, "plain": Plane.SERVICE}
_IDS: Final = {"task": "ORKI_TASK", "tool": "ORKI_TOOL", "plain": "ORKI_RPC"}
_TIMEOUTS: Final = ("attempt_timeout", "stall_timeout", "total_timeout", "cancel_grace")


def compare(comparison: Comparison) -> None:
    """Compare every rpc."""
    old, new = comparison.old, comparison.new
    opcodes = {tool.opcode: tool for tool in old.tools.values()}
    for name in old.methods:
        before, after = _kind(old, name), _kind(new, name)
        if before != after:
            _gone(comparison, name, before, after)
        elif before == "task":
            _task(comparison, old.tasks[name], new.tasks[name])
        elif before == "tool":
            _tool(comparison, old.tools[name], new.tools[name])
        else:
            _plain(comparison, name)
    for name in new.methods:
        kind = _kind(new, name)
        if _kind(old, name) != kind:
            option = kind if kind != "plain" else ""
            here = new.method_place(name, option)
            _report(comparison, f"{_IDS[kind]}_ADDED", name, kind, "is new", (None, here))
    for name, tool in new.tools.items():
        former = opcodes.get(tool.opcode)
        if former is not None and former.full_name != name:
            places = (old.method_place(former.full_name, "tool", "opcode"), new.method_place(name, "tool", "opcode"))
            text = f"reuses opcode 0x{tool.opcode:04x} of {former.full_name}"
            _report(comparison, "ORKI_TOOL_OPCODE_REUSED", name, "tool", text, places)


def _kind(side: Side, name: str) -> str:
    if name in side.tasks:
        return "task"
    if name in side.tools:
        return "tool"
    return "plain" if name in side.methods else ""


def _report(comparison: Comparison, rule: str, name: str, kind: str, text: str, places: Places) -> None:
    side = comparison.new if name in comparison.new.methods else comparison.old
    file, method = side.methods[name]
    package = side.schema.files[file].package
    subject = f"{'rpc' if kind == 'plain' else kind} {name}"
    noun = "service" if kind == "plain" else f"{kind} service"
    affected = {f"{noun} {method.service}"}
    for each in (comparison.old, comparison.new):
        importers = {user for name, user in each.files.items() if file in each.schema.files[name].dependency}
        affected.update(f"package {user}" for user in importers - {package})
    comparison.report(rule, subject, package, text, places, _PLANES[kind], affected)


def _reporter(comparison: Comparison, name: str, kind: str) -> Callable[..., None]:
    """Return a function that reports a change of an rpc, or of a part of its option."""

    def report(rule: str, text: str, *inside: str) -> None:
        _report(comparison, rule, name, kind, text, _places(comparison, name, kind, *inside))

    return report


def _gone(comparison: Comparison, name: str, before: str, after: str) -> None:
    place = comparison.old.method_place(name, before if before != "plain" else "")
    if after:
        now = {"task": "a task", "tool": "a tool", "plain": "a plain rpc"}[after]
        places = (place, comparison.new.method_place(name))
        _report(comparison, f"{_IDS[before]}_REMOVED", name, before, f"is {now} now", places)
        return
    service = comparison.new.schema.services.get(name.partition("/")[0])
    rest = comparison.new.schema.location(service.file.name, service.path) if service is not None else None
    text = f"was removed{left_at(place) if rest else ''}"
    _report(comparison, f"{_IDS[before]}_REMOVED", name, before, text, (place, rest))


def _types(comparison: Comparison, before: Any, after: Any, names: tuple[str, ...], kind: str) -> None:
    name = after.full_name
    for each in names:
        one, other = getattr(before, each), getattr(after, each)
        if one == other:
            continue
        option = each if each in TASK_MESSAGES else ""
        places = _places(comparison, name, kind if option else "", *filter(None, [option]))
        if one:
            text = f"changed its {each}: {was(one, other or 'none')}"
            _report(comparison, f"{_IDS[kind]}_{each.upper()}_CHANGED", name, kind, text, places)
        else:
            _report(comparison, f"{_IDS[kind]}_RELAXED", name, kind, f"gained a {each}: {other}", places)


def _task(comparison: Comparison, before: TaskMethod, after: TaskMethod) -> None:
    report = _reporter(comparison, after.full_name, "task")
    _types(comparison, before, after, ("request", "response", *TASK_MESSAGES), "task")
    _time(before, after, "heartbeat_timeout", "ORKI_TASK_LEASE_SHORTENED", "ORKI_TASK_RELAXED", report)
    for each in _TIMEOUTS:
        _time(before, after, each, "ORKI_TASK_TIMEOUT_SHORTENED", "ORKI_TASK_RELAXED", report)
    attempts = f"{was(before.max_attempts, after.max_attempts)} attempts"
    if after.max_attempts < before.max_attempts:
        report("ORKI_TASK_ATTEMPTS_LOWERED", f"allows fewer attempts: {attempts}", "max_attempts")
    elif before.max_attempts == 1 < after.max_attempts:
        text = f"is retried now: {attempts}; handlers could rely on a single attempt"
        report("ORKI_TASK_REPEATED", text, "max_attempts")
    elif after.max_attempts > before.max_attempts:
        report("ORKI_TASK_RELAXED", f"allows more attempts: {attempts}", "max_attempts")
    for each in ("tokens", "cost_micros", "calls"):
        _amount(before.budget, after.budget, each, report)
    if before.durability != after.durability:
        text = f"changed its durability: {was(before.durability or 'none', after.durability or 'none')}"
        kept = before.durability in ("", "memory") or 0 < _replicas(before) < _replicas(after)
        report("ORKI_TASK_RELAXED" if kept else "ORKI_TASK_DURABILITY_LOWERED", text, "durability")
    policies = _policy(comparison.old, before), _policy(comparison.new, after)
    if policies[0] != policies[1]:
        text = f"changed its progress policy: {was(*policies)}"
        lossy = policies[0] == ProgressPolicy.BLOCK
        report("ORKI_TASK_PROGRESS_LOSSY" if lossy else "ORKI_TASK_RELAXED", text, "progress_policy")
    if after.backoff != before.backoff:
        text = f"changed its retry backoff: {was(before.backoff, after.backoff, _backoff)}"
        report("ORKI_TASK_RELAXED", text, "retry_backoff")


def _tool(comparison: Comparison, before: ToolMethod, after: ToolMethod) -> None:
    report = _reporter(comparison, after.full_name, "tool")
    if before.opcode != after.opcode:
        text = f"changed its opcode: {was(before.opcode, after.opcode, '0x{:04x}'.format)}"
        report("ORKI_TOOL_OPCODE_CHANGED", text, "opcode")
    _types(comparison, before, after, ("request", "response"), "tool")
    _time(before, after, "timeout", "ORKI_TOOL_TIMEOUT_SHORTENED", "ORKI_TOOL_RELAXED", report)
    if before.idempotent and not after.idempotent:
        text = "is no longer idempotent, but older callers repeat calls whose outcome is unknown"
        report("ORKI_TOOL_IDEMPOTENCY_WITHDRAWN", text, "idempotent")
    elif after.idempotent and not before.idempotent:
        text = "became idempotent: new callers repeat calls whose outcome is unknown, which older tools do not expect"
        report("ORKI_TOOL_IDEMPOTENCY_CLAIMED", text, "idempotent")


def _plain(comparison: Comparison, name: str) -> None:
    one, other = comparison.old.methods[name][1].proto, comparison.new.methods[name][1].proto
    places = _places(comparison, name, "")
    inputs, outputs = (one.input_type, other.input_type), (one.output_type, other.output_type)
    for kind, (before, after) in (("REQUEST", inputs), ("RESPONSE", outputs)):
        if before != after:
            text = f"changed its {kind.lower()}: {was(before.removeprefix('.'), after.removeprefix('.'))}"
            _report(comparison, f"ORKI_RPC_{kind}_CHANGED", name, "plain", text, places)
    former, now = ((each.client_streaming, each.server_streaming) for each in (one, other))
    if former != now:
        text = f"changed its streaming: {was(former, now, _streaming)}"
        _report(comparison, "ORKI_RPC_STREAMING_CHANGED", name, "plain", text, places)


def _time(before: Any, after: Any, name: str, shorter: str, longer: str, report: Callable[..., None]) -> None:
    """Compare one duration of a method; 0 means no limit."""
    one, other = getattr(before, name), getattr(after, name)
    text = was(one, other, duration_text)
    if other and (not one or other < one):
        report(shorter, f"has a shorter {name}: {text}", name)
    elif one != other:
        report(longer, f"has a longer {name}: {text}", name)


def _replicas(task: TaskMethod) -> int:
    """Return the number of replicas that a durability names; 0 for other durabilities."""
    name, _, number = task.durability.partition(":")
    return int(number) if name == "replicas" and number.isdecimal() else 0


def _amount(before: Budget, after: Budget, name: str, report: Callable[..., None]) -> None:
    """Compare one amount of a budget; 0 means no limit."""
    one, other = getattr(before, name), getattr(after, name)
    text = was(f"{one:,}" if one else "no limit", f"{other:,}" if other else "no limit")
    if other and (not one or other < one):
        report("ORKI_TASK_BUDGET_LOWERED", f"has a smaller budget of {name}: {text}", "budget")
    elif one != other:
        report("ORKI_TASK_RELAXED", f"has a larger budget of {name}: {text}", "budget")


def _places(comparison: Comparison, name: str, option: str, *inside: str) -> tuple[Location, Location]:
    old, new = comparison.old, comparison.new
    return old.method_place(name, option, *inside), new.method_place(name, option, *inside)


def _policy(side: Side, task: TaskMethod) -> str:
    """Return a progress policy; the number of one that this version does not know."""
    option = side.schema.option(side.methods[task.full_name][1].proto.options, "task")
    number = getattr(option, "progress_policy", 0)
    return str(task.progress_policy) if number in PROGRESS_POLICIES else str(number)


def _backoff(value: Backoff) -> str:
    return f"{duration_text(value.initial)}, times {value.multiplier:g}, up to {duration_text(value.maximum)}"


def _streaming(value: tuple[bool, bool]) -> str:
    client, server = value
    return "both" if client and server else "requests" if client else "responses" if server else "nothing"
