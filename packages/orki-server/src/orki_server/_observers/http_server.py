"""HTTP on loopback addresses, for observers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from orki_contract.errors import InvalidSetting
from orki_control.transport import is_loopback


@asynccontextmanager
async def serve_http(app: web.Application, host: str, port: int) -> AsyncIterator[str]:
    """Serve an application on a loopback address and port, 0 for a free one; yields its URL.

    Raises:
        InvalidSetting: The address is not a loopback address, or the port is taken.
    """
    if not is_loopback(host):
        raise InvalidSetting(
            f'the observer cannot listen on "{host}": it has no password, so use a loopback address such as '
            "127.0.0.1, with a proxy of your own in front for access from other hosts"
        )
    app.middlewares.append(_only_this_machine)
    # Cancel the handler of a client that disconnects; otherwise it would notice only at its next write.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise InvalidSetting(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
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
    if not is_loopback(name.strip("[]")):
        return web.json_response({"error": f'"{name}" is not a name of this machine'}, status=403)
    return await handler(request)
