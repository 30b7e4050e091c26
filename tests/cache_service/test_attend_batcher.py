"""The batcher with a compute that the test holds back: company, turns, bounds, ends."""

import threading
import time
from typing import Any

import pytest

from polarcache.cache_service.attend_batcher import AttendBatcher
from polarcache.proto.errors import (
    CapacityError,
    DeadlineError,
    InternalError,
    ServiceUnavailableError,
)
from tests.cache_service.attend_fakes import OTHER_KIND, HeldBack, Make, Stream


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
