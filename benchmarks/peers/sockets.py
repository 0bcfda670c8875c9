"""Request and reply with pyzmq over ipc: `sockets.py echo|call PATH BYTES`."""

from __future__ import annotations

import sys

import zmq
from client_loop import serve_blocking


def main(role: str, path: str, size: int) -> None:
    """Run one role."""
    context = zmq.Context()
    if role == "echo":
        server = context.socket(zmq.REP)
        server.bind(f"ipc://{path}")
        print('{"ready": true}', flush=True)
        while True:
            server.send(server.recv())
    client = context.socket(zmq.REQ)
    client.connect(f"ipc://{path}")
    message = bytes(size)

    def cycle() -> None:
        client.send(message)
        client.recv()

    serve_blocking(cycle)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
