"""Streams, groups, tasks, tools and redaction of two versions: what the old one promises, and the new one does."""

from __future__ import annotations

__all__ = ["judge"]

import functools
import random
from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.message import DecodeError
from oracle_frames import frame_class, random_values
from oracle_messages import message_class, read_alike

from orki_contract.descriptors import is_repeated
from orki_contract.errors import OrkiError
from orki_contract.model import Backoff, Group, Retention, Stream, TaskMethod, ToolMethod, milliseconds
from orki_contract.read import ReadContract
from orki_events import _delivery_table as delivery
from orki_events._delivery import DeliveryMachine
from orki_events._delivery_windows import DeliverySettings
from orki_events.entries import stream_key, stream_keys
from orki_events.groups import StreamState, group_start
from orki_server._observers.redaction import Redaction, safe_json

Break = tuple[bool, str]
_YEARS: Final = 10 * 365 * 24 * 3600 * 1000


def judge(old: ReadContract, new: ReadContract, rng: random.Random) -> Iterator[Break]:
    """Every promise of the old contract that the new one breaks."""
    streams = {each.name: each for each in new.contract.streams}
    for stream in old.contract.streams:
        heir = streams.get(stream.name)
        if heir is None:
            yield True, f"stream {stream.name}: published to by old processes, read by none"
        else:
            yield from ((True, f"stream {stream.name}: {each}") for each in _stream(old, new, stream, heir, rng))
            yield from ((False, f"stream {stream.name}: {each}") for each in _set(stream.retention, heir.retention))
    groups = {(each.package, each.stream, each.group.name): each.group for each in new.contract.external_groups}
    for each in old.contract.external_groups:
        group = groups.get((each.package, each.stream, each.group.name))
        what = f"group {each.group.name} of {each.stream}"
        if group is None:
            yield True, f"{what}: not there"
        else:
            yield from ((True, f"{what}: {told}") for told in _group(_handle(old, each.stream), each.group, group))
    yield from _tasks(old, new)
    yield from _tools(old, new, rng)
    yield from _plain(old, new)
    yield from _shown(old, new, rng)


def _handle(read: ReadContract, stream: str) -> Stream:
    known = [each for each in read.contract.streams if each.name == stream]
    return known[0] if known else Stream(name=stream, message="", retention=Retention(max_entries=1))


def _stream(old: ReadContract, new: ReadContract, was: Stream, now: Stream, rng: random.Random) -> Iterator[str]:
    if was.message != now.message:
        yield from read_alike(old, was.message, new, now.message, rng)
        yield "handlers are given another class"
    sides = ((old, was), (new, now))
    keys = set(stream_keys(was)), set(stream_keys(now))
    written: dict[Any, set[str]] = {}
    for index, (read, stream) in enumerate(sides):
        for number in range(8):
            message = message_class(read, stream.message)()
            _set_key(message, was.partition_key, number)
            key = stream_key(stream, message)
            if key not in keys[1 - index]:
                yield f"an event goes to {key}, which the other side does not read"
            # All events of one key stay in order only while they lie in one place.
            written.setdefault(number, set()).add(key)
    yield from (f"events of one key lie in {sorted(found)}" for found in written.values() if len(found) > 1)
    yield from _kept(was.retention, now.retention)
    for group in was.groups:
        try:
            heir = now.group(group.name)
        except OrkiError as error:
            yield str(error)
            continue
        yield from _group(was, group, heir)


def _set_key(message: Any, name: str, number: int) -> None:
    """Gives the field that picked the partition a value of its own; the others stay empty."""
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is not None and not is_repeated(field) and field.message_type is None:
        text = f"key {number}"
        value = {"string": text, "bytes": text.encode()}.get(_kind(field), number)
        setattr(message, name, value if field.type != field.TYPE_BOOL else bool(number % 2))


def _kept(was: Retention, now: Retention) -> Iterator[str]:
    """An entry that the old promise still holds: the last but one by number, and just not too old."""
    age = milliseconds(was.max_age) - 1 if was.max_age else _YEARS
    for newer, old_by in ((was.max_entries - 1, 0), (0, age), (was.max_entries - 1, age)):
        trimmed = newer >= now.max_entries or bool(now.max_age and old_by >= milliseconds(now.max_age))
        if trimmed:
            yield f"an entry with {newer} newer ones, {old_by} ms old, is trimmed"
    # The same where a deployment has set the lowest values that each contract lets it set.
    few, young = was.entries_bounds[0], milliseconds(was.age_bounds[0])
    fewest, youngest = now.entries_bounds[0], milliseconds(now.age_bounds[0])
    if few - 1 >= fewest or (young and youngest and young - 1 >= youngest):
        yield f"an entry with {few - 1} newer ones, {young - 1} ms old, is trimmed where least is kept"


def _set(was: Retention, now: Retention) -> Iterator[str]:
    """A deployment's setting that the old contract takes and the new one refuses."""
    for kind, old, new in (
        ("entries", was.entries_bounds, now.entries_bounds),
        ("seconds", was.age_bounds, now.age_bounds),
    ):
        for value in (old[0], old[1]) if old[0] != old[1] else ():
            if not new[0] <= value <= new[1]:
                yield f"a setting of {value} {kind} is refused"


