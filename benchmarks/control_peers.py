"""Is a durable task faster than on other task queues, one at a time and with many waiting submitters?

Every peer runs in an environment of its own and takes turns with orki. AutoGen's gRPC runtime stores nothing, so it is
listed apart from the durable peers.
"""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack
from statistics import median

from benchmarks.control_cycle import fleet
from benchmarks.report import Report
from benchmarks.sides import PEERS, Side, SideFailed, cpu_per_operation, in_turns, peer_environment, redis_server, side

DURABLE = ("streaq", "docket", "taskiq", "arq", "saq", "celery", "dramatiq")
AUTOGEN = "autogen"


async def _start(stack: AsyncExitStack, peer: str) -> Side:
    """Start a peer's server and worker; return its client."""
    program, script = peer_environment(peer), str(PEERS / "tasks.py")
    enter = stack.enter_async_context
    if peer == AUTOGEN:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{probe.getsockname()[1]}"
        await enter(side("autogen host", program, script, peer, "host", where))
    else:
        port, _ = stack.enter_context(redis_server())
        where = f"redis://127.0.0.1:{port}/0"
    await enter(side(f"{peer} worker", program, script, peer, "worker", where, ready=peer == AUTOGEN))
    return await enter(side(f"{peer} client", program, script, peer, "client", where))


async def measure(report: Report) -> None:
    """Measure all rows."""
    rounds, one, loads = (1, 40, {64: 256, 512: 512}) if report.quick else (5, 200, {64: 2_560, 512: 4_096})
    best: dict[str, tuple[float, str]] = {}
    failed: list[str] = []
    with redis_server() as (port, redis_pid):
        async with fleet(port) as (server, agent, client):
            for peer in (*DURABLE, AUTOGEN):
                async with AsyncExitStack() as stack:
                    try:
                        other = await _start(stack, peer)
                        await _compare(report, client, other, peer, rounds, one, loads, best)
                    except SideFailed as error:
                        failed.append(f"{peer}: {error}")
            processes = [(each.name, each.pid) for each in (server, agent, client)] + [("redis", redis_pid)]
            for waiters, count in loads.items():
                command = f"many {waiters} {count}"
                values = await client.ask(command)
                cpu = await cpu_per_operation(count, processes, client, command)
                rate, name = best[command.split()[1]]
                report.add(
                    f"{waiters} waiting submitters, full cycles",
                    "tasks/s",
                    values,
                    baseline=f"the best durable peer ({name})",
                    against=[rate],
                    reach=(">=", 2.0),
                    cpu_us=cpu,
                )
    if failed:
        raise SideFailed("peers that were not measured:\n" + "\n".join(failed))


async def _compare(
    report: Report,
    client: Side,
    other: Side,
    peer: str,
    rounds: int,
    one: int,
    loads: dict[int, int],
    best: dict[str, tuple[float, str]],
) -> None:
    """Add the rows of one peer, and remember the best durable one for each load."""
    command = f"one {one}"
    ours, theirs = await in_turns(rounds, (client, command), (other, command))
    reach = ("<=", 1.0) if peer != AUTOGEN else None
    report.add("submit to result, one at a time", "us", ours, baseline=peer, against=theirs, reach=reach)
    for waiters, count in loads.items():
        command = f"many {waiters} {count}"
        ours, theirs = await in_turns(rounds, (client, command), (other, command))
        reach = (">=", 1.0) if peer == AUTOGEN else None
        row = f"{waiters} waiting submitters, full cycles"
        report.add(row, "tasks/s", ours, baseline=peer, against=theirs, reach=reach)
        if peer != AUTOGEN and median(theirs) > best.get(str(waiters), (0.0, ""))[0]:
            best[str(waiters)] = (median(theirs), peer)
