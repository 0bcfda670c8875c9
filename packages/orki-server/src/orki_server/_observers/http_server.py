"""HTTP on loopback addresses, for observers."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from orki_contract.errors import InvalidSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Address of an observer's HTTP server. It has no password, so it serves loopback addresses only.

    Attributes:
        host: A loopback address.
        port: The port; 0 chooses a free one.
    """

    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise InvalidSetting(
                f'the observer cannot listen on "{self.host}": it has no password, so use a loopback address such as '
                "127.0.0.1, with a proxy of your own in front for access from other hosts"
            )
        if not 0 <= self.port <= 65_535:
            raise InvalidSetting(f"the port is {self.port}; it must be from 0 to 65535")


def print_ready_line(observer: str, where: str) -> None:
    """Print the readiness line `orki NAME ready: WHERE`, the observer's only line on standard output."""
    print(f"orki {observer} ready: {where}", flush=True)


@asynccontextmanager
async def serve_http(app: web.Application, options: ServerOptions) -> AsyncIterator[str]:
    """Serve an application on a loopback address; yields its URL.

    Raises:
        InvalidSetting: The port is taken.
    """
    app.middlewares.append(_only_this_machine)
    # Cancel the handler of a client that disconnects; otherwise it would notice only at its next write.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, options.host, options.port).start()
        except OSError as error:
            raise InvalidSetting(
                f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another --port"
            ) from error
        host, port = runner.addresses[0][:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@web.middleware
async def _only_this_machine(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse other host names, so that a remote page cannot read the server by DNS rebinding."""
    name = request.host.rpartition(":")[0] if not request.host.endswith("]") and ":" in request.host else request.host
    if name != "localhost" and not _is_loopback(name):
        return web.json_response({"error": f'"{name}" is not a name of this machine'}, status=403)
    return await handler(request)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
