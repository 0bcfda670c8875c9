"""`ToolBridge`: serves tools to agents on the same host."""

from __future__ import annotations

import os
import secrets
import time
from types import TracebackType
from typing import Self

from orki_agent.hotpath.agreement import contract_tool
from orki_agent.hotpath.desk import Desk
from orki_agent.hotpath.frames import OP_CONTRACT
from orki_agent.hotpath.greeting import TOKEN_BYTES
from orki_agent.hotpath.handlers import HandlerLoop
from orki_agent.hotpath.keeper import Keeper
from orki_agent.hotpath.options import BridgeOptions
from orki_agent.hotpath.place import Place
from orki_agent.hotpath.seam import SYSTEM, Seam, after_fork
from orki_agent.hotpath.served import served_tools
from orki_contract import AsyncToolService, SyncToolService
from orki_contract.errors import InvalidSetting, LocalProtocolError, ToolCancelled

__all__ = ["ToolBridge"]

_BACKLOG = 128


class ToolBridge:
    """Serves tool services on a Unix socket, from threads of its own.

    Sync handlers run in threads, async handlers on an event loop of the bridge's. A handler that blocks stalls no other
    call; one that outlives its deadline is answered for, and told so by `call.cancelled` or `asyncio.CancelledError`.

    Example:
        with ToolBridge(SourceTools()) as bridge:
            client = SyncToolClient(bridge.path, bridge.token, name="reviewer")
    """

    def __init__(
        self,
        *services: AsyncToolService | SyncToolService,
        path: str | os.PathLike[str] | None = None,
        token: bytes | None = None,
        options: BridgeOptions | None = None,
        seam: Seam = SYSTEM,
    ) -> None:
        """Describes a bridge; `start` opens it.

        Args:
            services: Instances of classes derived from generated bases.
            path: Socket's path, in a folder of mode 0700; None for a new folder among the temporary files.
            token: Secret that clients must bring, 32 bytes; None for a new one.
            options: Limits.
            seam: Operating system.

        Raises:
            InvalidSetting: No services, two tools of one opcode, or a token of another length.
        """
        if token is not None and len(token) != TOKEN_BYTES:
            raise InvalidSetting(f"the token has {len(token)} bytes, it must have {TOKEN_BYTES}")
        served = served_tools(services)
        self._tools = {OP_CONTRACT: contract_tool(served.values()), **served}
        self._wanted_path = path
        self._options = options or BridgeOptions()
        self._seam = seam
        self._token = token or secrets.token_bytes(TOKEN_BYTES)
        self._running: _Running | None = None

    @property
    def path(self) -> str:
        """The socket's path.

        Raises:
            LocalProtocolError: The bridge does not run.
        """
        if self._running is None:
            raise LocalProtocolError("the bridge does not run: use it in a `with` block, or call start()")
        return self._running.place.path

    @property
    def token(self) -> bytes:
        """The secret that clients must bring; hand it over out of band, never on a command line."""
        return self._token

    def start(self) -> Self:
        """Opens the socket.

        Raises:
            SocketUnsafe: Folder or path are not safe, or another bridge serves the path.
            InvalidSetting: The path is too long.
        """
        if self._running is not None:
            raise LocalProtocolError("the bridge runs already")
        place = Place(self._wanted_path, seam=self._seam)
        try:
            self._running = _Running(place, Desk(self._options, self._token, self._tools), self._seam)
        except BaseException:
            place.release()
            raise
        after_fork(self)
        return self

    def stop(self) -> None:
        """Takes no more calls, lets those that run end within `stop_timeout`, cancels the rest, closes; idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()

    def after_fork(self) -> None:
        """A forked child keeps nothing of its parent's bridge."""
        running, self._running = self._running, None
        if running is not None:
            running.let_go()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Running:
    """What a bridge has while it runs."""

    def __init__(self, place: Place, desk: Desk, seam: Seam) -> None:
        self.place = place
        self._desk = desk
        self._loop: HandlerLoop | None = None
        try:
            self._listener = place.listen(_BACKLOG)
        except BaseException:
            desk.close()
            raise
        if any(tool.is_async for tool in desk.tools.values()):
            self._loop = desk.async_handlers = HandlerLoop(desk.options.max_frame_bytes)
        self._keeper = Keeper(self._listener, desk, seam)

    def stop(self) -> None:
        desk = self._desk
        desk.draining = True
        desk.poke()
        for connection in desk.connections.copy():
            connection.drain()
        deadline = time.monotonic() + desk.options.stop_timeout
        while any(connection.in_use for connection in desk.connections.copy()) and time.monotonic() < deadline:
            time.sleep(0.005)
        for connection in desk.connections.copy():
            connection.end_calls(ToolCancelled("the bridge stops"))
        while desk.connections and time.monotonic() < deadline + 1:
            for connection in desk.connections.copy():
                connection.expel(None)
            time.sleep(0.002)
        self._keeper.stop()
        self._listener.close()
        self.place.release()
        if self._loop is not None:
            self._loop.close(1)
        desk.crew.close(1)
        desk.close()

    def let_go(self) -> None:
        self._listener.close()
        self.place.let_go()
        self._keeper.let_go()
        for connection in self._desk.connections.copy():
            connection.let_go()
        self._desk.close()
