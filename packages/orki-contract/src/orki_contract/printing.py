"""Output of commands: to a pipe that its reader may close early, as `head -1` does, and as GitHub annotations."""

from __future__ import annotations

__all__ = ["print_line"]

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
