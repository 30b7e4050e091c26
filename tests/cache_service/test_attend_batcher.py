"""The batcher with a compute that the test holds back: company, turns, bounds, ends."""

import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from polarcache.cache_service import attend_batcher
from polarcache.cache_service.attend_batcher import AttendBatcher
from polarcache.cache_service.attend_compute import Computed
from polarcache.cache_service.attend_queries import Launch, WaitingQuery
from polarcache.cache_service.metrics import Counters
from polarcache.proto.errors import (
    CapacityError,
    DeadlineError,
    InternalError,
    PolarCacheError,
    ServiceUnavailableError,
)

KIND, OTHER_KIND = object(), object()


@dataclass
class HeldBack:
    """Computes nothing, when it is let."""

    launches: list[list[int]] = field(default_factory=list)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fails: bool = False
    threads: set[int] = field(default_factory=set)

    def begin(self, requests: Sequence[WaitingQuery]) -> None:
        self.requests = requests
        self.threads.add(threading.get_ident())
        self.launches.append(sorted(request.request_id for request in requests))
        self.begun.release()
        assert self.go.acquire(timeout=20)
        if self.fails:
            raise RuntimeError("the kernel failed")

    def is_done(self) -> bool:
        return True

    def finish(self) -> Computed[WaitingQuery]:
        requests = self.requests
        return Computed(requests, [(memoryview(b"o"), memoryview(b"l"))] * len(requests), 5)


class Stream:
    """Sends requests and keeps what it is told."""

    def __init__(self, batcher: AttendBatcher, name: int, kind: Any = KIND) -> None:
        self.batcher = batcher
        self.turn = batcher.join(self, kind)
        self.prefix: Any = SimpleNamespace(
            kind=kind, identity=bytes([name]), first_unit=name, slice_bytes=256
        )
        self.answered: list[int] = []
        self.refused: list[PolarCacheError] = []

    def ask(
        self, request_id: int, num_tokens: int = 1, timeout_ms: int = 0, here: bool = False
    ) -> bool:
        query = WaitingQuery(self.prefix, 0, num_tokens, b"", 0, request_id, timeout_ms)
        return self.batcher.submit(self.turn, query, here=here)

    def answer(
        self, request: WaitingQuery, launch: Launch, out: memoryview, lse: memoryview
    ) -> None:
        assert (launch.kernel_ns, bytes(out), bytes(lse)) == (5, b"o", b"l")
        assert request.queue_ns(launch) >= 0
        self.answered.append(request.request_id)

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        self.refused.append(error)


Make = Callable[..., tuple[AttendBatcher, HeldBack]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[AttendBatcher, HeldBack]] = []

    def make(**options: int) -> tuple[AttendBatcher, HeldBack]:
        compute: Any = HeldBack()
        options = {"max_waiting": 100, "max_batch": 8, "window_us": 0} | options
        made.append((AttendBatcher(lambda: [compute], Counters(), **options), compute))
        return made[-1]

    yield make
    for batcher, compute in made:
        for _ in range(1000):
            compute.go.release()
        batcher.close()


def blocked(batcher: AttendBatcher, compute: HeldBack) -> Stream:
    """A stream whose request 0 is being computed: what comes now waits."""
    first = Stream(batcher, 0)
    first.ask(0)
    assert compute.begun.acquire(timeout=20)
    return first


def finish(compute: HeldBack, launches: int, until: Any) -> None:
    for _ in range(launches):
        compute.go.release()
    until(lambda: compute.launches[-1] and len(compute.launches) >= launches)


def test_what_waits_together_goes_together_and_streams_take_turns(make: Make, until: Any) -> None:
    batcher, compute = make()
    blocked(batcher, compute)
    one, two, three = (Stream(batcher, number) for number in (1, 2, 3))
    for request_id in (10, 11, 12):
        one.ask(request_id)
    two.ask(20)
    three.ask(30)
    three.ask(31)
    finish(compute, 4, until)
    assert compute.launches == [[0], [10, 20, 30], [11, 31], [12]]
    until(lambda: one.answered == [10, 11, 12])


def test_a_full_launch_leaves_the_others_for_the_next_whose_turn_it_is(
    make: Make, until: Any
) -> None:
    batcher, compute = make(max_batch=2)
    blocked(batcher, compute)
    streams = [Stream(batcher, number) for number in range(1, 5)]
    for stream, first in zip(streams, (10, 20, 30, 40), strict=True):
        stream.ask(first)
        stream.ask(first + 1)
    finish(compute, 5, until)
    assert compute.launches == [[0], [10, 20], [30, 40], [11, 21], [31, 41]]


