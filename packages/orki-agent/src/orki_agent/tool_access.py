"""Tools for handlers: a bridge of the agent's own, or one outside, and a record of every call that becomes an event."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki_agent.crossing import in_thread
from orki_agent.hotpath import AsyncToolClient, SyncToolClient, ToolBridge, ToolRecord
from orki_agent.settings import ToolsAt
from orki_agent.surroundings import CURRENT_ATTEMPT
from orki_contract import AsyncToolService, EventStream, SyncToolService
from orki_contract.errors import InvalidSetting
from orki_contract.trace import Span, new_span
from orki_control.session import AttemptKey

__all__ = ["ToolAccess", "ToolServices"]

ToolServices = AsyncToolService | SyncToolService
_Collect = Callable[[EventStream[ToolEvent, Any], ToolEvent, Span], None]

_FLUSH_EVERY: Final = 0.02
_REMEMBERED: Final = 65_536


class ToolAccess:
    """Opens the bridge, gives channels to it, and turns finished calls into events off the call path.

    Args:
        services: Tool services of the agent's own; empty where it has none.
        outside: A bridge outside this process; takes the place of `services`.
        agent_id: The agent, as its tools see it.
        collect: Takes the events; called by `flush`, in the loop that `start` was told of.
    """

    def __init__(
        self, services: tuple[ToolServices, ...], outside: ToolsAt | None, agent_id: str, collect: _Collect
    ) -> None:
        self._bridge = ToolBridge(*services) if services and outside is None else None
        self._outside = outside
        self._agent_id = agent_id
        self._collect = collect
        self._records: deque[tuple[ToolRecord, AttemptKey | None]] = deque(maxlen=_REMEMBERED)
        self._asleep = True
        self._async: AsyncToolClient | None = None
        self._sync: SyncToolClient | None = None
        self._open = ExitStack()

    def start(self, wake: Callable[[Callable[[], None]], None]) -> None:
        """Opens the bridge.

        Args:
            wake: Has a callback called soon in the I/O loop; from any thread.

        Raises:
            SocketUnsafe: No safe folder for the socket can be had.
        """
        self._wake = wake
        if self._bridge is not None:
            self._open.enter_context(self._bridge)

    def async_channel(self) -> AsyncToolClient:
        """The channel of the user's loop; it connects when it is first used."""
        if self._async is None:
            path, token = self._where()
            self._async = AsyncToolClient(path, token, name=self._agent_id, on_call=self._called)
        return self._async

    def sync_channel(self) -> SyncToolClient:
        """The channel of handlers that block."""
        if self._sync is None:
            path, token = self._where()
            self._sync = SyncToolClient(path, token, name=self._agent_id, on_call=self._called)
        return self._sync

    async def close(self) -> None:
        """Ends the channels and the bridge; call it in the user's loop."""
        if self._async is not None:
            await self._async.close()
        if self._sync is not None:
            self._sync.close()
        await in_thread(self._open.close)

    def flush(self) -> None:
        """Turns what was recorded into events; a last time before they are closed."""
        self._asleep = True
        while self._records:
            record, attempt = self._records.popleft()
            event = ToolEvent(
                method=record.method,
                agent_id=self._agent_id,
                task_id=attempt.task_id if attempt else "",
                attempt=attempt.attempt if attempt else 0,
                duration_ns=record.duration_ns,
                request_bytes=record.request_bytes,
                reply_bytes=record.reply_bytes,
                reason=Reason.ValueType(record.reason),
                tool_code=record.tool_code,
            )
            span = record.span
            self._collect(TOOLS, event, span.child() if span else new_span())

    def _where(self) -> tuple[str, bytes]:
        if self._outside is not None:
            return self._outside.path, self._outside.token
        if self._bridge is None:
            raise InvalidSetting(
                "this agent has no tools: give it some with Agent(..., tools=…), or a bridge with --tools SOCKET"
            )
        return self._bridge.path, self._bridge.token

    def _called(self, record: ToolRecord) -> None:
        # On the call path: an append, and one wake-up for all calls of the next while.
        self._records.append((record, CURRENT_ATTEMPT.get()))
        if self._asleep:
            self._asleep = False
            self._wake(self._flush_soon)

    def _flush_soon(self) -> None:
        asyncio.get_running_loop().call_later(_FLUSH_EVERY, self.flush)
