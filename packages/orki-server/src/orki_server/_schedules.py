"""ScheduleService, and the submissions of its schedules.

Every orchestrator looks at all schedules. The submission of a tick has an idempotency key of schedule and tick, so that
each tick gives one task. The tick is stored after the submission: an orchestrator that dies in between leaves it to
another one, which finds the same task.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from google.protobuf.message import DecodeError

from orki.control.v1 import schedule_pb2 as pb
from orki.control.v1.attempt_pb2 import Failure
from orki.control.v1.schedule_pb2_grpc import ScheduleServiceServicer
from orki.control.v1.task_pb2 import Submission, TaskSnapshot
from orki_contract.errors import DamagedRecord, InvalidArgument, OrkiError
from orki_server._calls import Context, actor_of, typed
from orki_server._identity import Action, act_as, caller
from orki_server._keys import FleetKeys
from orki_server._store.connection import StoreConnection
from orki_server._store.placement import check_key

_LOOK: Final = 1.0
"""Maximum time between two looks at the schedules."""
_LATE: Final = 60.0
"""Seconds after which a tick counts as missed."""
_MAX_SCHEDULES: Final = 10_000
_log = logging.getLogger("orki.server.schedules")

# KEYS: schedules, ticks. ARGV: name, then the tick as 20 digits and what it gave. -> 1 if it is the schedule's newest
_TICK: Final = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local before = redis.call('HGET', KEYS[2], ARGV[1])
if before and string.sub(before, 1, 20) >= string.sub(ARGV[2], 1, 20) then return 0 end
return redis.call('HSET', KEYS[2], ARGV[1], ARGV[2]) + 1
"""

