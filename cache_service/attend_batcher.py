"""Continuous batching of attention: requests that wait together are computed in one launch.

One thread a device takes requests, launches and answers. It also watches the sockets of workers on
the same host, so that such a request wakes the thread that computes it and no other. Whose turn it
is: `attend_turns.py`. While a GPU computes, the thread answers the launch before and reads what
comes.

A request of a stream that is alone need not change threads: whoever submits it may compute it.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from polarcache.cache_service.attend_compute import AttendCompute
from polarcache.cache_service.attend_prefix import AttendKind
from polarcache.cache_service.attend_queries import (
    AttendStream,
    Launch,
    Turn,
    WaitingQuery,
    Watched,
)  # fmt: skip
from polarcache.cache_service.attend_turns import Turns
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.rpc import as_typed
from polarcache.proto.errors import DeadlineError, PolarCacheError, ServiceUnavailableError

__all__ = ["AttendBatcher"]

_TICK_S = 0.5
# A poll that returned so soon found what had come before it.
_AT_ONCE_S = 20e-6
# After an answer the sockets are looked at for so long before the thread sleeps, if there are
# cores to spare: waking it takes as long as a request.
_SPIN_S = 100e-6
_SPARE_CORES = 4
# A stream has been alone when for so long no other has asked.
_ALONE_S = 0.02
# Whoever submits a request of such a stream may compute it himself if it takes no longer.
_SHORT_S = 1e-3


class _Flight(NamedTuple):
    """A launch that is under way."""

    lane: AttendCompute
    batch: Sequence[WaitingQuery]
    start_s: float
    # What to do when it no longer reads its pages.
    then: list[Callable[[], object]]


class AttendBatcher:
    """The thread that computes attention, and what waits for it.

    Args:
        make_lanes: Makes the buffers and kernels, in the thread: one for each launch that may be
            under way at once.
        counters: Where to count.
        max_waiting: Most requests that wait.
        max_batch: Most requests of one launch.
        window_us: Longest wait for others to join a launch, microseconds.

    Attributes:
        on_told: Called in the thread when streams have been told something.
    """

    def __init__(
        self,
        make_lanes: Callable[[], Sequence[AttendCompute]],
        counters: Counters,
        *,
        max_waiting: int,
        max_batch: int,
        window_us: int,
    ) -> None:
        self.on_told: Callable[[], object] = _nothing
        self._make_lanes = make_lanes
        self._counters = counters
        self._window_s = window_us / 1e6
        self._lock = threading.Lock()
        self._turns = Turns(max_waiting, max_batch, self._window_s)
        self._is_polling = False
        # When sockets were last looked at, and whether they are now; and since when what they
        # hold may have been there.
        self._looked_s = self._unseen_s = 0.0
        self._is_reading = False
        self._closed = False
        self._ended: list[Callable[[], object]] = []
        self._watched: dict[int, Watched] = {}
        self._next_tick_s = 0.0
        self._spin_s = _SPIN_S if len(os.sched_getaffinity(0)) >= _SPARE_CORES else 0.0
        # Free buffers, and the launches under way, the first to end first.
        self._lanes: list[AttendCompute] = []
        self._flights: deque[_Flight] = deque()
        # The stream that asked last and since when it alone asks; whether one computes for itself.
        self._last_turn: Turn | None = None
        self._alone_since_s = 0.0
        self._is_lent = False
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="attend", daemon=True)
        self._thread.start()

    # -- any thread -------------------------------------------------------------------------

    def join(self, stream: AttendStream, kind: AttendKind) -> Turn:
        """Lets a stream take turns.

        Raises:
            ServiceUnavailableError: The service is shutting down.
        """
        turn = Turn(stream, kind)
        with self._lock:
            self._check_open()
            self._turns.join(turn)
        return turn

    def submit(self, turn: Turn, request: WaitingQuery, *, here: bool = False) -> bool:
        """Has a request computed and its stream told.

        Args:
            turn: The stream's.
            request: The request.
            here: Whether it may be computed in the calling thread, which is then told before this
                returns: if the stream is alone and its requests take little time.

        Returns:
            Whether it was computed in the calling thread.

        Raises:
            CapacityError: Too many wait.
            ServiceUnavailableError: The service is shutting down.
        """
        request.turn = turn
        with self._lock:
            self._check_open()
            if turn is not self._last_turn:
                self._last_turn = turn
                self._alone_since_s = request.arrived_s
            if not (here and self._may_lend(turn, request)):
                seen_s = self._unseen_s if self._is_reading else request.arrived_s
                self._turns.add(request, seen_s)
                if self._is_polling:
                    self._wake()
                return False
            self._is_lent = True
            lane = self._lanes.pop()
        self._serve_here(lane, request)
        return True

    def leave(self, turn: Turn, then: Callable[[], object]) -> None:
        """Ends a stream: what waits leaves, and `then` runs when no launch reads its pages.

        Args:
            turn: From `join`.
            then: Lets go of the prefix; in the batcher's thread.
        """
        with self._lock:
            self._turns.leave(turn)
            if turn is self._last_turn:
                self._last_turn = None
            closed = self._closed
            if not closed:
                self._ended.append(then)
                self._wake()
        if closed:
            if threading.current_thread() is not self._thread:
                self._thread.join()
            then()

    def watch(self, watched: Watched) -> None:
        """Reads a socket from now on.

        Raises:
            ServiceUnavailableError: The service is shutting down.
        """
        with self._lock:
            self._check_open()
            self._watched[watched.fileno()] = watched
            self._epoll.register(watched.fileno(), select.EPOLLIN | select.EPOLLRDHUP)

    def unwatch(self, fd: int) -> None:
        """Stops reading a socket, in the batcher's thread, before it is closed."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def gauges(self) -> dict[str, int]:
        """Present values by name."""
        with self._lock:
            return {
                "attend_streams": self._turns.num_streams,
                "attend_waiting_requests": self._turns.num_waiting,
            }

    def close(self) -> None:
        """Ends the launches that run, refuses what waits, and ends the watched streams."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake()
        self._thread.join()
        self._epoll.close()
        os.close(self._wake_fd)

    def _may_lend(self, turn: Turn, request: WaitingQuery) -> bool:
        return (
            request.arrived_s - self._alone_since_s > _ALONE_S
            and 0.0 < turn.took_s < _SHORT_S
            and not self._turns.num_waiting
            and 0 < self._turns.num_lanes == len(self._lanes)
        )

    def _serve_here(self, lane: AttendCompute, request: WaitingQuery) -> None:
        """In the thread of whoever submitted the request."""
        flight = _Flight(lane, [request], time.monotonic(), [])
        try:
            lane.begin(flight.batch)
        except Exception as error:
            self._refuse_batch(flight, error)
        else:
            self._answer(flight)
        with self._lock:
            self._lanes.append(lane)
            self._is_lent = False
            if self._is_polling and self._turns.num_waiting:
                self._wake()

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        lanes = self._make_lanes()
        with self._lock:
            self._lanes += lanes
            self._turns.num_lanes = len(lanes)
        while not self._closed:
            self._poll(self._wait_s())
            if self._ended:
                self._let_go()
            self._launch_if_due(len(self._flights))
            while self._flights and self._flights[0].lane.is_done():
                flight = self._flights.popleft()
                # A GPU should not wait until these answers are on their way.
                self._launch_if_due(len(self._flights) + 1)
                self._land(flight)
                self._launch_if_due(len(self._flights))
                # The last thing before waiting: whom it wakes needs the interpreter.
                self.on_told()
        while self._flights:
            self._land(self._flights.popleft())
        while self._is_lent:
            time.sleep(_ALONE_S)
        self._refuse_all()
        self.on_told()

    def _poll(self, timeout_s: float) -> None:
        if 0.0 < timeout_s <= self._window_s:
            # `epoll` counts milliseconds; its descriptor is one that `select` can wait for.
            select.select([self._epoll.fileno()], [], [], timeout_s)
            timeout_s = 0.0
        begin_s = time.monotonic()
        events = self._epoll.poll(timeout_s)
        end_s = time.monotonic()
        self._unseen_s = self._looked_s if end_s - begin_s < _AT_ONCE_S else end_s
        self._looked_s = end_s
        self._is_polling = False
        self._is_reading = True
        for fd, _ in events:
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif (watched := self._watched.get(fd)) is not None:
                watched.on_readable()
        self._is_reading = False
        if end_s >= self._next_tick_s:
            self._next_tick_s = end_s + _TICK_S
            for watched in list(self._watched.values()):
                watched.on_tick(end_s)

    def _wait_s(self) -> float:
        """How long to wait for news before the next look at launches."""
        if self._flights:
            if not self._watched:
                # Nothing is read here: sleep until the launch ends.
                self._flights[0].lane.wait()
            return 0.0
        with self._lock:
            if self._ended or self._closed:
                return 0.0
            now_s = time.monotonic()
            wait_s = None if self._is_lent else self._turns.wait_s(now_s, 0)
            if wait_s is None:
                if self._watched and now_s < self._turns.free_s + self._spin_s:
                    return 0.0
                wait_s = max(0.001, self._next_tick_s - now_s)
            self._is_polling = wait_s > 0.0
            return wait_s

    def _launch_if_due(self, num_under_way: int) -> None:
        if self._closed or not self._turns.num_waiting:
            return
        with self._lock:
            now_s = time.monotonic()
            if self._is_lent or self._turns.wait_s(now_s, num_under_way) != 0.0:
                return
            batch, expired = self._turns.take(now_s)
            lane = self._lanes.pop() if batch else None
        for request in expired:
            late_ms = (now_s - request.arrived_s) * 1e3
            self._refuse(request, DeadlineError(f"the request waited {late_ms:.0f} ms"))
        if lane is not None:
            flight = _Flight(lane, batch, time.monotonic(), [])
            try:
                lane.begin(batch)
                self._flights.append(flight)
                return
            except Exception as error:
                self._refuse_batch(flight, error)
                self._lanes.append(lane)
        self.on_told()

    def _land(self, flight: _Flight) -> None:
        """Answers a launch that is over."""
        self._answer(flight)
        self._lanes.append(flight.lane)
        for then in flight.then:
            then()

    def _answer(self, flight: _Flight) -> None:
        try:
            computed = flight.lane.finish()
        except Exception as error:
            self._refuse_batch(flight, error)
            return
        launch = Launch(flight.start_s, computed.kernel_ns, len(flight.batch))
        answered_s = self._turns.free_s = time.monotonic()
        took_s = answered_s - flight.start_s
        for request, (out, lse) in zip(computed.requests, computed.answers, strict=True):
            turn = request.turn
            turn.answered_s = answered_s
            turn.took_s = took_s
            turn.stream.answer(request, launch, out, lse)
        self._counters.add_all(
            attend_batches_total=1,
            attend_requests_total=len(flight.batch),
            attend_query_tokens_total=sum([one.num_tokens for one in flight.batch]),
            attend_queue_ns_total=sum([one.queue_ns(launch) for one in flight.batch]),
            attend_kernel_ns_total=launch.kernel_ns,
        )

    def _refuse_batch(self, flight: _Flight, error: Exception) -> None:
        typed = as_typed(error, "attend")
        for request in flight.batch:
            self._refuse(request, typed)

    def _refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        self._counters.add("attend_refused_requests_total")
        request.turn.answered_s = time.monotonic()
        request.turn.stream.refuse(request, error)

    def _let_go(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
        if self._flights:
            self._flights[-1].then.extend(ended)
            return
        for then in ended:
            then()

    def _refuse_all(self) -> None:
        with self._lock:
            waiting = self._turns.take_all()
            watched = list(self._watched.values())
        for request in waiting:
            self._refuse(request, ServiceUnavailableError("the service is shutting down"))
        for one in watched:
            one.on_close()
        self._let_go()

    def _wake(self) -> None:
        self._is_polling = False
        os.eventfd_write(self._wake_fd, 1)

    def _check_open(self) -> None:
        if self._closed:
            raise ServiceUnavailableError("the service is shutting down")


def _nothing() -> None:
    pass
