"""Everything that the demo starts: embedded server, orchestrator, agents, observers; each a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from types import TracebackType
from typing import Self

from orki_control import Client
from orki_server.embedded import EmbeddedOptions, EmbeddedServer
from review_fleet.processes import Child, wait_for_file

__all__ = ["Fleet"]

_READY_SECONDS = 30


class Fleet:
    """Runs a fleet on this machine, as a context manager.

    Args:
        root: The tree that the agents' tools read.
        folder: Where logs, the audit log and the server's files go.
        agents: Number of agent processes.
        pace: Seconds that each review waits, where a real fleet would wait for a language model.

    Attributes:
        orchestrator: `HOST:PORT`, once it is entered.
        redis_url: Of the embedded server, likewise.
        agents: The agent processes by agent id.
        audit_log: File that the audit observer writes.
    """

    def __init__(self, root: Path, folder: Path, *, agents: int, pace: float) -> None:
        self._folder = folder
        self._environment = {"REVIEW_ROOT": str(root), "REVIEW_PACE_SECONDS": str(pace)}
        self._names = [f"reviewer-{number}" for number in range(1, agents + 1)]
        self._server = EmbeddedServer(EmbeddedOptions(directory=folder / "valkey"))
        self._stack = contextlib.ExitStack()
        self.orchestrator = ""
        self.redis_url = ""
        self.agents: dict[str, Child] = {}
        self.audit_log = folder / "audit.jsonl"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._server)
            self.redis_url = self._server.url
            ready = self._folder / "orchestrator.json"
            arguments = ["serve", "--listen", "127.0.0.1:0", "--redis", self.redis_url, "--ready-file", str(ready)]
            orchestrator = self._child(stack, "orchestrator", "orki_server", arguments)
            observers = {"audit": [str(self.audit_log)], "metrics": ["--port", "0"], "feed": ["--port", "0"]}
            for name, more in observers.items():
                self._child(stack, name, "orki_server", ["observe", name, *more, "--redis", self.redis_url])
            self.orchestrator = str(wait_for_file(ready, orchestrator)["address"])
            for name in self._names:
                self.agents[name] = self._child(stack, name, "orki_agent", self._agent_arguments(name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    async def wait_for_agents(self, orki: Client) -> None:
        """Returns once every agent has its session.

        Raises:
            ChildFailed: An agent ended, or is not there within 30 seconds.
        """
        async with asyncio.timeout(_READY_SECONDS):
            while {each.agent_id for each in await orki.list_agents() if each.connected} < set(self.agents):
                for child in self.agents.values():
                    child.check()
                await asyncio.sleep(0.05)

    def feed_url(self) -> str:
        """Where the live page is."""
        found = re.search(r"http://\S+", (self._folder / "feed.log").read_text(errors="replace"))
        return found.group() if found else "not up"

    def stop_agents(self) -> None:
        """Lets every living agent finish and go."""
        for child in self.agents.values():
            child.stop()

    def _agent_arguments(self, name: str) -> list[str]:
        return ["run", "review_fleet.agent:agent", "--orchestrator", self.orchestrator, "--agent-id", name]

    def _child(self, stack: contextlib.ExitStack, name: str, module: str, arguments: list[str]) -> Child:
        child = Child(name, module, arguments, self._folder / f"{name}.log", self._environment)
        stack.callback(child.stop)
        return child
