"""Processes: child processes that are started, watched and stopped together; readiness lines; signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orki_contract.errors import InvalidSetting, OrkiError

_READY_TIMEOUT = 30.0
_STOP_TIMEOUT = 10.0
_RESTART_DELAY = 1.0


class PartEnded(OrkiError):
    """An essential process has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process to run.

    Attributes:
        name: Its name in messages.
        argv: Its command line. Its first line of standard output reports that it is ready.
        environment: Variables added to this process's environment.
        essential: Whether its end stops all parts; otherwise it is restarted.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    essential: bool = False


class Child:
    """One running part.

    Attributes:
        ready: Its first line of standard output; empty until then.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.ready = ""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its process id; 0 while it does not run."""
        return self._process.pid if self._process else 0

    async def start(self) -> str:
        """Start it, and return its first line of output.

        Raises:
            PartEnded: It ended first, or printed nothing in time.
        """
        self._process = await asyncio.create_subprocess_exec(
            *self.part.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self.part.environment},
            # Ctrl-C in a terminal reaches the whole process group; the supervisor stops the parts in order instead.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_READY_TIMEOUT):
                self.ready = (await self._process.stdout.readline()).decode(errors="replace").strip()
        except TimeoutError:
            await self.stop()
            raise PartEnded(f"{self.part.name} was not ready within {_READY_TIMEOUT:g} s") from None
        if not self.ready:
            code = await self._process.wait()
            raise PartEnded(f"{self.part.name} ended with exit code {code} before it was ready; see above")
        self._reader = asyncio.create_task(self._pass_on(self._process.stdout), name=f"orki {self.part.name}")
        return self.ready

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """Terminate it, and kill it if that takes too long. Does nothing if it has ended."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            await self._reader
        # Otherwise asyncio leaves the pipe's transport to the garbage collector.
        process._transport.close()  # type: ignore[attr-defined]
        self._process = None

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        async for line in output:
            print(f"{self.part.name}: {line.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)


class Supervisor:
    """Parts in the order in which they are stopped."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._watchers: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def add(self, part: Part) -> Child:
        """Start a part and wait until it is ready.

        Raises:
            PartEnded: It ended first.
        """
        child = Child(part)
        # Added before it is ready, so that `stop` ends it in any case.
        self._children.append(child)
        await child.start()
        self._watchers.append(asyncio.create_task(self._watch(child), name=f"orki watch {part.name}"))
        return child

    async def stop(self) -> None:
        """Stop all parts, in the order in which they were added."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for child in self._children:
            await child.stop()
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()

    async def _watch(self, child: Child) -> None:
        while True:
            code = await child.wait()
            what = f"{child.part.name} ended with exit code {code}"
            if child.part.essential:
                if not self.failed.done():
                    self.failed.set_exception(PartEnded(f"{what}; all parts are stopped"))
                return
            print(f"orki: {what}; it is restarted", file=sys.stderr, flush=True)
            await asyncio.sleep(_RESTART_DELAY)
            await child.stop()
            try:
                await child.start()
            except PartEnded as error:
                print(f"orki: {error.message}; it is not restarted", file=sys.stderr, flush=True)
                return


def run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` on an event loop. The first SIGTERM or SIGINT sets its event, which stops it; the second kills it."""
    asyncio.run(_run(main))


async def _run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def stop(received: signal.Signals) -> None:
        stopped.set()
        for number in signals:
            loop.remove_signal_handler(number)
        if received is signal.SIGINT:
            print("stopping; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)

    for number in signals:
        loop.add_signal_handler(number, stop, number)
    try:
        await main(stopped)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def print_ready_line(observer: str, where: str) -> None:
    """Print the readiness line `orki NAME ready: WHERE`, the observer's only line on standard output."""
    print(f"orki {observer} ready: {where}", flush=True)


def print_ready(command: str, summary: str, facts: dict[str, Any], as_json: bool, ready_file: Path | None) -> None:
    """Print the line of standard output that reports that a command is ready, and write it to a file.

    Raises:
        InvalidSetting: The file cannot be written.
    """
    text = json.dumps(facts)
    if ready_file is not None:
        # A reader that waits for the file must not see half of it.
        partial = ready_file.with_name(ready_file.name + ".partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(ready_file)
        except OSError as error:
            raise InvalidSetting(f"--ready-file {ready_file}: {error.strerror}") from error
    print(text if as_json else f"orki {command} ready: {summary}", flush=True)
