"""The embedded server ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from orki_server.embedded import EmbeddedOptions, EmbeddedServer

PROGRAM = """
import time
from orki_server.embedded import EmbeddedServer
server = EmbeddedServer().start()
print(server.pid, flush=True)
time.sleep(60)
"""


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_ends_when_its_process_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        assert runs(server)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        until = time.monotonic() + 20
        while runs(server):
            assert time.monotonic() < until, "the server still runs"
            time.sleep(0.02)


def test_a_restart_keeps_its_data_and_leaves_nothing_behind(tmp_path: Path) -> None:
    server = EmbeddedServer(EmbeddedOptions(directory=tmp_path, append_only=True)).start()
    first = server.pid
    server.kill()
    server.start()
    assert server.pid not in (0, first)
    assert not runs(first)
    server.stop()
    assert server.pid == 0
