"""The tools: they alone touch the tree."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sourcereview.v1.tools_orki import (
    MeasureFileRequest,
    MeasureFileResponse,
    ReadFileRequest,
    ReadFileResponse,
    SourceToolServiceSyncBase,
)

from orki_agent import ToolCall
from orki_contract.errors import ToolFailed

__all__ = ["MAX_PIECE_BYTES", "SourceTools"]

MAX_PIECE_BYTES = 262_144
"""Most bytes of a file in one reply."""


class SourceTools(SourceToolServiceSyncBase):
    """Reads regular files below one folder; follows no link below it.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def measure_file(self, request: MeasureFileRequest, call: ToolCall) -> MeasureFileResponse:
        size = newlines = 0
        with open(self._open(request.path), "rb") as file:
            while (piece := file.read(MAX_PIECE_BYTES)) and not call.cancelled:
                size += len(piece)
                newlines += piece.count(b"\n")
        return MeasureFileResponse(size=size, newlines=newlines)

    def read_file(self, request: ReadFileRequest, call: ToolCall) -> ReadFileResponse:
        length = min(request.length, MAX_PIECE_BYTES)
        with open(self._open(request.path), "rb") as file:
            content = os.pread(file.fileno(), length, request.offset)
        return ReadFileResponse(content=content, end=len(content) < length)

    def _open(self, path: bytes) -> int:
        """A descriptor of the file, opened step by step so that no component can lead out of the root."""
        parts = path.split(b"/")
        if not path or b"" in parts or b".." in parts or b"\0" in path:
            raise ToolFailed("the path must lead downwards from the root", code=1)
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            # Without O_NONBLOCK a FIFO that takes the file's place would hold the tool for ever.
            opened = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise ToolFailed(f"cannot be read: {error.strerror}", code=error.errno or 1) from None
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise ToolFailed("is not a regular file", code=1)
        return opened
