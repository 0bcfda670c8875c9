"""How does a typed tool call compare with multiprocessing.connection, pyzmq and gRPC over a Unix socket?"""

from __future__ import annotations

from benchmarks.hotpath_call import cores, ours, pair
from benchmarks.report import Report
from benchmarks.sides import PEERS, in_turns, peer_environment, python

_SIDES = "benchmarks.hotpath_sides"
_SIZE = 64


async def measure(report: Report) -> None:
    """Measure all rows, all programs on one core."""
    rounds, count = (3, 500) if report.quick else (10, 2_000)
    core = cores()[0]
    zmq, script = peer_environment("pyzmq"), str(PEERS / "sockets.py")
    peers = {
        "multiprocessing.connection, bytes": (python(_SIDES, "pipe_echo"), python(_SIDES, "pipe"), 0.85),
        "pyzmq, REQ and REP over ipc": ((zmq, script, "echo"), (zmq, script, "call"), 0.5),
        "sync gRPC over a Unix socket": (python(_SIDES, "grpc_echo"), python(_SIDES, "grpc_call"), 0.06),
    }
    command = f"one {count}"
    async with pair("call", *ours("call"), _SIZE, (core, core)) as (client, _):
        for name, (server, caller, reach) in peers.items():
            async with pair(name, server, caller, _SIZE, (core, core)) as (other, _):
                taken, base = await in_turns(rounds, (client, command), (other, command))
            row = f"sync call, {_SIZE} B, one core"
            report.add(row, "us", taken, baseline=name, against=base, reach=("<=", reach))
