"""What every test in the workspace is held to: it leaves no task, thread, child process or open file behind.

Each check compares with what stood before the test's own fixtures, so a server that a module or the session keeps
running is nobody's leak. What is on its way out gets a bounded time to go.
"""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

GRACE = 5.0

# Test modules may import gRPC before orki, which sets this.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# gRPC keeps one thread that polls for every channel and server of the process, and ends it when it likes.
KEPT_THREADS = ("_poll_wrapper", "_poller", "grpc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each coroutine test the check for tasks; it comes first, so it looks last, after the other fixtures."""
    for item in items:
        if isinstance(item, pytest.Function) and asyncio.iscoroutinefunction(item.obj):
            item.fixturenames.insert(0, "no_task_left")


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail a test whose event loop still runs tasks when the test and its fixtures are done."""
    before = asyncio.all_tasks()
    yield
    deadline = time.monotonic() + GRACE
    while (left := _tasks_since(before)) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not left, f"tasks still running: {[task.get_coro() for task in left]}"


def _tasks_since(before: set[asyncio.Task[object]]) -> set[asyncio.Task[object]]:
    return {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open file."""
    looks: dict[str, Callable[[], set[str]]] = {"threads": _threads, "child processes": _children, "files": _files}
    before = {what: look() for what, look in looks.items()}
    yield
    deadline = time.monotonic() + GRACE
    for what, look in looks.items():
        while (left := look() - before[what]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left, f"{what} left behind: {sorted(left)}"


@pytest.fixture(scope="module", autouse=True)
def nothing_unclosed() -> Iterator[None]:
    """Let Python warn of what a module's tests dropped without closing it while that module can still be named."""
    yield
    gc.collect()


def _threads() -> set[str]:
    """Name the running threads."""
    return {
        f"{thread.name} ({thread.ident})"
        for thread in threading.enumerate()
        if not any(kept in thread.name for kept in KEPT_THREADS)
    }


def _children() -> set[str]:
    """Name the child processes, whichever thread started them, and those that ended and nobody waited for."""
    found = set()
    for file in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(file.read_text(encoding="ascii").split())
        except OSError:  # a thread that ended meanwhile
            continue
    return found


def _files() -> set[str]:
    """Name the open files, with their descriptors. Python itself warns of a socket that nobody closed."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISREG(os.stat(f"/proc/self/fd/{name}").st_mode):
                found.add(f"{os.readlink(f'/proc/self/fd/{name}')} ({name})")
        except OSError:  # the listing's own descriptor
            continue
    return found
