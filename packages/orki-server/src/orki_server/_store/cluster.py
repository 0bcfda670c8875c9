"""The topology of a Redis cluster: which node has which slot.

Redirections are not followed. A node that redirects a key has lost its slot, or is losing it, and a script must not see
a half of a shard. The connection goes down, and reads the topology until one node has the whole slot again.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from typing import Final

from orki_contract.errors import OrkiError
from orki_events.connection import Address, Connection

SLOTS: Final = 16_384
_TIMEOUT: Final = 2.0


@dataclass(frozen=True, slots=True)
class Topology:
    """One node's view of the cluster.

    Attributes:
        epoch: Number of the last change that the node knows.
        ranges: First slot, last slot, and the node that has them.
    """

    epoch: int
    ranges: tuple[tuple[int, int, Address], ...]


def slot_of(key: str) -> int:
    """Return the slot of a key: that of its hash tag, if it has one."""
    tag = re.search(r"\{([^}]+)\}", key)
    return binascii.crc_hqx((tag[1] if tag else key).encode(), 0) % SLOTS


async def topology(address: Address) -> Topology:
    """Return a node's view of its cluster.

    Raises:
        StoreUnavailable: The node does not answer, or the cluster is down as it sees it.
        InvalidSetting, LocalProtocolError: The server is not part of a cluster.
    """
    link = Connection(address, name="orki-store-topology", connect_timeout=_TIMEOUT, answer_timeout=_TIMEOUT)
    try:
        facts, slots = await link.pipeline(("CLUSTER", "INFO"), ("CLUSTER", "SLOTS"))
    finally:
        await link.close()
    for reply in (facts, slots):
        if isinstance(reply, OrkiError):
            raise reply
    if b"cluster_state:ok" not in facts:
        raise address.unavailable("its cluster is down")
    epoch = re.search(rb"cluster_current_epoch:(\d+)", facts)
    # A node without a host is the one that answers.
    ranges = [
        (low, high, (host or b"").decode() or address.settings["host"], port)
        for low, high, (host, port, *_), *_ in slots
    ]
    return Topology(
        int(epoch[1]) if epoch else 0, tuple((low, high, address.at(host, port)) for low, high, host, port in ranges)
    )
