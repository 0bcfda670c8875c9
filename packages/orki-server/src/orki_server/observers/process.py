"""Where an observer answers, and the line that says that it is ready."""

from __future__ import annotations

__all__ = ["LOOPBACK", "ServerOptions", "announce"]

import ipaddress
from dataclasses import dataclass
from typing import Final

from orki_contract.errors import InvalidSetting

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where an observer answers HTTP. It has no password, so it is for this machine alone.

    Attributes:
        host: A loopback address.
        port: 0 for any free one.
    """

    host: str = LOOPBACK
    port: int = 0

    def __post_init__(self) -> None:
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise InvalidSetting(
                f'the observer cannot answer at "{self.host}": it has no password, so give a loopback address such as '
                "127.0.0.1, and put a proxy of your own in front to reach it from elsewhere"
            )
        if not 0 <= self.port <= 65_535:
            raise InvalidSetting(f"the port is {self.port}; it must be from 0 to 65535")


def announce(observer: str, where: str) -> None:
    """Prints the one line of standard output, once the observer is ready: `orki NAME ready: WHERE`."""
    print(f"orki {observer} ready: {where}", flush=True)
