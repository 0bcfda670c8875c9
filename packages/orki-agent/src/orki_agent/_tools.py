"""Tools for handlers: the agent's own bridge or an external one, and an event for every call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from orki.errors.v1.errors_pb2 import Reason
from orki.events.v1.tool_orki import TOOLS
from orki.events.v1.tool_pb2 import ToolEvent
from orki_agent._settings import ToolsAt
from orki_agent._threads import in_thread
from orki_agent.hotpath import AsyncToolClient, SyncToolClient, ToolBridge, ToolRecord
from orki_contract import AsyncToolService, EventStream, SyncToolService
from orki_contract.errors import InvalidSetting
from orki_contract.trace import Span, new_span
from orki_control import CURRENT_ATTEMPT
from orki_control.session import AttemptKey

ToolServices = AsyncToolService | SyncToolService
_Collect = Callable[[EventStream[ToolEvent, Any], ToolEvent, Span], None]

_FLUSH_EVERY: Final = 0.02
_REMEMBERED: Final = 65_536


class ToolAccess:
    """Opens the bridge, provides channels to it, and turns finished calls into events outside the call path.

    Args:
        services: The agent's own tool services; empty if it has none.
        outside: A bridge outside this process, which replaces `services`.
        agent_id: The name under which tools see the agent.
        collect: Receives the events; `flush` calls it in the I/O loop.
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
        """Open the bridge.

        Args:
            wake: Schedules a callback in the I/O loop, from any thread.

        Raises:
            SocketUnsafe: There is no safe directory for the socket.
        """
        self._wake = wake
        if self._bridge is not None:
            self._open.enter_context(self._bridge)

    def async_channel(self) -> AsyncToolClient:
        """Return the channel of the user's loop; it connects at the first call."""
        if self._async is None:
            at = self.tools_at()
            self._async = AsyncToolClient(at.path, at.token, name=self._agent_id, on_call=self._called)
        return self._async

    def sync_channel(self) -> SyncToolClient:
        """Return the channel of blocking handlers."""
        if self._sync is None:
            at = self.tools_at()
            self._sync = SyncToolClient(at.path, at.token, name=self._agent_id, on_call=self._called)
        return self._sync

    async def close(self) -> None:
        """Close the channels and the bridge; call it in the user's loop."""
        if self._async is not None:
            await self._async.close()
        if self._sync is not None:
            self._sync.close()
        await in_thread(self._open.close)

    def flush(self) -> None:
        """Turn the recorded calls into events."""
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

    def tools_at(self) -> ToolsAt:
        """Return the bridge.

        Raises:
            InvalidSetting: The agent has no tools.
        """
        if self._outside is not None:
            return self._outside
        if self._bridge is None:
            raise InvalidSetting(
                "this agent has no tools: pass Agent(..., tools=…), or an external bridge with --tools SOCKET"
            )
        return ToolsAt(path=self._bridge.path, token=self._bridge.token)

    def _called(self, record: ToolRecord) -> None:
        # This is on the call path: append the record, and wake the I/O loop once for many calls.
        self._records.append((record, CURRENT_ATTEMPT.get()))
        if self._asleep:
            self._asleep = False
            self._wake(self._flush_soon)

    def _flush_soon(self) -> None:
        asyncio.get_running_loop().call_later(_FLUSH_EVERY, self.flush)
