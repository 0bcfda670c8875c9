"""`Agent`: task services, their tools, and how they run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from orki_agent._services import TaskServices, find_handlers, served_services
from orki_agent._settings import RunSettings, default_agent_id
from orki_contract import AsyncToolService, SyncToolService
from orki_contract.errors import InvalidSetting, LocalProtocolError, OrkiError
from orki_control.session import AGENT_ID, MAX_SLOTS

if TYPE_CHECKING:
    from orki_agent._runtime import Runtime

ToolServices: TypeAlias = AsyncToolService | SyncToolService


class Agent:
    """Task services and the tools of their handlers. Creating an agent does no I/O.

    ```python
    agent = Agent("reviewer", Reviewer(), tools=SourceTools(), slots=4)
    ```

    Attributes:
        kind: Kind of the agent; the first part of its default id.
        slots: Maximum number of concurrent attempts, unless a run sets another one.
        served: Set when a run's session has ended, also while user code keeps `run` from returning.
        refused_by: The error with which the orchestrator closed the last session for good; None if it did not.
    """

    def __init__(
        self,
        kind: str,
        *services: TaskServices,
        slots: int = 4,
        tools: ToolServices | Iterable[ToolServices] = (),
    ) -> None:
        """Create an agent.

        Args:
            kind: Kind of the agent: at most 60 letters, digits, `-`, `_` or `.`.
            services: Instances of classes derived from generated bases, one for each contract.
            slots: Maximum number of concurrent attempts.
            tools: Tool services that handlers reach through `ctx.tools`.

        Raises:
            InvalidSetting: An argument is invalid.
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
        """The served methods as `package.Service/Method`, sorted."""
        return tuple(sorted(self._handlers))

    def settings(self, orchestrator: str | Sequence[str], **changes: Any) -> RunSettings:
        """Return settings of a run with this agent's defaults.

        Args:
            orchestrator: `HOST:PORT`; several separated by commas, or a sequence.
            changes: Further settings by their names in `RunSettings`.

        Raises:
            InvalidSetting: A setting is unknown or its value is invalid.
        """
        # Checked once with all changes: `insecure` decides about the address.
        given = {"agent_id": default_agent_id(self.kind), "slots": self.slots, **changes}
        given["orchestrator"] = orchestrator if isinstance(orchestrator, str) else ",".join(orchestrator)
        try:
            return RunSettings(**given)
        except TypeError as error:
            raise InvalidSetting(f"agent {self.kind}: {error}") from None

    async def run(self, orchestrator: str | Sequence[str] | RunSettings, **changes: Any) -> None:
        """Serve until the agent has drained. Async handlers run in the calling loop, blocking ones in threads.

        Args:
            orchestrator: `HOST:PORT`, several separated by commas or as a sequence, or settings of the run.
            changes: Settings by their names in `RunSettings`: `agent_id`, `slots`, `events_url`, `drain_grace`, …

        Raises:
            InvalidSetting: A setting is invalid.
            Replaced: A newer instance with the same agent id has the session.
            ContractMismatch: A service is live with an incompatible contract.
            OrkiError: The orchestrator closed the session for good for another reason.
        """
        if self._runtime is not None:
            raise LocalProtocolError(f"agent {self.kind} runs already; create another one to run two in a process")
        if isinstance(orchestrator, RunSettings):
            settings = replace(orchestrator, **changes)
        else:
            settings = self.settings(orchestrator, **changes)
        # The runtime imports gRPC and Redis, which `import orki_agent` does not need.
        from orki_agent._runtime import Runtime

        self.served.clear()
        self.refused_by = None
        runtime = Runtime(settings, self._handlers, served_services(self._handlers), self._tools, self._over)
        self._runtime = runtime
        try:
            await runtime.run()
        finally:
            self._runtime = None

    def drain(self) -> None:
        """Accept no more offers; `run` returns after the running attempts or their grace. Thread-safe."""
        if self._runtime is not None:
            self._runtime.drain()

    def stop_now(self) -> None:
        """Give running attempts back to the orchestrator and end. Thread-safe."""
        if self._runtime is not None:
            self._runtime.stop_now()

    def _over(self, error: OrkiError | None) -> None:
        self.refused_by = error
        self.served.set()
