"""What commands print on standard output, whose reader may go away: `head -1` does."""

from __future__ import annotations

__all__ = ["say"]

import os
import sys


def say(text: str) -> None:
    """Prints lines at once. When nobody reads them any more, they and all later ones are dropped.

    The command goes on with its work, and its exit status stays what it would have been.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes the stream again when it exits: from now on that leads nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
