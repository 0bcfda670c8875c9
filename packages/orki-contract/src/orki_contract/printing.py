"""Output of commands: to a pipe that its reader may close early, as `head -1` does, and as GitHub annotations."""

from __future__ import annotations

__all__ = ["annotation", "print_line"]

import os
import sys


def print_line(text: str) -> None:
    """Print and flush a text. If the pipe is closed, this and all later output is dropped.

    The command continues and keeps its exit status.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes the stream again at exit, so redirect it.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def annotation(kind: str, title: str, text: str, file: str, line: int, column: int) -> str:
    """Return a GitHub workflow command: an `error`, a `warning` or a `notice`, at a line of a file.

    Line 0 is the whole file, and an empty file the whole run.
    """
    position = [f"file={_property(file)}"] if file else []
    if position and line:
        position += [f"line={line}", f"col={column}"]
    return f"::{kind} {','.join([*position, f'title={_property(title)}'])}::{_escaped(text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
