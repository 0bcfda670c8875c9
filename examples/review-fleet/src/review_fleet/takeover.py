"""The demo's misfortune: one agent is killed while it holds work, and another takes the work over.

To be sure that the agent dies with work in its hands it is paused (SIGSTOP) first, then the orchestrator is asked what
it holds, and only then is it killed (SIGKILL). An agent that held nothing is resumed, and tried again later.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping

from orki.control.v1.attempt_pb2 import TaskState
from orki.control.v1.task_pb2 import TaskSnapshot
from orki_control import Client
from review_fleet.processes import Child
from review_fleet.report import Killed

__all__ = ["kill_one_agent"]

_SETTLE_SECONDS = 0.1
"""Time after which all messages of an agent sent before its pause have arrived."""
_LOOK_SECONDS = 0.01


async def kill_one_agent(orki: Client, agents: Mapping[str, Child], still_working: Callable[[], bool]) -> Killed | None:
    """Kills one agent that holds a running attempt.

    Args:
        orki: The orchestrator.
        agents: The processes by agent id.
        still_working: Whether there is work left during which an agent may be caught.

    Returns:
        Who was killed and what it held; None when the work was done before an agent could be caught with some.
    """
    while still_working():
        for snapshot in await orki.list_agents():
            child = agents.get(snapshot.agent_id)
            if child is None or not snapshot.attempts:
                continue
            child.send(signal.SIGSTOP)
            await asyncio.sleep(_SETTLE_SECONDS)
            if held := await _held(orki, snapshot.agent_id):
                child.send(signal.SIGKILL)
                attempt = held.attempt
                return Killed(agent=snapshot.agent_id, task=held.task_id, fence=attempt.fence)
            child.send(signal.SIGCONT)
        await asyncio.sleep(_LOOK_SECONDS)
    return None


async def _held(orki: Client, agent_id: str) -> TaskSnapshot | None:
    async for task in orki.list_tasks(states=[TaskState.TASK_STATE_RUNNING], agent_id=agent_id):
        return task
    return None
