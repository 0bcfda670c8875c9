"""Child processes that are started together, watched, and ended in order."""

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

_READY_S = 30.0
_STOP_S = 10.0
_RESTART_S = 1.0


class PartEnded(OrkiError):
    """A part that the others need has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process to run.

    Attributes:
        name: For people.
        argv: Its command line; its first line of standard output says that it is ready.
        environment: What it gets beside our own environment.
        essential: Whether everything ends when it does; else it is started again.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    essential: bool = False


class Child:
    """One running part.

    Attributes:
        part: What it runs.
        ready: Its first line of standard output; empty before.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.ready = ""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its process id; 0 when it does not run."""
        return self._process.pid if self._process else 0

    async def start(self) -> str:
        """Starts it, and waits for its first line.

        Raises:
            PartEnded: It ended, or said nothing, within a generous time.
        """
        self._process = await asyncio.create_subprocess_exec(
            *self.part.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self.part.environment},
            # Ctrl-C in a terminal goes to the whole group; the end comes from us, in order.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_READY_S):
                self.ready = (await self._process.stdout.readline()).decode(errors="replace").strip()
        except TimeoutError:
            await self.stop()
            raise PartEnded(f"{self.part.name} was not ready within {_READY_S:g} s") from None
        if not self.ready:
            code = await self._process.wait()
            raise PartEnded(f"{self.part.name} ended with exit code {code} before it was ready; see above")
        self._reader = asyncio.create_task(self._pass_on(self._process.stdout), name=f"orki {self.part.name}")
        return self.ready

    async def wait(self) -> int:
        """Waits for its end; its exit code."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        """Ends it in good order, or by force when that takes too long; harmless when it has ended."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reader is not None:
            await self._reader
        # asyncio leaves the pipe's transport to the garbage collector otherwise.
        process._transport.close()  # type: ignore[attr-defined]
        self._process = None

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        async for line in output:
            print(f"{self.part.name}: {line.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)


class Supervisor:
    """Parts in the order in which they are to be ended."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._stopping = False
        self.failed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def add(self, part: Part) -> Child:
        """Starts a part and waits until it is ready.

        Raises:
            PartEnded: It ended before.
        """
        child = Child(part)
        # Its place among those that are to be ended is taken at once, however long it takes to be ready.
        self._children.append(child)
        await child.start()
        self._watchers.append(asyncio.create_task(self._watch(child), name=f"orki watch {part.name}"))
        return child

    async def stop(self) -> None:
        """Ends all parts, in the order in which they were added."""
        self._stopping = True
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
                    self.failed.set_exception(PartEnded(f"{what}; everything is stopped"))
                return
            print(f"orki: {what}; it is started again", file=sys.stderr, flush=True)
            await asyncio.sleep(_RESTART_S)
            await child.stop()
            try:
                await child.start()
            except PartEnded as error:
                print(f"orki: {error.message}; it is left alone", file=sys.stderr, flush=True)
                return


def run_until_stopped(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Runs `main` on an event loop; SIGTERM and SIGINT set its event, upon which it ends by itself."""
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
            print("stopping; once more to stop at once", file=sys.stderr, flush=True)

    for number in signals:
        loop.add_signal_handler(number, stop, number)
    try:
        await main(stopped)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def print_ready(command: str, words: str, facts: dict[str, Any], as_json: bool, ready_file: Path | None) -> None:
    """Prints the one line of standard output that says that a command is ready, and writes it to a file.

    Raises:
        InvalidSetting: The file cannot be written.
    """
    text = json.dumps(facts)
    if ready_file is not None:
        # Whoever waits for the file must not read half of it.
        partial = ready_file.with_name(ready_file.name + ".partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(ready_file)
        except OSError as error:
            raise InvalidSetting(f"--ready-file {ready_file}: {error.strerror}") from error
    print(text if as_json else f"orki {command} ready: {words}", flush=True)