# KEYS: schedules. ARGV: name, schedule, "add" (only a new one), "replace" (any), or "change" (only an existing one)
# -> 1 if it was written
_WRITE: Final = """
local exists = redis.call('HEXISTS', KEYS[1], ARGV[1])
if ARGV[3] == 'add' and exists == 1 or ARGV[3] == 'change' and exists == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""


def next_tick(schedule: pb.Schedule, after_us: int) -> int:
    """Return the first tick after a time, in microseconds since the Unix epoch.

    Raises:
        InvalidArgument: The expression or the time zone is invalid, or the expression has no further tick.
    """
    return _tick(schedule, after_us, reverse=False)


def last_tick(schedule: pb.Schedule, until_us: int) -> int:
    """Return the last tick until a time. Raises as `next_tick`."""
    return _tick(schedule, until_us + 1, reverse=True)


def _tick(schedule: pb.Schedule, time_us: int, *, reverse: bool) -> int:
    try:
        zone = ZoneInfo(schedule.time_zone) if schedule.time_zone else UTC
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidArgument(f"schedule.time_zone: {schedule.time_zone[:80]!r} is not known here") from error
    try:
        start = datetime.fromtimestamp(time_us / 1_000_000, zone)
        tick = next(CronSim(schedule.cron, start, reverse=reverse))
    except (CronSimError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"schedule.cron: {schedule.cron[:80]!r} is no cron expression: {error}") from error
    except StopIteration:
        raise InvalidArgument(f"schedule.cron: {schedule.cron[:80]!r} has no tick") from None
    return round(tick.timestamp()) * 1_000_000


class Schedules:
    """Schedules in Redis."""

    def __init__(self, connection: StoreConnection) -> None:
        self._connection = connection

    async def read(self) -> dict[str, pb.Schedule | DamagedRecord]:
        """Return the schedules with their last ticks, by name.

        Raises:
            StoreUnavailable: The store is down.
        """
        stored, ticks = await self._connection.calls([("HGETALL", FleetKeys.SCHEDULES), ("HGETALL", FleetKeys.TICKS)])
        last = dict(zip(ticks[::2], ticks[1::2], strict=True))
        return {
            name.decode(errors="replace"): _decoded(name, value, last.get(name, b""))
            for name, value in sorted(zip(stored[::2], stored[1::2], strict=True))
        }

    async def find(self, name: str) -> pb.Schedule | None:
        """Return a schedule; None if there is none.

        Raises:
            DamagedRecord: It cannot be read.
            StoreUnavailable: The store is down.
        """
        found = (await self.read()).get(name)
        if isinstance(found, DamagedRecord):
            raise found
        return found

    async def write(self, schedule: pb.Schedule, how: str) -> bool:
        """Write a schedule; `how` is `add`, `replace` or `change`. Returns whether it was written."""
        kept = pb.Schedule()
        kept.CopyFrom(schedule)
        for field in ("last_tick_us", "next_tick_us", "last_task_id", "last_failure"):
            kept.ClearField(field)
        row = (schedule.name, kept.SerializeToString(), how)
        return bool(await self._connection.call("EVAL", _WRITE, 1, FleetKeys.SCHEDULES, *row))

    async def ticked(self, name: str, tick_us: int, gave: pb.Schedule) -> None:
        """Store what a tick gave, unless a later one is stored."""
        value = f"{tick_us:020d}".encode() + gave.SerializeToString()
        await self._connection.call("EVAL", _TICK, 2, FleetKeys.SCHEDULES, FleetKeys.TICKS, name, value)

    async def remove(self, name: str) -> bool:
        """Remove a schedule. Returns whether there was one."""
        removed, _ = await self._connection.calls(
            [("HDEL", FleetKeys.SCHEDULES, name), ("HDEL", FleetKeys.TICKS, name)]
        )
        return bool(removed)


def _decoded(name: bytes, value: bytes, tick: bytes) -> pb.Schedule | DamagedRecord:
    try:
        schedule = pb.Schedule.FromString(value)
        if tick:
            schedule.MergeFrom(pb.Schedule.FromString(tick[20:]))
            schedule.last_tick_us = int(tick[:20])
    except (DecodeError, ValueError) as error:
        return DamagedRecord(f"the schedule {name.decode(errors='replace')[:80]!r} cannot be read: {error}")
    return schedule


class Scheduler:
    """Submits the tasks of due ticks with `submit`, which gets the submission and the actor."""

    def __init__(
        self, schedules: Schedules, up: asyncio.Event, submit: Callable[[Submission, str], Awaitable[TaskSnapshot]]
    ) -> None:
        self._schedules = schedules
        self._up = up
        self._submit = submit
        self._next: dict[str, tuple[bytes, int]] = {}
        self._reported: set[str] = set()

    async def run(self) -> None:
        act_as("scheduler")
        while True:
            await self._up.wait()
            wait = _LOOK
            try:
                wait = await self.look(time.time_ns() // 1000)
            except OrkiError as error:
                _log.warning("schedules are delayed: %s", error.message)
            await asyncio.sleep(wait)

    async def look(self, now_us: int) -> float:
        """Submit what is due. Returns the time until the next look.

        Raises:
            StoreUnavailable: The store is down.
        """
        found = await self._schedules.read()
        soon = now_us + _LOOK * 1_000_000
        for name, schedule in found.items():
            try:
                if isinstance(schedule, DamagedRecord):
                    raise schedule
                if not schedule.paused:
                    due = self._due(schedule)
                    if due <= now_us:
                        await self._submit_tick(schedule, last_tick(schedule, now_us), now_us)
                    soon = min(soon, max(due, now_us + 50_000))
                self._reported.discard(name)
            except OrkiError as error:
                if name not in self._reported:
                    _log.error("schedule %s submits nothing: %s", name, error.message)
                    self._reported.add(name)
        self._next = {name: each for name, each in self._next.items() if name in found}
        return max(0.0, (soon - time.time_ns() // 1000) / 1_000_000)

    def _due(self, schedule: pb.Schedule) -> int:
        """Return the first tick that is not done. It is kept until the schedule changes."""
        key = schedule.SerializeToString(deterministic=True)
        known = self._next.get(schedule.name)
        if known is None or known[0] != key:
            known = (key, next_tick(schedule, max(schedule.since_us, schedule.last_tick_us)))
            self._next[schedule.name] = known
        return known[1]

    async def _submit_tick(self, schedule: pb.Schedule, tick_us: int, now_us: int) -> None:
        gave = pb.Schedule()
        if schedule.missed != pb.MISSED_TICKS_CATCH_UP and now_us - tick_us > _LATE * 1_000_000:
            late = (now_us - tick_us) // 1_000_000
            gave.last_failure.CopyFrom(Failure(message=f"the tick was missed: no task was submitted for {late} s"))
            _log.warning("schedule %s: the tick %d was missed", schedule.name, tick_us)
        else:
            submission = Submission()
            submission.CopyFrom(schedule.submission)
            submission.idempotency_key = f"schedule:{schedule.name}:{tick_us}"
            try:
                gave.last_task_id = (await self._submit(submission, f"schedule:{schedule.name}")).task_id
            except OrkiError as error:
                if error.retryable:
                    raise
                gave.last_failure.CopyFrom(Failure(reason=error.reason, message=error.message))
                _log.error("schedule %s: the task of a tick was refused: %s", schedule.name, error.message)
        await self._schedules.ticked(schedule.name, tick_us, gave)


class ScheduleServicer(ScheduleServiceServicer):
    """Adds, lists, pauses and removes schedules. `check` validates a submission as if it were made now."""

    def __init__(self, schedules: Schedules, check: Callable[[Submission], Awaitable[object]]) -> None:
        self._schedules = schedules
        self._check = check

    @typed
    async def AddSchedule(self, request: pb.AddScheduleRequest, context: Context) -> pb.AddScheduleResponse:
        """Add a schedule after all checks of its submission."""
        asked = request.schedule
        check_key("schedule.name", asked.name)
        for field in ("idempotency_key", "traceparent", "start_at_us"):
            if getattr(asked.submission, field):
                raise InvalidArgument(f"schedule.submission.{field}: a schedule sets it for each task")
        if asked.missed not in pb.MissedTicks.values():
            raise InvalidArgument(f"schedule.missed: {asked.missed} is no policy")
        now_us = time.time_ns() // 1000
        made = pb.Schedule(
            name=asked.name,
            cron=asked.cron,
            time_zone=asked.time_zone,
            submission=asked.submission,
            missed=asked.missed or pb.MISSED_TICKS_SKIP,
            paused=asked.paused,
            actor=actor_of(context),
            since_us=now_us,
        )
        next_us = next_tick(made, now_us)
        await self._check(made.submission)
        found = await self._schedules.read()
        known = found.get(made.name)
        if isinstance(known, pb.Schedule):
            caller().check_submit(known.submission.method)
        if len(found) >= _MAX_SCHEDULES and known is None:
            raise InvalidArgument(f"schedule: there are {_MAX_SCHEDULES} schedules, which is the maximum")
        if not await self._schedules.write(made, "replace" if request.replace else "add"):
            raise InvalidArgument(f"schedule.name: there is a schedule {made.name}; remove or replace it")
        made.next_tick_us = 0 if made.paused else next_us
        return pb.AddScheduleResponse(schedule=made)

    @typed
    async def ListSchedules(self, request: pb.ListSchedulesRequest, context: Context) -> pb.ListSchedulesResponse:
        """List the schedules of the services that the caller may see; a damaged one with a failure."""
        shown = []
        now_us = time.time_ns() // 1000
        for name, schedule in (await self._schedules.read()).items():
            if isinstance(schedule, DamagedRecord):
                if caller().rules is None:
                    failure = Failure(reason=schedule.reason, message=schedule.message)
                    shown.append(pb.Schedule(name=name, last_failure=failure))
                continue
            if not caller().may(Action.READ, schedule.submission.method):
                continue
            if not schedule.paused:
                try:
                    schedule.next_tick_us = next_tick(schedule, now_us)
                except InvalidArgument as error:
                    schedule.last_failure.CopyFrom(Failure(reason=error.reason, message=error.message))
            shown.append(schedule)
        return pb.ListSchedulesResponse(schedules=shown)

    @typed
    async def PauseSchedule(self, request: pb.PauseScheduleRequest, context: Context) -> pb.PauseScheduleResponse:
        """Pause a schedule or end its pause."""
        schedule = await self._find(request.name)
        if schedule.paused != request.paused:
            schedule.paused = request.paused
            if not request.paused:
                schedule.since_us = time.time_ns() // 1000
            if not await self._schedules.write(schedule, "change"):
                raise _unknown(request.name)
        schedule.next_tick_us = 0 if schedule.paused else next_tick(schedule, time.time_ns() // 1000)
        return pb.PauseScheduleResponse(schedule=schedule)

    @typed
    async def RemoveSchedule(self, request: pb.RemoveScheduleRequest, context: Context) -> pb.RemoveScheduleResponse:
        """Remove a schedule, also a damaged one."""
        try:
            await self._find(request.name)
        except InvalidArgument:
            return pb.RemoveScheduleResponse(removed=False)
        except DamagedRecord:
            if caller().rules is not None:
                raise
        return pb.RemoveScheduleResponse(removed=await self._schedules.remove(request.name))

    async def _find(self, name: str) -> pb.Schedule:
        found = await self._schedules.find(name)
        if found is None or not caller().may(Action.SUBMIT, found.submission.method):
            raise _unknown(name)
        return found


def _unknown(name: str) -> InvalidArgument:
    return InvalidArgument(f"name: there is no schedule {name[:128]!r}")
