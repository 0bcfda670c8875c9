"""The store: its layout, its operations, and the checks that detect lost data and false claims."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
from collections.abc import Callable
from typing import Final

from orki_contract.errors import InvalidSetting
from orki_control.session import AttemptKey
from orki_server._keys import LAYOUT_VERSION, FleetKeys
from orki_server._store.batcher import Batcher, shard_script
from orki_server._store.connection import StoreConnection
from orki_server._store.durable import DurableWrites
from orki_server._store.operations import Assigned, Operation, shard_of
from orki_server._store.server import MEMORY, Durability
from orki_server._store.upkeep import raise_epoch

_PROOF_BYTES: Final = 16


class Store:
    """Tasks in Redis.

    Attributes:
        connection: The connection, for commands that are not operations.
        shards: Number of shards.
        caller: Name of the orchestrator.
        channel: Channel of the announcements.
        apply: Enqueues an operation; see `Batcher.apply`.
        durable: Makes single writes durable, beyond the durability of the store.
    """

    def __init__(
        self,
        url: str,
        *,
        shards: int = 8,
        retention: float = 3600.0,
        caller: str = "store",
        durability: Durability = MEMORY,
    ) -> None:
        """Create the store without connecting.

        Args:
            url: URL of the server.
            shards: Number of shards; fixed when the store is first used.
            retention: Time for which finished tasks are kept.
            caller: Name of the orchestrator. Only the agents that it hears are at fault when their leases expire.
            durability: What acknowledged operations survive.

        Raises:
            InvalidSetting: The URL is malformed.
        """
        self.shards = shards
        self.connection = StoreConnection(url, shards=shards, durability=durability)
        self.caller = caller
        self.channel = FleetKeys.channel(self.connection.address.settings.get("db", 0))
        self._batcher = Batcher(self.connection, shard_script(retention, self.channel), shards, caller)
        self.durable = DurableWrites(self.connection)
        self._generation = b""
        self._secret = b""
        self._highest_fence: dict[int, int] = {}
        self._loss_listeners: list[Callable[[], None]] = []
        self.connection.on_recovery(self._check_generation)
        self.connection.on_change(self._connection_changed)
        self.apply = self._batcher.apply

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreUnavailable: The server does not answer, or its state forbids writes.
            InvalidSetting: It holds a store of another layout, or cannot keep the durability.
        """
        await self.connection.open()
        await self._claim_layout()
        self._batcher.start()

    async def close(self) -> None:
        await self._batcher.close()
        await self.durable.close()
        await self.connection.close()

    def on_batch(self, fill: Callable[[], None]) -> None:
        """Call `fill` before each batch of operations is taken; operations that it applies may join the batch."""
        self._batcher.on_batch = fill

    def on_timer(self, due: Callable[[int, float], None]) -> None:
        """Call `due` with a shard and the time until a timer that an operation has set there, if that is soon."""
        self._batcher.on_timer = due

    @property
    def up(self) -> bool:
        """Whether the server replied last time."""
        return self.connection.up.is_set()

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    def on_loss(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the store came back without its data: all of it, or its newest writes."""
        self._loss_listeners.append(listener)

    @property
    def event_limits(self) -> tuple[int, int] | None:
        """Number of entries that the streams `tasks` and `audit` keep, if the scripts write their events.

        Without it, the events of tasks go to the outbox.
        """
        return self._batcher.event_limits

    @event_limits.setter
    def event_limits(self, limits: tuple[int, int] | None) -> None:
        self._batcher.event_limits = limits

    @property
    def damaged(self) -> int:
        """Number of operations that were refused because a record is damaged."""
        return self._batcher.damaged

    def proof(self, agent_id: str, attempt: AttemptKey) -> bytes:
        """Return the proof that the attempt was offered to the agent. Fences are public, proofs are not."""
        claim = f"{attempt.task_id}/{attempt.attempt}/{attempt.fence}/{agent_id}"
        return hmac.digest(self._secret, claim.encode(), hashlib.sha256)[:_PROOF_BYTES]

    def is_proven(self, agent_id: str, attempt: AttemptKey, proof: bytes) -> bool:
        """Whether an agent's claim to hold an attempt has the proof of its offer."""
        return hmac.compare_digest(self.proof(agent_id, attempt), proof)

    def offer(self, operation: Operation[Assigned]) -> asyncio.Future[Assigned]:
        """Apply an offer and remember its fences, to detect a store that forgets them. Raises as `apply`."""

        def remember(offered: asyncio.Future[Assigned]) -> None:
            if not offered.cancelled() and offered.exception() is None:
                known = self._highest_fence.get(operation.shard, 0)
                fences = [each.attempt.fence for each in offered.result().offers]
                if fences:
                    self._highest_fence[operation.shard] = max(known, *fences)

        future = self.apply(operation)
        future.add_done_callback(remember)
        return future

    async def check_fence(self, attempt: AttemptKey) -> bool:
        """Check that the store knows a fence that an agent holds with its proof. If not, it has lost its newest writes.

        Its epoch is raised then, so that no fence repeats. Returns whether it was raised.

        Raises:
            UnknownTask: The attempt has a malformed task id.
        """
        shard = shard_of(attempt.task_id)
        if attempt.fence <= self._highest_fence.get(shard, 0):
            return False
        self._highest_fence[shard] = attempt.fence
        return await self.apply(raise_epoch(shard, attempt.fence))

    def _connection_changed(self, up: bool) -> None:
        if not up:
            # These operations are patient: they run first when the server is back, before any offer.
            for shard, seen in self._highest_fence.items():
                self.apply(raise_epoch(shard, seen)).add_done_callback(self._epoch_checked)

    def _epoch_checked(self, outcome: asyncio.Future[bool]) -> None:
        if not outcome.cancelled() and outcome.exception() is None and outcome.result():
            self._report_loss()

    async def _check_generation(self) -> None:
        if await self._claim_layout():
            self._report_loss()

    def _report_loss(self) -> None:
        for listener in self._loss_listeners:
            listener()

    async def _claim_layout(self) -> bool:
        """Write the layout, or compare it with ours. Returns whether the content is another one than at the last call.

        Raises:
            InvalidSetting: The store has another layout, or a damaged one.
            StoreUnavailable: The store is down.
        """
        generation, secret = os.urandom(8).hex(), os.urandom(32).hex()
        ours = {"shards": self.shards, "version": LAYOUT_VERSION, "generation": generation, "secret": secret}
        reply = await self.connection.call("HMGET", FleetKeys.LAYOUT, *ours, while_down=True)
        if None in reply:
            for field, value in ours.items():
                await self.connection.call("HSETNX", FleetKeys.LAYOUT, field, value, while_down=True)
            reply = await self.connection.call("HMGET", FleetKeys.LAYOUT, *ours, while_down=True)
        shards, version = _layout_numbers(self.connection, *reply[:2])
        shown = self.connection.address.shown
        if version != LAYOUT_VERSION:
            raise InvalidSetting(
                f"{shown} has layout {version}, this orchestrator writes {LAYOUT_VERSION}; "
                "use orchestrators of one version, or another Redis database"
            )
        if shards != self.shards:
            raise InvalidSetting(
                f"{shown} has {shards} shards, this orchestrator is set to {self.shards}; "
                f"set shards to {shards}, or use another Redis database"
            )
        exchanged = self._generation not in (b"", reply[2])
        self._generation, self._secret = reply[2:]
        return exchanged


def _layout_numbers(connection: StoreConnection, *values: bytes | None) -> list[int]:
    if not all(re.fullmatch(rb"[1-9][0-9]{0,3}", value or b"") for value in values):
        raise InvalidSetting(
            f"{connection.address.shown} has a damaged layout: its key {FleetKeys.LAYOUT} was changed by another "
            "program; restore the store from a backup, or use another Redis database"
        )
    return [int(value or b"") for value in values]


async def read_layout(connection: StoreConnection) -> int:
    """Return a store's number of shards; 0 if no orchestrator has used it yet.

    Raises:
        InvalidSetting: The store has the layout of another version, or a damaged one.
        StoreUnavailable: The store is down.
    """
    reply = await connection.call("HMGET", FleetKeys.LAYOUT, "shards", "version")
    if None in reply:  # an orchestrator writes the layout just now, or never did
        return 0
    shards, version = _layout_numbers(connection, *reply)
    if version != LAYOUT_VERSION:
        raise InvalidSetting(
            f"{connection.address.shown} has layout {version}, this command knows {LAYOUT_VERSION}; "
            "use the command of the orchestrator's version"
        )
    return shards