def test_kinds_and_long_requests_go_apart(make: Make, until: Any) -> None:
    batcher, compute = make()
    blocked(batcher, compute)
    one, two = Stream(batcher, 1), Stream(batcher, 2)
    other, long = Stream(batcher, 3, OTHER_KIND), Stream(batcher, 4)
    one.ask(10)
    other.ask(30)
    two.ask(20)
    long.ask(40, num_tokens=1023)
    finish(compute, 4, until)
    assert compute.launches == [[0], [10, 20], [30], [40]]


def test_beyond_the_bound_a_request_is_refused(make: Make, until: Any) -> None:
    batcher, compute = make(max_waiting=3)
    blocked(batcher, compute)
    stream = Stream(batcher, 1)
    for request_id in (1, 2, 3):
        stream.ask(request_id)
    with pytest.raises(CapacityError, match="3 attention requests wait"):
        stream.ask(4)
    assert batcher.gauges() == {"attend_streams": 2, "attend_waiting_requests": 3}
    finish(compute, 4, until)
    until(lambda: stream.answered == [1, 2, 3])
    stream.ask(5)


def test_the_expired_leave_and_are_told(make: Make, until: Any) -> None:
    batcher, compute = make()
    blocked(batcher, compute)
    stream, other = Stream(batcher, 1), Stream(batcher, 2)
    stream.ask(1, timeout_ms=1)
    stream.ask(2)
    other.ask(3, timeout_ms=1)
    time.sleep(0.01)
    finish(compute, 2, until)
    assert compute.launches == [[0], [2]]
    assert [type(error) for error in stream.refused + other.refused] == [DeadlineError] * 2


def test_a_stream_that_ends_lets_go_after_the_launch_that_reads_its_pages(
    make: Make, until: Any
) -> None:
    batcher, compute = make()
    first = blocked(batcher, compute)
    other = Stream(batcher, 1)
    other.ask(1)
    let_go: list[str] = []
    batcher.leave(first.turn, lambda: let_go.append("first"))
    batcher.leave(other.turn, lambda: let_go.append("other"))
    assert batcher.gauges() == {"attend_streams": 0, "attend_waiting_requests": 0}
    time.sleep(0.02)
    assert let_go == []
    compute.go.release()
    until(lambda: let_go == ["first", "other"])
    assert compute.launches == [[0]]


def test_a_failed_kernel_is_told_and_the_next_launch_goes_on(make: Make, until: Any) -> None:
    batcher, compute = make()
    compute.fails = True
    first = blocked(batcher, compute)
    compute.go.release()
    until(lambda: [type(error) for error in first.refused] == [InternalError])
    compute.fails = False
    first.ask(1)
    compute.go.release()
    until(lambda: first.answered == [1])


def test_closing_refuses_what_waits_and_takes_no_more(make: Make) -> None:
    batcher, compute = make()
    first = blocked(batcher, compute)
    first.ask(1)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    compute.go.release()
    closing.join(20)
    assert first.answered == [0]
    assert [type(error) for error in first.refused] == [ServiceUnavailableError]
    with pytest.raises(ServiceUnavailableError):
        first.ask(2)
    with pytest.raises(ServiceUnavailableError):
        Stream(batcher, 1)
    let_go: list[int] = []
    batcher.leave(first.turn, lambda: let_go.append(1))
    assert let_go == [1]


def test_a_launch_waits_for_a_stream_that_is_due_and_only_for_that(make: Make, until: Any) -> None:
    window_s = 1.0
    batcher, compute = make(window_us=int(window_s * 1e6))
    one, two = Stream(batcher, 1), Stream(batcher, 2)
    for _ in range(1000):
        compute.go.release()
    # Nobody knows the other's pace yet: no waiting.
    start_s = time.monotonic()
    one.ask(1)
    until(lambda: one.answered == [1])
    assert time.monotonic() - start_s < window_s / 2
    two.ask(2)
    until(lambda: two.answered == [2])
    # Both were answered a moment ago, so the other is due soon.
    one.ask(3)
    time.sleep(window_s / 10)
    two.ask(4)
    until(lambda: two.answered == [2, 4])
    assert compute.launches[-1] == [3, 4]
    # One that is long overdue is not waited for.
    two.turn.answered_s -= 10
    start_s = time.monotonic()
    one.ask(5)
    until(lambda: one.answered[-1] == 5)
    assert time.monotonic() - start_s < window_s / 2
    # And one that does not come holds nobody up beyond the window.
    two.ask(6)
    until(lambda: two.answered[-1] == 6)
    start_s = time.monotonic()
    one.ask(7)
    until(lambda: one.answered[-1] == 7)
    assert time.monotonic() - start_s < window_s * 2


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
