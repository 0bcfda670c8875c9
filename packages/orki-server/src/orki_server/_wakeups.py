"""Wake-ups: what other orchestrators announce when they have changed the store.

An announcement only says what there is to read: a method has queued tasks on a shard, an orchestrator has mail, tasks
have changed. So a lost one costs time and nothing else: polls find the same. They are slow while announcements arrive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from orki_contract.backoff import Jitter, JitterOptions
from orki_contract.errors import OrkiError
from orki_events.connection import Connection
from orki_server._store.store import Store

POLL: Final = 0.5
"""Time between two polls while announcements may be missing."""
SLOW_POLL: Final = 5.0
"""Time between two polls while announcements arrive: one of an older orchestrator may be missing."""
_SILENCE: Final = 8.0
_CONNECT_TIMEOUT: Final = 2.0
_RETRIES: Final = JitterOptions(initial=0.1, maximum=2.0)
_log = logging.getLogger("orki.server.wakeups")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What follows from announcements.

    Attributes:
        queued: Called with shard, method and number of tasks that were queued.
        mail: Called with a shard on which this orchestrator has mail.
        changed: Called with a task that changed, and whether it ended.
        resumed: Called when a pause has ended.
        missed: Called when announcements may have been missed.
    """

    queued: Callable[[int, str, int], None]
    mail: Callable[[int], None]
    changed: Callable[[str, bool], None]
    resumed: Callable[[], None]
    missed: Callable[[], None]


class Wakeups:
    """Receives the announcements of other orchestrators."""

    def __init__(self, store: Store, announced: Announced) -> None:
        self._store = store
        self._announced = announced
        self._arriving = False
        self._connection = self._connect()

    def _connect(self) -> Connection:
        return Connection(
            self._store.connection.announcing,
            name="orki-store-wakeups",
            connect_timeout=_CONNECT_TIMEOUT,
            answer_timeout=_SILENCE,
        )

    @property
    def poll(self) -> float:
        """Time after which to look for what may not have been announced."""
        return SLOW_POLL if self._arriving else POLL

    async def run(self) -> None:
        """Receive announcements, until cancelled."""
        jitter = Jitter(_RETRIES)
        try:
            while True:
                await self._store.connection.up.wait()
                if self._connection.address != self._store.connection.announcing:
                    await self._connection.close()
                    self._connection = self._connect()
                try:
                    await self._connection.subscribe(
                        self._store.channel, self._opened, self._received, silence=_SILENCE
                    )
                except OrkiError as error:
                    if self._arriving or not jitter.failures:
                        _log.warning("announcements of other orchestrators are missing: %s", error.message)
                if self._arriving:
                    self._arriving = False
                    jitter.reset()
                await asyncio.sleep(jitter.failed())
        finally:
            await self._connection.close()

    def _opened(self) -> None:
        self._arriving = True
        self._announced.missed()

    def _received(self, content: bytes) -> None:
        try:
            self._read(content.decode())
        except ValueError:
            _log.warning("an announcement is malformed and is ignored")

    def _read(self, text: str) -> None:
        first, *lines = text.split("\n")
        sender, _, number = first.partition(" ")
        shard = int(number)
        if sender == self._store.caller or shard >= self._store.shards:
            return
        for line in lines:
            kind, *words = line.split(" ")
            if kind == "q":
                self._announced.queued(shard, words[0], int(words[1]))
            elif kind == "m" and words[0] == self._store.caller:
                self._announced.mail(shard)
            elif kind == "r":
                self._announced.resumed()
            elif kind == "c":
                for word in words:
                    self._announced.changed(word.removeprefix("!"), word.startswith("!"))
