"""A local package index with optional upload times."""

from __future__ import annotations

import hashlib
import json
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType


class LocalIndex:
    """An index of wheels with the JSON form of the simple API.

    Attributes:
        requested: The paths of all requests.
    """

    def __init__(self) -> None:
        self.requested: list[str] = []
        self._files: dict[str, tuple[bytes, datetime | None]] = {}
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index._answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        """The URL of the simple API."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/simple/"

    def put(self, wheel: Path, uploaded: datetime | None = None, content: bytes | None = None) -> None:
        """Publish a wheel, optionally with different bytes."""
        self._files[wheel.name] = (wheel.read_bytes() if content is None else content, uploaded)

    def clear(self) -> None:
        """Remove everything."""
        self._files.clear()
        self.requested.clear()

    def __enter__(self) -> LocalIndex:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requested.append(handler.path)
        parts = handler.path.strip("/").split("/")
        body: bytes | None = None
        kind = "application/vnd.pypi.simple.v1+json"
        if parts == ["simple"]:
            body = json.dumps({"meta": {"api-version": "1.1"}, "projects": []}).encode()
        elif parts[0] == "simple" and len(parts) == 2:
            body = self._page(parts[1])
        elif parts[0] == "files" and parts[-1] in self._files:
            body, kind = self._files[parts[-1]][0], "application/octet-stream"
        handler.send_response(404 if body is None else 200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body or b"")))
        handler.send_header("Connection", "close")
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body or b"")

    def _page(self, name: str) -> bytes | None:
        own = {file: each for file, each in self._files.items() if file.split("-")[0].replace("_", "-") == name}
        files = [
            {
                "filename": file,
                "url": f"/files/{file}",
                "hashes": {"sha256": hashlib.sha256(content).hexdigest()},
                **({"upload-time": uploaded.isoformat().replace("+00:00", "Z")} if uploaded else {}),
            }
            for file, (content, uploaded) in own.items()
        ]
        return json.dumps({"meta": {"api-version": "1.1"}, "name": name, "files": files}).encode() if own else None
