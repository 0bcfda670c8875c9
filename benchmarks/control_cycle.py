"""What does a task cost from submit to result, beside bare gRPC streams and beside a loop written by hand?"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from benchmarks.report import Report
from benchmarks.sides import Side, cpu_per_operation, in_turns, python, redis_server, side

_SIDES = "benchmarks.control_sides"


@asynccontextmanager
async def fleet(redis_port: int) -> AsyncIterator[tuple[Side, Side, Side]]:
    """Run one orchestrator, one no-op agent and one client; give them in this order."""
    url = f"redis://127.0.0.1:{redis_port}/0"
    async with AsyncExitStack() as stack:
        serve = python("orki_server", "serve", "--listen", "127.0.0.1:0", "--json")
        enter = stack.enter_async_context
        server = await enter(side("orchestrator", *serve, ready=False, ORKI_REDIS_URL=url))
        target = str((await server.answer())["address"])
        agent = await enter(side("agent", *python(_SIDES, "agent", target)))
        client = await enter(side("client", *python(_SIDES, "client", target)))
        yield server, agent, client


async def measure(report: Report) -> None:
    """Measure all rows."""
    rounds, one, flood = (2, 100, 1_000) if report.quick else (7, 300, 4_000)
    with redis_server() as (port, redis_pid), redis_server() as (hand_port, _):
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            server, agent, client = await enter(fleet(port))
            processes = [(each.name, each.pid) for each in (server, agent, client)] + [("redis", redis_pid)]
            echo = await enter(side("echo", *python(_SIDES, "echo", "-"), ready=False))
            ping = await enter(side("ping", *python(_SIDES, "ping", (await echo.answer())["address"])))
            hand_url = f"redis://127.0.0.1:{hand_port}/0"
            relay = await enter(side("floor server", *python(_SIDES, "floor-server", hand_url), ready=False))
            relay_target = (await relay.answer())["address"]
            await enter(side("floor agent", *python(_SIDES, "floor-agent", relay_target)))
            floor = await enter(side("floor client", *python(_SIDES, "floor-client", relay_target)))
            ours, theirs, least = await in_turns(
                rounds, (client, f"one {one}"), (ping, f"one {one * 5}"), (floor, f"one {one}")
            )
            cpu = await cpu_per_operation(one, processes, client, f"one {one}")
            report.add(
                "submit to result, one at a time",
                "us",
                ours,
                baseline="bare grpc.aio stream, one message there and back",
                against=theirs,
                reach=("<=", 4.0),
                cpu_us=cpu,
            )
            report.add(
                "submit to result, one at a time, beside the least of its parts",
                "us",
                ours,
                baseline="two bare streams in line, and two script calls that do nothing",
                against=least,
            )
            hand_server = await enter(side("hand server", *python(_SIDES, "hand-server", hand_url), ready=False))
            hand_target = (await hand_server.answer())["address"]
            await enter(side("hand agent", *python(_SIDES, "hand-agent", hand_target)))
            hand = await enter(side("hand client", *python(_SIDES, "hand-client", hand_target)))
            ours, theirs = await in_turns(rounds, (client, f"flood {flood}"), (hand, f"flood {flood}"))
            cpu = await cpu_per_operation(flood, processes, client, f"flood {flood}")
            report.add(
                "durable cycles, submitted in batches, all results awaited",
                "tasks/s",
                ours,
                baseline="hand-written batched scripts and one batched stream",
                against=theirs,
                reach=(">=", 0.5),
                cpu_us=cpu,
            )
