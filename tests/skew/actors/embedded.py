"""Runs the embedded server until its input ends."""

from __future__ import annotations

import sys

from values import report

from orki_server.embedded import EmbeddedServer


def main() -> None:
    server = EmbeddedServer().start()
    try:
        report(ready={"redis": server.url})
        sys.stdin.read()
    finally:
        server.stop()
    report(done=True)


if __name__ == "__main__":
    main()
