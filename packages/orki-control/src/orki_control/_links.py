"""Channels to the orchestrators of a client: one is used, and a failed one is replaced by one to the next address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Self

from orki_control.credentials import Credentials
from orki_control.transport import Addresses, Peer, open_channel

if TYPE_CHECKING:
    import grpc

    from orki.control.v1.schedule_pb2_grpc import ScheduleServiceStub
    from orki.control.v1.submitter_pb2_grpc import SubmitterServiceStub
    from orki.control.v1.task_pb2_grpc import FleetServiceStub, TaskServiceStub

_CONNECT_POLL: Final = 0.01
_CONNECT_TIMEOUT: Final = 5.0


class Link:
    """A channel to one orchestrator. It is a context manager, to be entered for each call.

    Attributes:
        peer: The orchestrator's address.
        tasks: Stub of its task service.
        fleet: Stub of its fleet service.
        schedules: Stub of its schedule service.
        submitters: Stub of its submitter service.
    """

    def __init__(
        self, peer: Peer, max_message_bytes: int, credentials: Credentials, on_exit: Callable[[Link], None]
    ) -> None:
        from orki.control.v1.schedule_pb2_grpc import ScheduleServiceStub
        from orki.control.v1.submitter_pb2_grpc import SubmitterServiceStub
        from orki.control.v1.task_pb2_grpc import FleetServiceStub, TaskServiceStub

        self.peer = peer
        self.channel: grpc.aio.Channel = open_channel(
            peer.target, max_message_bytes, authority=peer.name, credentials=credentials
        )
        self.tasks: TaskServiceStub = TaskServiceStub(self.channel)
        self.fleet: FleetServiceStub = FleetServiceStub(self.channel)
        self.schedules: ScheduleServiceStub = ScheduleServiceStub(self.channel)
        self.submitters: SubmitterServiceStub = SubmitterServiceStub(self.channel)
        self.calls = 0
        self.retired = False
        self._on_exit = on_exit

    def __enter__(self) -> Self:
        self.calls += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.calls -= 1
        self._on_exit(self)

    async def connected(self) -> bool:
        """Connect, and return whether that succeeded. As long as it did not, nothing can have been sent."""
        import grpc

        state = grpc.ChannelConnectivity
        give_up_at = asyncio.get_running_loop().time() + _CONNECT_TIMEOUT
        while asyncio.get_running_loop().time() < give_up_at:
            found = self.channel.get_state(try_to_connect=True)
            if found in (state.READY, state.TRANSIENT_FAILURE, state.SHUTDOWN):
                return found is state.READY
            # A cancelled wait for a change of state would end the channel's other calls.
            await asyncio.sleep(_CONNECT_POLL)
        return False


class Links:
    """The channels of one client. Belongs to the running event loop."""

    def __init__(self, targets: Sequence[str], max_message_bytes: int, credentials: Credentials) -> None:
        self._addresses = Addresses(targets)
        self._max_message_bytes = max_message_bytes
        self._credentials = credentials
        self._current: Link | None = None
        self._open: set[Link] = set()
        self._opening = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def count(self) -> int:
        """Number of addresses; 0 before the first call."""
        return self._addresses.count

    async def current(self) -> Link:
        """Return the channel for the next call."""
        async with self._opening:
            if self._current is None:
                self._current = Link(
                    await self._addresses.next(), self._max_message_bytes, self._credentials, self._close_unused
                )
                self._open.add(self._current)
            return self._current

    def failed(self, link: Link, *, silent: bool = False) -> None:
        """Use the next address for further calls. Other calls on the failed channel go on.

        Args:
            link: The channel.
            silent: Whether its peer fell silent, so that its connection may be half-open.
        """
        # gRPC itself connects a channel again, so a single address keeps its channel. With TLS a new one reads the
        # certificates again. It takes gRPC 30 s to notice that a connection is half-open.
        if link is self._current and (silent or self._addresses.count > 1 or self._credentials.encrypted):
            self._current = None
            link.retired = True

    async def close(self) -> None:
        """Close all channels; calls on them end."""
        self._current = None
        await asyncio.gather(*self._closing, *(link.channel.close() for link in self._open))
        self._open.clear()

    def _close_unused(self, link: Link) -> None:
        # Closing a channel cancels its calls, so it waits for the last of them.
        if link.retired and not link.calls and link in self._open:
            self._open.discard(link)
            task = asyncio.get_running_loop().create_task(link.channel.close(), name="orki close channel")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
