"""The embedded server until the input ends; prints its address."""

from __future__ import annotations

import sys

from orki_server.embedded import EmbeddedServer


def main() -> None:
    """Serves."""
    server = EmbeddedServer().start()
    try:
        print(server.url, flush=True)
        sys.stdin.read()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