def _group(stream: Stream, was: Group, now: Group) -> Iterator[str]:
    state = StreamState(length=5, added=9, last_id="9-0", first_id="5-0")
    if group_start(was, state, None, False) != group_start(now, state, None, False):
        yield f"group {was.name} begins elsewhere"
    if stream.dead_letter(was) != stream.dead_letter(now):
        yield f"dead letters of {was.name} lie where nobody looks for them"
    if _deliveries(now.max_deliveries) < was.max_deliveries:
        yield f"group {was.name} gives up before delivery {was.max_deliveries}"
    # The entry is a consumer's own for as long as the contract says, renewed or not.
    if was.ack_deadline > now.ack_deadline:
        yield f"group {was.name} takes entries away that their consumer still works on"


@functools.cache
def _deliveries(limit: int) -> int:
    """How often the delivery machine hands out an entry whose handler always fails."""
    settings = DeliverySettings(
        prefetch=1,
        max_deliveries=limit,
        ack_deadline=1e6,
        sweep_interval=1e6,
        hold_limit=1e9,
        backoff=Backoff(initial=0.001, maximum=0.001, multiplier=1.0),
    )
    machine = DeliveryMachine(["key"], settings)
    now, handed, given = 0.0, 0, False
    commands = machine.receive(delivery.Opened(), now) + machine.receive(delivery.Requested(1), now)
    for _ in range(20_000):
        if not commands:
            now = max(now, machine.next_timer() or now)
            commands = machine.handle_timer(now)
            continue
        command = commands.pop(0)
        if isinstance(command, delivery.DeadLetter):
            return handed
        if isinstance(command, delivery.CreateGroups):
            commands += machine.receive(delivery.GroupsReady(command), now)
        elif isinstance(command, delivery.Read):
            entries = {} if command.history or given else {"key": [[b"1-0", [b"e", b"", b"d", b""]]]}
            given = given or not command.history
            if not entries and not command.history:
                # A read without entries lasts until something else is due.
                now = max(now, machine.next_timer() or now)
                commands += machine.handle_timer(now)
            commands += machine.receive(delivery.EntriesRead(command, entries, {}), now)
        elif isinstance(command, delivery.Claim):
            commands += machine.receive(delivery.EntriesClaimed(command, b"0-0", [], {}, []), now)
        elif isinstance(command, delivery.Renew):
            commands += machine.receive(delivery.Renewed(command, []), now)
        elif isinstance(command, delivery.Dispatch):
            handed += len(command.entries)
            commands += machine.receive(delivery.Failed("key", command.entries, 0, "no"), now)
            commands += machine.receive(delivery.Requested(1), now)
    raise AssertionError("the delivery machine does not come to an end")


def _tasks(old: ReadContract, new: ReadContract) -> Iterator[Break]:
    heirs = {each.full_name: each for each in new.contract.tasks}
    for was in old.contract.tasks:
        now = heirs.get(was.full_name)
        if now is None:
            yield True, f"task {was.full_name}: nobody serves it"
            continue
        for name in ("request", "response", "progress", "directive"):
            if getattr(was, name) and getattr(was, name) != getattr(now, name):
                yield True, f"task {was.full_name}: old {name} does not fit"
        for told in _attempt(was, now):
            yield True, f"task {was.full_name}: {told}"


def _attempt(was: TaskMethod, now: TaskMethod) -> Iterator[str]:
    """An attempt that uses all that the old contract gives it, under the rules of the new one."""
    silent = milliseconds(was.heartbeat_timeout) - 1
    if silent >= milliseconds(now.heartbeat_timeout):
        yield f"an agent that is silent for {silent} ms is given up"
    long = milliseconds(was.attempt_timeout) - 1
    if long >= milliseconds(now.attempt_timeout):
        yield f"an attempt of {long} ms is ended"
    for name in ("stall_timeout", "total_timeout"):
        allowed, limit = (milliseconds(getattr(each, name)) for each in (was, now))
        allowed = allowed - 1 if allowed else _YEARS
        if limit and allowed >= limit:
            yield f"{allowed} ms are too long for {name}"
    if was.cancel_grace > now.cancel_grace:
        yield "a cancelled handler is not waited for"
    if was.max_attempts > now.max_attempts:
        yield f"attempt {was.max_attempts} never comes"
    for name in ("tokens", "cost_micros", "calls"):
        limits = [getattr(each.budget, name) for each in (was, now)]
        if limits[1] and not 0 < limits[0] <= limits[1]:
            yield f"a task that used {limits[1]} {name} is paused"
    strength = {"": 0, "memory": 0, "fsync": 10, **{f"replicas:{number}": number for number in range(1, 10)}}
    levels = [strength.get(each.durability, 0) for each in (was, now)]
    kinds = [each.durability.partition(":")[0] for each in (was, now)]
    if levels[0] > levels[1] or (levels[0] and kinds[0] != kinds[1]):
        yield f"a task that {was.durability} kept is lost"
    if was.max_attempts == 1 and now.max_attempts > 1:
        yield "a handler that relies on one attempt runs again"


