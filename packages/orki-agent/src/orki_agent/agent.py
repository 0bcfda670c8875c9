"""`Agent`: what an author writes down, and how it is run."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from orki_agent.catalog import TaskServices, find_handlers, served_services
from orki_agent.runtime import Runtime
from orki_agent.settings import RunSettings, default_agent_id
from orki_agent.tool_access import ToolServices
from orki_contract import AsyncToolService, SyncToolService
from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError
from orki_control.session import AGENT_ID, MAX_SLOTS

__all__ = ["Agent"]


class Agent:
    """Task services, and the tools that their handlers use. Making one does no I/O.

    ```python
    agent = Agent("reviewer", Reviewer(), tools=SourceTools(), slots=4)
    ```

    Attributes:
        kind: What the agent is; the first part of its default id.
        slots: Attempts that it takes at once, unless a run says otherwise.
        served: Set once a run's session is over, even while user code keeps `run` from returning.
        refused_by: Why the orchestrator refused or replaced the last run's session for good; None if it did not.
    """

    def __init__(
        self,
        kind: str,
        *services: TaskServices,
        slots: int = 4,
        tools: ToolServices | Iterable[ToolServices] = (),
    ) -> None:
        """Describes an agent.

        Args:
            kind: What it is: letters, digits, `-`, `_` or `.`, 60 at the most.
            services: Instances of classes derived from generated bases, one for each contract.
            slots: Attempts that it takes at once.
            tools: Tool services that its handlers reach through `ctx.tools`.

        Raises:
            InvalidSetting: Any of it cannot be used.
        """
        if not AGENT_ID.match(kind) or len(kind) > 60:
            raise InvalidSetting(f"agent {kind!r}: use 1 to 60 letters, digits, `-`, `_` or `.`, such as reviewer")
        if not 1 <= slots <= MAX_SLOTS:
            raise InvalidSetting(f"agent {kind}: slots is {slots}; use a number from 1 to {MAX_SLOTS}")
        self.kind = kind
        self.slots = slots
        self._handlers = find_handlers(services)
        self._tools = (tools,) if isinstance(tools, AsyncToolService | SyncToolService) else tuple(tools)
        self._runtime: Runtime | None = None
        self.served = threading.Event()
        self.refused_by: OrkiError | None = None

    def __repr__(self) -> str:
        return f"<Agent {self.kind}: {', '.join(sorted(self._handlers))}>"

    @property
    def methods(self) -> tuple[str, ...]:
        """What it serves, as `package.Service/Method`, sorted."""
        return tuple(sorted(self._handlers))

    def settings(self, orchestrator: str, **changes: Any) -> RunSettings:
        """Settings of a run, this agent's defaults in them.

        Args:
            orchestrator: `HOST:PORT`.
            changes: Further settings by their names in `RunSettings`.

        Raises:
            InvalidSetting: A setting is unknown, or its value cannot be used.
        """
        defaults = RunSettings(orchestrator=orchestrator, agent_id=default_agent_id(self.kind), slots=self.slots)
        try:
            return replace(defaults, **changes)
        except TypeError as error:
            raise InvalidSetting(f"agent {self.kind}: {error}") from None

    async def run(self, orchestrator: str | RunSettings, **changes: Any) -> None:
        """Serves until the agent has drained. Sync handlers run in threads, async ones in the loop that awaits this.

        Args:
            orchestrator: `HOST:PORT`, or settings made before.
            changes: Settings by their names in `RunSettings`: `agent_id`, `slots`, `events_url`, `drain_grace`, …

        Raises:
            InvalidSetting: A setting cannot be used.
            Replaced: A newer instance of the agent id has the session.
            ContractMismatch: A service is live with another contract.
            OrkiError: The orchestrator refused the session for good, for another reason.
        """
        if self._runtime is not None:
            raise LocalProtocolError(f"agent {self.kind} runs already; make another one to run two in a process")
        if isinstance(orchestrator, RunSettings):
            settings = replace(orchestrator, **changes)
        else:
            settings = self.settings(orchestrator, **changes)
        self.served.clear()
        self.refused_by = None
        runtime = Runtime(settings, self._handlers, served_services(self._handlers), self._tools, self._over)
        self._runtime = runtime
        try:
            await runtime.run()
        finally:
            self._runtime = None

    def drain(self) -> None:
        """Takes no more offers; `run` returns when what runs has ended, or its grace is over. From any thread."""
        if self._runtime is not None:
            self._runtime.drain()

    def stop_now(self) -> None:
        """Gives running attempts back to the orchestrator and ends. From any thread."""
        if self._runtime is not None:
            self._runtime.stop_now()

    def _over(self, error: OrkiError | None) -> None:
        self.refused_by = error
        self.served.set()
