"""Print the files that one no-op task crosses, from submit to result, in the order of their first use.

A submitter, an orchestrator and an agent run as three processes, each under `sys.setprofile`. After some warm-up tasks
one task is recorded: each function call in a hand-written module of orki, with its time. The merged record is the
path of the task. A step is a change of file within one process; a return is a step to a file that the process has
visited before. The interleaving of processes depends on the scheduler and does not count. Background work (the outbox,
heartbeats) that falls into the window is part of the path, so the shortest of several recordings is printed.

    python -m benchmarks.task_path [--json FILE] [--steps]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.sides import redis_server

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = str(ROOT / "packages") + os.sep
RECORDINGS = 7
WARM_UP = 20

_record: list[tuple[int, str]] = []
_recording = False
_names: dict[str, str | None] = {}

Calls = list[tuple[str, str]]
"""Process and file of each call, in the order of the calls."""


def _name(path: str) -> str | None:
    """Return the module's path below its package's src folder, or None for a file that is not counted."""
    if path not in _names:
        inside = path.startswith(PACKAGES) and f"{os.sep}src{os.sep}" in path
        _names[path] = path.partition(f"{os.sep}src{os.sep}")[2] if inside else None
    return _names[path]


def _profile(frame: FrameType, event: str, _argument: object) -> None:
    if _recording and event == "call" and (name := _name(frame.f_code.co_filename)):
        _record.append((time.monotonic_ns(), name))


def _install(log: Path) -> None:
    """Start recording on SIGUSR1; stop and write the record on SIGUSR2."""

    def start(*_: Any) -> None:
        global _recording
        _record.clear()
        _recording = True
        log.with_suffix(".on").touch()

    def stop(*_: Any) -> None:
        global _recording
        _recording = False
        partial = log.with_suffix(".part")
        partial.write_text(json.dumps(_record))
        partial.rename(log)

    signal.signal(signal.SIGUSR1, start)
    signal.signal(signal.SIGUSR2, stop)
    threading.setprofile(_profile)
    sys.setprofile(_profile)


def _child(log: str, module: str, *arguments: str) -> None:
    """Run a module as the main program, under the profiler."""
    _install(Path(log))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _await(path: Path, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f"a child ended with {process.returncode} before it wrote {path.name}")
        if time.monotonic() > until:
            raise SystemExit(f"{path.name} was not written within 30 s")
        time.sleep(0.01)


async def _recordings(target: str, folder: Path, children: dict[str, subprocess.Popen[bytes]]) -> list[Calls]:
    """Return the calls of several tasks."""
    from sourcereview.v1.review_orki import SourceReviewServiceClient
    from sourcereview.v1.review_pb2 import ReviewFileRequest

    from orki_contract.errors import UnknownMethod
    from orki_control import Client

    global _recording
    recordings = []
    async with Client(target) as orki:
        reviews = SourceReviewServiceClient(orki)
        until = time.monotonic() + 30
        done = 0
        while done < WARM_UP:
            try:
                await reviews.review_file(ReviewFileRequest(path=b"a.py"))
                done += 1
            except UnknownMethod:  # The agent has not registered its service yet.
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.1)
        for _ in range(RECORDINGS):
            await asyncio.sleep(0.3)
            for name, process in children.items():
                (folder / f"{name}.json").unlink(missing_ok=True)
                (folder / f"{name}.on").unlink(missing_ok=True)
                process.send_signal(signal.SIGUSR1)
                await asyncio.to_thread(_await, folder / f"{name}.on", process)
            _record.clear()
            _recording = True
            begun = time.monotonic_ns()
            await reviews.review_file(ReviewFileRequest(path=b"a.py"))
            ended = time.monotonic_ns()
            _recording = False
            calls = [(at, "submitter", file) for at, file in _record]
            for name, process in children.items():
                process.send_signal(signal.SIGUSR2)
                await asyncio.to_thread(_await, folder / f"{name}.json", process)
                written: list[list[Any]] = json.loads((folder / f"{name}.json").read_text())
                calls += [(at, name, file) for at, file in written]
            recordings.append([(name, file) for at, name, file in sorted(calls) if begun <= at <= ended])
    return recordings


def steps_of(calls: Calls) -> Calls:
    """Return the steps: the calls whose file differs from that of the process's previous call."""
    current: dict[str, str] = {}
    steps = []
    for process, file in calls:
        if current.get(process) != file:
            current[process] = file
            steps.append((process, file))
    return steps


def returns_of(calls: Calls) -> int:
    """Count the steps to a file that the process has visited before."""
    steps = steps_of(calls)
    return len(steps) - len(set(steps))


def first_uses(calls: Calls) -> list[str]:
    """Return each file once, in the order of its first call."""
    return list(dict.fromkeys(file for _, file in calls))


_AGENT = """
from orki_agent import Agent
from sourcereview.v1.review_orki import SourceReviewServiceBase
from sourcereview.v1.review_pb2 import ReviewFileResponse


class NoOp(SourceReviewServiceBase):
    async def review_file(self, request, ctx):
        return ReviewFileResponse()


agent = Agent("no-op", NoOp(), slots=4)
"""


def measure() -> Calls:
    """Start the three processes and return the calls of the shortest path."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orki-path-")))
        port, _ = stack.enter_context(redis_server())
        (folder / "no_op_agent.py").write_text(_AGENT)
        children: dict[str, subprocess.Popen[bytes]] = {}

        def start(name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.task_path", "child", str(folder / f"{name}.json"), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment},
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            children[name] = process
            return process

        redis = f"redis://127.0.0.1:{port}/0"
        server = start("server", "orki_server", "serve", "--listen", "127.0.0.1:0", "--json", ORKI_REDIS_URL=redis)
        assert server.stdout is not None
        ready = server.stdout.readline()
        if not ready:
            raise SystemExit((folder / "server.log").read_text())
        target = json.loads(ready)["address"]
        start("agent", "orki_agent", "run", "no_op_agent:agent", "--orchestrator", target)
        threading.setprofile(_profile)
        sys.setprofile(_profile)
        try:
            recordings = asyncio.run(_recordings(target, folder, children))
        finally:
            sys.setprofile(None)
    return min(recordings, key=lambda calls: (len(first_uses(calls)), returns_of(calls)))


def main() -> None:
    """Measure and print; `child …` is for the processes that this program starts."""
    if sys.argv[1:2] == ["child"]:
        _child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the path to this file")
    parser.add_argument("--steps", action="store_true", help="print each step, not only the files")
    options = parser.parse_args()
    calls = measure()
    files, steps = first_uses(calls), steps_of(calls)
    for number, file in enumerate(files, 1):
        count = sum(each == file for _, each in calls)
        print(f"{number:3} {file} ({count} calls, {sum(each == file for _, each in steps)} entries)")
    if options.steps:
        print("\n".join(f"{process:9} {file}" for process, file in steps))
    print(f"{len(files)} files, {len(steps)} steps, {returns_of(calls)} returns, {len(calls)} calls")
    if options.json:
        options.json.write_text(json.dumps({"files": files, "returns": returns_of(calls)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
