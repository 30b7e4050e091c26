"""The batcher's threads: two launches under way, streams that compute for themselves, wake-ups."""

import queue
import random
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from polarcache.cache_service import attend_batcher
from polarcache.cache_service.attend_batcher import AttendBatcher
from polarcache.cache_service.attend_queries import WaitingQuery
from polarcache.cache_service.metrics import Counters
from tests.cache_service.attend_fakes import HeldBack, Make, Stream


class Later(HeldBack):
    """Computes until it is let, while the batcher goes on."""

    is_ready = False

    def begin(self, requests: Sequence[WaitingQuery]) -> None:
        self.go.release()
        super().begin(requests)

    def is_done(self) -> bool:
        return self.is_ready

    def wait(self) -> None:
        deadline_s = time.monotonic() + 20
        while not self.is_ready and time.monotonic() < deadline_s:
            time.sleep(1e-4)


def test_while_one_half_is_computed_the_other_travels(until: Any) -> None:
    lanes = [Later(), Later()]
    begun: Any = lanes
    batcher = AttendBatcher(
        lambda: begun, Counters(), max_waiting=100, max_batch=64, window_us=300_000
    )
    streams = [Stream(batcher, number) for number in range(16)]
    here, there = socket.socketpair()
    with here, there:
        # Somebody's socket is read meanwhile.
        batcher.watch(Ringing(streams[0], there))
        for stream in streams:
            stream.turn.answered_s = time.monotonic()
        for number, stream in enumerate(streams[1:], 1):
            stream.ask(number)
        until(lambda: sum(len(lane.launches) for lane in lanes) == 1)
        (first,) = (lane for lane in lanes if lane.launches)
        (second,) = (lane for lane in lanes if lane is not first)
        # Half of the streams are company enough; the other half waits till it is complete.
        assert first.launches == [list(range(1, 9))]
        time.sleep(0.02)
        assert second.launches == []
        here.send(bytes([99]))
        until(lambda: second.launches == [sorted([*range(9, 16), 99])])
        assert not any(stream.answered for stream in streams)
        # What comes now waits for a launch to end, and the first to end is answered first.
        streams[1].ask(100)
        let_go: list[int] = []
        batcher.leave(streams[2].turn, lambda: let_go.append(2))
        first.is_ready = True
        until(lambda: streams[8].answered == [8])
        assert streams[9].answered == []
        # A stream that left lets go when no launch is left that began before.
        time.sleep(0.02)
        assert let_go == []
        first.is_ready = False
        second.is_ready = True
        until(lambda: let_go == [2])
        until(lambda: streams[9].answered == [9])
        first.is_ready = True
        until(lambda: streams[1].answered == [1, 100])
        batcher.unwatch(there.fileno())
        batcher.close()


def test_a_stream_that_is_alone_may_compute_for_itself(make: Make, until: Any) -> None:
    batcher, compute = make()
    one, two = Stream(batcher, 1), Stream(batcher, 2)
    for _ in range(100):
        compute.go.release()
    # The first is timed by the batcher's thread.
    assert not one.ask(0, here=True)
    until(lambda: one.answered == [0])
    time.sleep(2 * attend_batcher._ALONE_S)
    assert one.ask(1, here=True)
    assert one.answered == [0, 1]
    assert not one.ask(2)
    until(lambda: one.answered == [0, 1, 2])
    # Not when another asked a moment ago, and not when it takes long.
    two.ask(3)
    until(lambda: two.answered == [3])
    assert not one.ask(4, here=True)
    until(lambda: one.answered[-1] == 4)
    time.sleep(2 * attend_batcher._ALONE_S)
    one.turn.took_s = 1.0
    assert not one.ask(5, here=True)
    until(lambda: one.answered[-1] == 5)
    assert len(compute.threads) == 2


def test_what_comes_while_one_computes_for_itself_waits_for_it(make: Make, until: Any) -> None:
    batcher, compute = make()
    one, two = Stream(batcher, 1), Stream(batcher, 2)
    compute.go.release()
    one.ask(0)
    until(lambda: one.answered == [0])
    time.sleep(2 * attend_batcher._ALONE_S)
    thread = threading.Thread(target=one.ask, args=(1,), kwargs={"here": True})
    thread.start()
    until(lambda: compute.launches[-1] == [1])
    assert not two.ask(2, here=True)
    time.sleep(0.02)
    assert compute.launches == [[0], [1]]
    compute.go.release()
    thread.join(20)
    compute.go.release()
    until(lambda: two.answered == [2])
    assert one.answered == [0, 1]


class Ringing:
    """A watched socket whose bytes are requests, as those of workers on the same host are."""

    def __init__(self, stream: Stream, connection: socket.socket) -> None:
        self.stream, self.connection = stream, connection

    def fileno(self) -> int:
        return self.connection.fileno()

    def on_readable(self) -> None:
        for number in self.connection.recv(64):
            self.stream.ask(number)

    def on_tick(self, now_s: float) -> None:
        pass

    def on_close(self) -> None:
        self.stream.batcher.unwatch(self.fileno())


class Telling(Stream):
    """Lets its worker's thread wait for what it is told."""

    def __init__(self, batcher: AttendBatcher, name: int) -> None:
        super().__init__(batcher, name)
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()

    def answer(self, *answer: Any) -> None:
        super().answer(*answer)
        self.told.put(self.answered[-1])


@pytest.mark.parametrize("spin_s", [0.0, 1e-4], ids=["sleeps", "spins"])
@pytest.mark.parametrize("num_streams", [1, 2, 6])
def test_no_wake_up_is_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch, spin_s: float, num_streams: int
) -> None:
    # Without its tick a thread that missed a wake-up sleeps for good.
    monkeypatch.setattr(attend_batcher, "_TICK_S", 1e6)
    monkeypatch.setattr(attend_batcher, "_SPIN_S", spin_s)
    monkeypatch.setattr(attend_batcher, "_SPARE_CORES", 1)
    monkeypatch.setattr(attend_batcher, "_ALONE_S", 2e-4)
    batcher, compute = make(window_us=200)
    num_requests = 1200 // num_streams
    for _ in range(num_streams * num_requests):
        compute.go.release()
    streams = [Telling(batcher, number) for number in range(num_streams)]
    late: list[tuple[int, int]] = []

    def work(number: int) -> None:
        stream, pauses = streams[number], random.Random(number)
        here, there = socket.socketpair()
        with here, there:
            if number % 2:
                batcher.watch(Ringing(stream, there))
            for i in range(num_requests):
                request_id = i % 256
                if number % 2:
                    here.send(bytes([request_id]))
                else:
                    stream.ask(request_id, here=bool(i % 3))
                try:
                    assert stream.told.get(timeout=5) == request_id
                except queue.Empty:
                    late.append((number, i))
                    return
                # Pauses about as long as what they race with.
                time.sleep(pauses.choice((0.0, 0.0, 1e-5, 2e-4, 1e-3)))
            batcher.unwatch(there.fileno())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not late
