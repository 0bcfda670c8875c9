"""`orki agents`: who is there, and how they are."""

from __future__ import annotations

__all__ = ["agents"]

import time
from typing import Final

import click

from orki.control.v1.task_pb2 import AgentSnapshot
from orki_server.cli.figures import age, duration, size
from orki_server.cli.repeat import repeated
from orki_server.cli.settings import json_option, open_client, run, with_orchestrator
from orki_server.cli.snapshots import agent_json
from orki_server.cli.tables import Column, print_json, print_table

_COLUMNS = (
    Column(name="AGENT"),
    Column(name="STATE", judged=True, whole=True),
    Column(name="BUSY", right=True, whole=True),
    Column(name="SERVES"),
    Column(name="HEARD", right=True, whole=True),
    Column(name="LAG", right=True),
    Column(name="MEMORY", right=True),
)
_STATES: Final = {
    (True, False): "connected",
    (True, True): "draining",
    (False, True): "left",
    (False, False): "lost",
}
"""By whether the agent has a session, and whether it said that it drains."""


@click.command(
    epilog="""\b
Examples:
  orki agents --watch
  orki agents --json | jq -r '.[] | select(.connected | not) | .agent_id'
""",
)
@click.option("--watch", is_flag=True, help="Print again every second until interrupted.")
@json_option
@with_orchestrator
def agents(watch: bool, as_json: bool, orchestrator: str, insecure: bool) -> None:
    """Show the agents that have a session, or had one not long ago.

    STATE is connected, draining (takes no more offers), left (it drained, and stopped), or lost (its session broke).
    BUSY is attempts of slots; HEARD is the time since the last heartbeat; LAG is how late the agent's event loop was.
    """

    async def show() -> None:
        async with open_client(orchestrator, insecure) as client:
            found = await client.list_agents()
        if as_json:
            print_json([agent_json(each) for each in found])
        else:
            print_table(_COLUMNS, map(_row, found), empty="no agents yet; try: orki-agent run MODULE:ATTRIBUTE")

    run(repeated(show, watch))


def _row(agent: AgentSnapshot) -> tuple[str, ...]:
    return (
        agent.agent_id,
        _STATES[agent.connected, agent.draining],
        f"{len(agent.attempts)}/{agent.slots}",
        ", ".join(each.rpartition(".")[2] for each in agent.services),
        age(agent.last_heartbeat_us, time.time_ns() // 1000),
        duration(agent.loop_lag_us),
        size(agent.memory_bytes),
    )
