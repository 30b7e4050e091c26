"""Continuous batching of attention: requests that wait together are computed in one launch.

One thread a device takes requests, launches and answers. It also watches the sockets of workers on
the same host, so that such a request wakes the thread that computes it and no other.

Streams take turns: a launch takes at most one request of each stream, beginning with the one whose
turn it is, and a stream that was served goes to the end. A launch waits for others only while a
stream of the same kind is due, judged by how long it took before to send its next request, and
never longer than the window.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from polarcache.cache_service.attend_compute import AttendCompute
from polarcache.cache_service.attend_prefix import AttendKind
from polarcache.cache_service.attend_queries import (
    AttendStream,
    Launch,
    Turn,
    WaitingQuery,
    Watched,
)
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.rpc import as_typed
from polarcache.proto.errors import (
    CapacityError,
    DeadlineError,
    PolarCacheError,
    ServiceUnavailableError,
)

__all__ = ["AttendBatcher"]

# Query tokens of one launch, but for a single longer request: bounds the buffers.
_MAX_LAUNCH_TOKENS = 1024
_TICK_S = 0.5
# A poll that returned so soon found what had come before it.
_AT_ONCE_S = 20e-6


class AttendBatcher:
    """The thread that computes attention, and what waits for it.

    Args:
        make_compute: Makes the buffers and kernels, in the thread.
        counters: Where to count.
        max_waiting: Most requests that wait.
        max_batch: Most requests of one launch.
        window_us: Longest wait for others to join a launch, microseconds.

    Attributes:
        on_told: Called in the thread when streams have been told something.
    """

    def __init__(
        self,
        make_compute: Callable[[], AttendCompute],
        counters: Counters,
        *,
        max_waiting: int,
        max_batch: int,
        window_us: int,
    ) -> None:
        self.on_told: Callable[[], object] = _nothing
        self._make_compute = make_compute
        self._counters = counters
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._window_s = window_us / 1e6
        self._lock = threading.Lock()
        # Streams with waiting requests, in turn, and all streams by kind.
        self._turns: OrderedDict[Turn, None] = OrderedDict()
        self._streams: dict[AttendKind, dict[Turn, None]] = {}
        self._num_waiting = 0
        self._is_polling = False
        # When the last launch ended; when sockets were last looked at, and whether they are now;
        # and since when what they hold may have been there.
        self._free_s = self._looked_s = self._unseen_s = 0.0
        self._is_reading = False
        self._closed = False
        self._ended: list[Callable[[], object]] = []
        self._watched: dict[int, Watched] = {}
        self._next_tick_s = 0.0
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
            self._streams.setdefault(kind, {})[turn] = None
        return turn

    def submit(self, turn: Turn, request: WaitingQuery) -> None:
        """Has a request computed and its stream told.

        Raises:
            CapacityError: Too many wait.
            ServiceUnavailableError: The service is shutting down.
        """
        request.turn = turn
        with self._lock:
            self._check_open()
            if self._num_waiting >= self._max_waiting:
                raise CapacityError(
                    f"{self._num_waiting} attention requests wait already; back off"
                )
            self._num_waiting += 1
            if not turn.waiting:
                self._turns[turn] = None
                if turn.answered_s:
                    least_s = self._unseen_s if self._is_reading else request.arrived_s
                    turn.learn(
                        max(0.0, least_s - turn.answered_s), request.arrived_s - turn.answered_s
                    )
            turn.waiting.append(request)
            if self._is_polling:
                self._wake()

    def leave(self, turn: Turn, then: Callable[[], object]) -> None:
        """Ends a stream: what waits leaves, and `then` runs when no launch reads its pages.

        Args:
            turn: From `join`.
            then: Lets go of the prefix; in the batcher's thread.
        """
        with self._lock:
            self._num_waiting -= len(turn.waiting)
            turn.waiting.clear()
            self._turns.pop(turn, None)
            of_kind = self._streams.get(turn.kind, {})
            of_kind.pop(turn, None)
            if not of_kind:
                self._streams.pop(turn.kind, None)
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
                "attend_streams": sum(len(turns) for turns in self._streams.values()),
                "attend_waiting_requests": self._num_waiting,
            }

    def close(self) -> None:
        """Ends the launch that runs, refuses what waits, and ends the watched streams."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake()
        self._thread.join()
        self._epoll.close()
        os.close(self._wake_fd)

    # -- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        compute = self._make_compute()
        while not self._closed:
            self._poll(self._wait_s())
            if self._ended:
                self._let_go()
            if self._turns and self._wait_s() == 0.0:
                batch = self._take_batch()
                if batch:
                    self._serve(compute, batch)
                # The last thing before waiting: whom it wakes needs the interpreter.
                self.on_told()
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
        """How long to wait for news before the next launch, if there is one."""
        with self._lock:
            if self._ended or self._closed:
                return 0.0
            now_s = time.monotonic()
            if not self._turns:
                self._is_polling = True
                return max(0.001, self._next_tick_s - now_s)
            wait_s = self._window_left_s(now_s)
            self._is_polling = wait_s > 0.0
            return wait_s

    def _window_left_s(self, now_s: float) -> float:
        """How long the launch whose turn it is may wait; 0 when no other stream is due."""
        first = next(iter(self._turns))
        streams = self._streams.get(first.kind, {})
        num_here = sum(1 for turn in self._turns if turn.kind is first.kind)
        if num_here >= min(len(streams), self._max_batch) or not self._window_s:
            return 0.0
        # Streams whose requests each came during the others' launches fall into step here.
        end_s = max(first.waiting[0].arrived_s, self._free_s) + self._window_s
        absent = [turn for turn in streams if turn.answered_s and not turn.waiting]
        if now_s >= end_s:
            for turn in absent:
                # Not there when it was due: it takes longer.
                if turn.answered_s + turn.gap_s <= now_s:
                    turn.gap_s = now_s - turn.answered_s + self._window_s
            return 0.0
        # One that is overdue by more than the window is not coming.
        start_s = now_s - self._window_s
        is_due = any(start_s <= turn.answered_s + turn.gap_s <= end_s for turn in absent)
        return end_s - now_s if is_due else 0.0

    def _take_batch(self) -> list[WaitingQuery]:
        """The requests of the next launch; the expired are refused."""
        batch: list[WaitingQuery] = []
        expired: list[WaitingQuery] = []
        num_tokens = 0
        now_s = time.monotonic()
        with self._lock:
            for turn in list(self._turns):
                waiting = turn.waiting
                while waiting and waiting[0].deadline_s <= now_s:
                    expired.append(waiting.popleft())
                if waiting:
                    request = waiting[0]
                    fits = num_tokens + request.num_tokens <= _MAX_LAUNCH_TOKENS
                    if not batch or (fits and request.launch_key == batch[0].launch_key):
                        batch.append(waiting.popleft())
                        num_tokens += request.num_tokens
                        self._turns.move_to_end(turn)
                if not waiting:
                    del self._turns[turn]
                if len(batch) == self._max_batch:
                    break
            self._num_waiting -= len(batch) + len(expired)
        for request in expired:
            late_ms = (now_s - request.arrived_s) * 1e3
            self._refuse(request, DeadlineError(f"the request waited {late_ms:.0f} ms"))
        return batch

    def _serve(self, compute: AttendCompute, batch: list[WaitingQuery]) -> None:
        # Equal company gets equal order, whoever came first: its plan is found again.
        if len(batch) > 1:
            batch.sort(key=lambda request: request.prefix.identity)
        start_s = time.monotonic()
        try:
            computed = compute.run(batch)
        except Exception as error:
            typed = as_typed(error, "attend")
            for request in batch:
                self._refuse(request, typed)
            return
        launch = Launch(start_s, computed.kernel_ns, len(batch))
        answered_s = self._free_s = time.monotonic()
        for request, (out, lse) in zip(batch, computed.answers, strict=True):
            request.turn.answered_s = answered_s
            request.turn.stream.answer(request, launch, out, lse)
        self._count(launch, batch)

    def _count(self, launch: Launch, batch: list[WaitingQuery]) -> None:
        counters = self._counters
        counters.add("attend_batches_total")
        counters.add("attend_requests_total", len(batch))
        counters.add("attend_query_tokens_total", sum(one.num_tokens for one in batch))
        counters.add("attend_queue_ns_total", sum(one.queue_ns(launch) for one in batch))
        counters.add("attend_kernel_ns_total", launch.kernel_ns)

    def _refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        self._counters.add("attend_refused_requests_total")
        request.turn.answered_s = time.monotonic()
        request.turn.stream.refuse(request, error)

    def _let_go(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, []
        for then in ended:
            then()

    def _refuse_all(self) -> None:
        with self._lock:
            waiting = [request for turn in self._turns for request in turn.waiting]
            for turn in self._turns:
                turn.waiting.clear()
            self._turns.clear()
            self._num_waiting = 0
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
