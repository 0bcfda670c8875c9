"""Many calls at once, cancelled and timed out at random: each gets exactly one correct answer."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest
from hotpath_tools import Ask, AsyncSampleTools, RawPeer, SampleTools, until

from orki_agent.hotpath import BridgeOptions, ToolBridge
from orki_agent.hotpath.frames import FLAG_ERROR, NO_TRACE, Frame, decode_error, encode_call, encode_cancel
from orki_contract.errors import ToolCancelled, ToolDeadline

CALLS = 2_000
ECHO, SLEEP, GROW, NAP = 0x0101, 0x0102, 0x0105, 0x0201


class RandomCalls:
    """A connection that sends random calls and collects the answers."""

    def __init__(self, bridge: ToolBridge, seed: int) -> None:
        self.chosen = random.Random(seed)
        self.peer = RawPeer(bridge)
        self.answers: list[Frame] = []
        self.asked: dict[int, tuple[int, Ask]] = {}
        self.excused: set[int] = set()
        self.room = threading.Semaphore(100)
        self.reader = threading.Thread(target=self._read)
        self.writer = threading.Thread(target=self._write)
        self.reader.start()
        self.writer.start()

    def _read(self) -> None:
        while len(self.answers) < CALLS:
            frame = self.peer.frame()
            if frame is None:
                return
            self.answers.append(frame)
            self.room.release()

    def _write(self) -> None:
        chosen = self.chosen
        for number in range(1, CALLS + 1):
            self.room.acquire()
            opcode = chosen.choices((ECHO, SLEEP, GROW, NAP), (60, 15, 10, 15))[0]
            ask = Ask(chosen.randrange(200_000 if opcode == GROW else 12), number)
            timeout_us = chosen.choice((0, 0, 0, chosen.randrange(1, 8_000)))
            self.asked[number] = (opcode, ask)
            sent = encode_call(opcode, 16, 1, number, timeout_us, NO_TRACE, ask.encode())
            if timeout_us:
                self.excused.add(number)
            if chosen.random() < 0.1:
                cancelled = chosen.randrange(max(1, number - 5), number + 1)
                self.excused.add(cancelled)
                sent += encode_cancel(cancelled)
            cut = chosen.randrange(len(sent))
            self.peer.send(sent[:cut])
            self.peer.send(sent[cut:])

    def end(self) -> None:
        self.writer.join()
        self.reader.join()
        self.peer.close()

    def check(self) -> None:
        """Check that each call got one answer: its result, or an error that its cancel or timeout explains."""
        assert Counter(frame.correlation for frame in self.answers) == Counter(list(self.asked))
        for frame in self.answers:
            opcode, ask = self.asked[frame.correlation]
            if frame.flags & FLAG_ERROR:
                assert frame.correlation in self.excused
                assert isinstance(decode_error(frame), ToolCancelled | ToolDeadline)
            elif opcode == GROW:
                assert Ask.decode(frame.body, 16) == Ask(ask.number, 0, b"g" * ask.number)
            else:
                assert (frame.opcode, Ask.decode(frame.body, 16)) == (opcode, ask)


@pytest.mark.parametrize("seed", range(5))
def test_every_call_is_answered_exactly_once(seed: int) -> None:
    options = BridgeOptions(max_blocked=6, frame_timeout=30)
    with ToolBridge(SampleTools(), AsyncSampleTools(), options=options) as bridge:
        callers = [RandomCalls(bridge, 10 * seed + number) for number in range(4)]
        for caller in callers:
            caller.end()
        for caller in callers:
            caller.check()
        running = bridge._running
        assert running is not None
        until(lambda: not running.monitor.connections)
        until(lambda: running.state.blocked == 0, what="all threads for blocking handlers are free again")
        assert running.state.blocked == 0