def _tools(old: ReadContract, new: ReadContract, rng: random.Random) -> Iterator[Break]:
    tables = [{each.opcode: each for each in read.contract.tools} for read in (old, new)]
    heirs = {each.full_name: each for each in new.contract.tools}
    for was in old.contract.tools:
        found = tables[1].get(was.opcode)
        if found is None or found.full_name != was.full_name:
            yield True, f"tool {was.full_name}: an old call reaches {found.full_name if found else 'nothing'}"
        now = heirs.get(was.full_name)
        if now is not None:
            yield from ((True, f"tool {was.full_name}: {told}") for told in _tool(old, new, was, now, rng))
    for now in new.contract.tools:
        found = tables[0].get(now.opcode)
        if found is not None and found.full_name != now.full_name:
            yield True, f"tool {now.full_name}: a new call reaches the old {found.full_name}"


def _tool(old: ReadContract, new: ReadContract, was: ToolMethod, now: ToolMethod, rng: random.Random) -> Iterator[str]:
    for name in ("request", "response"):
        one, other = getattr(was, name), getattr(now, name)
        layouts = [
            next((each for each in read.contract.frames if each.message == message), None)
            for read, message in ((old, one), (new, other))
        ]
        if one != other:
            yield f"its {name} is another class"
        elif (layouts[0] is None) != (layouts[1] is None):
            yield f"its {name} is a frame on one side only"
        elif layouts[0] is not None and layouts[1] is not None and layouts[0] == layouts[1]:
            values = random_values(layouts[0], rng)
            body = frame_class(layouts[0])(**values).encode()
            if frame_class(layouts[1]).decode(body, layouts[0].block_length) != frame_class(layouts[0])(**values):
                yield f"its {name} is read otherwise"
    if was.timeout > now.timeout:
        yield f"a call of {milliseconds(was.timeout) - 1} ms is given up"
    # A call whose fate is not known: the caller repeats it if its contract lets it, whatever the other side's says.
    for caller, tool in ((was, now), (now, was)):
        if caller.idempotent and not tool.idempotent:
            yield "a call is run_repeatedly that must not be"


def _plain(old: ReadContract, new: ReadContract) -> Iterator[Break]:
    kinds = [{each.full_name for each in read.contract.tasks + read.contract.tools} for read in (old, new)]
    heirs = {method.full_name: method for service in new.schema.services.values() for method in service.methods}
    for service in old.schema.services.values():
        for was in service.methods:
            now = heirs.get(was.full_name)
            if was.full_name in kinds[0]:
                continue
            if now is None or was.full_name in kinds[1]:
                yield True, f"rpc {was.full_name}: unimplemented"
                continue
            for name in ("input_type", "output_type", "client_streaming", "server_streaming"):
                if getattr(was.proto, name) != getattr(now.proto, name):
                    yield True, f"rpc {was.full_name}: {name} differs"
            if new.schema.services[service.full_name].file.name != service.file.name:
                yield False, f"service {service.full_name} is in another module"


def _shown(old: ReadContract, new: ReadContract, rng: random.Random) -> Iterator[Break]:
    """Secrets that an old process wrote, as a new process shows them."""
    hide = Redaction(new.contract.sensitive)
    framed = {each.message for each in (*old.contract.frames, *new.contract.frames)}
    hidden = {(each.message, each.field) for each in new.contract.sensitive}
    for each in old.contract.sensitive:
        node = new.schema.messages.get(each.message)
        if node is None:
            continue
        if each.message in framed:
            if any(field.name == each.field for field in node.proto.field) and (each.message, each.field) not in hidden:
                yield True, f"{each.message}.{each.field} is shown"
            continue
        field = message_class(old, each.message).DESCRIPTOR.fields_by_name[each.field]
        secret = {"string": "s3cret-word", "bytes": b"s3cret-word"}.get(_kind(field))
        if secret is None or field.number not in {other.number for other in node.proto.field}:
            continue
        # The field alone, as it lies on the wire, so that nothing else in the message matters.
        raw = _tag(field.number) + bytes((len(secret),)) + (secret.encode() if isinstance(secret, str) else secret)
        message = message_class(new, each.message)()
        try:
            message.MergeFromString(raw)
        except DecodeError:  # what cannot be read is not shown either
            continue
        text = safe_json(hide.redacted(message))
        if "s3cret" in text or "czNjcmV0" in text:
            yield True, f"{each.message}.{each.field} is shown: {text}"


def _kind(field: Any) -> str:
    return {field.TYPE_STRING: "string", field.TYPE_BYTES: "bytes"}.get(field.type, "")


def _tag(number: int) -> bytes:
    key = number << 3 | 2
    return bytes((key,)) if key < 128 else bytes((key & 0x7F | 0x80, key >> 7))
