"""Whether what a submitter sends is the message that its method takes, seen before an agent spends an attempt on it.

Requests and directives travel as bytes, and most callers have serialised them with generated code. A caller that knows
a method only by its name (grpcurl, a script, another language) may send anything, which would fail in every attempt.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final

from google.protobuf.message import DecodeError, Message

from orki_contract.errors import InvalidArgument, InvalidContract
from orki_contract.images import message_class
from orki_contract.model import TaskMethod
from orki_server.registry import Registry
from orki_server.store import Store

__all__ = ["PayloadCheck"]

_MOST_CLASSES: Final = 256
"""Message classes that are kept: each costs milliseconds to build, and some memory."""


class PayloadCheck:
    """Parses payloads by the contract that leads: whatever fits one of a service's live contracts fits that one.

    Args:
        store: Has the contracts' images.
        registry: Knows which contract leads.
    """

    def __init__(self, store: Store, registry: Registry) -> None:
        self._store = store
        self._registry = registry
        self._looking = asyncio.Lock()
        self._classes: OrderedDict[tuple[str, str], type[Message] | None] = OrderedDict()

    async def request(self, method: TaskMethod, payload: bytes) -> None:
        """Checks a request.

        Raises:
            InvalidArgument: It is no message of the method's class.
            StoreUnavailable: The contract is not known here yet, and the store is away.
        """
        await self._check("request", method, method.request, payload)

    async def directive(self, method: TaskMethod, payload: bytes) -> None:
        """Checks a directive; otherwise as `request`."""
        await self._check("payload", method, method.directive, payload)

    async def _check(self, field: str, method: TaskMethod, name: str, payload: bytes) -> None:
        kind = await self._class(method.service, name)
        if kind is None or not payload:
            return
        try:
            kind.FromString(payload)
        except DecodeError:
            # The bytes may be secret: their number is all that is shown.
            raise InvalidArgument(
                f"{field}: {len(payload)} bytes that are no {name}, which {method.full_name} takes; "
                "serialise that message, as protobuf's binary format"
            ) from None

    async def _class(self, service: str, name: str) -> type[Message] | None:
        """The class of a message; None where no image is at hand, and the agent has to judge."""
        key = (self._registry.leading(service), name)
        if key not in self._classes:
            # A call may bring a thousand submissions: one of them looks, the others wait.
            async with self._looking:
                return self._classes[key] if key in self._classes else await self._look(service, *key)
        self._classes.move_to_end(key)
        return self._classes[key]

    async def _look(self, service: str, digest: str, name: str) -> type[Message] | None:
        contracts = (await self._store.contracts.registered([service])).get(service, [])
        image = next((each.image for each in contracts if each.digest == digest), b"")
        if not image:
            # Another orchestrator has just changed what leads, or the store has lost it: the next call looks again.
            return None
        try:
            kind = message_class(image, name)
        except InvalidContract:
            kind = None
        self._classes[digest, name] = kind
        if len(self._classes) > _MOST_CLASSES:
            self._classes.popitem(last=False)
        return kind
