"""Schedules: tasks that are submitted at the times of a cron expression."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, Unpack

from google.protobuf.message import Message

from orki.control.v1 import schedule_pb2 as pb
from orki_contract import SubmitSettings, Task
from orki_contract.errors import InvalidArgument
from orki_control._links import Link
from orki_control._submissions import submission_of

A = TypeVar("A")


class ClientSchedules:
    """The schedules of a fleet: `Client.schedules`. Each tick gives one task, with any number of orchestrators."""

    def __init__(self, call: Callable[[Callable[[Link], Awaitable[Any]]], Awaitable[Any]], timeout: float) -> None:
        self._call = call
        self._timeout = timeout

    async def add(
        self,
        name: str,
        cron: str,
        task: Task[Any, Any, Any, Any],
        request: Message,
        *,
        time_zone: str = "",
        catch_up: bool = False,
        replace: bool = False,
        **settings: Unpack[SubmitSettings],
    ) -> pb.Schedule:
        """Add a schedule.

        Args:
            name: Its name: 1 to 128 letters, digits and `_./:@-`.
            cron: Cron expression with five fields, or six with seconds in front.
            task: The method.
            request: The request of each task.
            time_zone: Time zone of the expression, such as `Europe/Berlin`; empty for UTC.
            catch_up: Whether one task is submitted for missed ticks. Without, ticks that are more than a minute late
                are left out.
            replace: Whether it replaces one of the same name.
            **settings: As for `Client.submit`, without `start_at`.

        Raises:
            InvalidArgument: A value is invalid, or the name is taken.
            UnknownMethod: No agent has registered the method yet.
        """
        if "start_at" in settings:
            raise InvalidArgument(f"schedule {name}: start_at: a schedule sets the time of each task")
        submission = submission_of(task, request, "", settings)
        submission.ClearField("traceparent")
        missed = pb.MISSED_TICKS_CATCH_UP if catch_up else pb.MISSED_TICKS_SKIP
        made = pb.Schedule(name=name, cron=cron, time_zone=time_zone, submission=submission, missed=missed)
        return await self.add_raw(made, replace=replace)

    async def add_raw(self, schedule: pb.Schedule, *, replace: bool = False) -> pb.Schedule:
        """Add a schedule, for callers that know a method only by its name. Raises as `add`."""
        request = pb.AddScheduleRequest(schedule=schedule, replace=replace)
        answer = await self._call(lambda link: link.schedules.AddSchedule(request, timeout=self._timeout))
        added: pb.Schedule = answer.schedule
        return added

    async def list(self) -> Sequence[pb.Schedule]:
        """Return the schedules by name, with their last and next ticks."""
        request = pb.ListSchedulesRequest()
        answer = await self._call(lambda link: link.schedules.ListSchedules(request, timeout=self._timeout))
        schedules: Sequence[pb.Schedule] = answer.schedules
        return schedules

    async def pause(self, name: str, *, paused: bool = True) -> pb.Schedule:
        """Pause a schedule, or end its pause. Ticks during a pause are not made up for.

        Raises:
            InvalidArgument: There is no such schedule.
        """
        request = pb.PauseScheduleRequest(name=name, paused=paused)
        answer = await self._call(lambda link: link.schedules.PauseSchedule(request, timeout=self._timeout))
        changed: pb.Schedule = answer.schedule
        return changed

    async def remove(self, name: str) -> bool:
        """Remove a schedule. Submitted tasks go on. Returns whether there was one."""
        request = pb.RemoveScheduleRequest(name=name)
        answer = await self._call(lambda link: link.schedules.RemoveSchedule(request, timeout=self._timeout))
        return bool(answer.removed)
