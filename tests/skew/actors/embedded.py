"""The server of the tests, from the wheel of the embedded one, until its input ends."""

from __future__ import annotations

import sys

from values import tell

from orki_server.embedded import EmbeddedServer


def main() -> None:
    server = EmbeddedServer().start()
    try:
        tell(ready={"redis": server.url})
        sys.stdin.read()
    finally:
        server.stop()
    tell(done=True)


if __name__ == "__main__":
    main()
