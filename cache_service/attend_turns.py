"""Whose turn it is: the order of streams, and how long a launch waits for company.

A launch takes at most one request of each stream, beginning with the one whose turn it is, and a
stream that was served goes to the end. A launch waits for others only while a stream of the same
kind is due, judged by how long it took before to send its next request, and never longer than the
window.

Where two launches can be under way, many streams go in halves: while one half is computed, the
other half's answers and next requests travel.
"""

from __future__ import annotations

from collections import OrderedDict

from polarcache.cache_service.attend_prefix import AttendKind
from polarcache.cache_service.attend_queries import Turn, WaitingQuery
from polarcache.proto.errors import CapacityError

__all__ = ["Turns"]

# Query tokens of one launch, but for a single longer request: bounds the buffers.
_MAX_LAUNCH_TOKENS = 1024
# From so many streams on, half of them are company enough: a launch of half as many rows takes
# more than half of the time, which must be less than what the other half takes to travel.
_MANY_STREAMS = 12


class Turns:
    """Streams and what they wait for. Not thread-safe: the batcher's lock guards it.

    Args:
        max_waiting: Most requests that wait.
        max_batch: Most requests of one launch.
        window_s: Longest wait for others to join a launch, seconds.

    Attributes:
        num_waiting: Requests that wait.
        num_lanes: Launches that may be under way at once.
        free_s: When the last launch ended.
    """

    def __init__(self, max_waiting: int, max_batch: int, window_s: float) -> None:
        self.num_waiting = 0
        self.num_lanes = 1
        self.free_s = 0.0
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._window_s = window_s
        # Streams with waiting requests, in turn, and all streams by kind.
        self._turns: OrderedDict[Turn, None] = OrderedDict()
        self._streams: dict[AttendKind, dict[Turn, None]] = {}

    @property
    def num_streams(self) -> int:
        """Streams that have joined."""
        return sum(map(len, self._streams.values()))

    def join(self, turn: Turn) -> None:
        """Lets a stream take turns."""
        self._streams.setdefault(turn.kind, {})[turn] = None

    def leave(self, turn: Turn) -> None:
        """Ends a stream: what waits leaves."""
        self.num_waiting -= len(turn.waiting)
        turn.waiting.clear()
        self._turns.pop(turn, None)
        of_kind = self._streams.get(turn.kind, {})
        of_kind.pop(turn, None)
        if not of_kind:
            self._streams.pop(turn.kind, None)

    def add(self, request: WaitingQuery, seen_s: float) -> None:
        """Has a request wait.

        Args:
            request: The request.
            seen_s: It may have been there since then.

        Raises:
            CapacityError: Too many wait.
        """
        if self.num_waiting >= self._max_waiting:
            raise CapacityError(f"{self.num_waiting} attention requests wait already; back off")
        self.num_waiting += 1
        turn = request.turn
        if not turn.waiting:
            self._turns[turn] = None
            answered_s = turn.answered_s
            if answered_s:
                turn.learn(max(0.0, seen_s - answered_s), request.arrived_s - answered_s)
        turn.waiting.append(request)

    def wait_s(self, now_s: float, num_under_way: int) -> float | None:
        """How long the next launch may wait for company.

        Args:
            now_s: Now.
            num_under_way: Launches that are under way.

        Returns:
            Seconds, 0 to launch now; None when nothing waits or a launch must end first.
        """
        if not self._turns or num_under_way >= self.num_lanes:
            return None
        first = next(iter(self._turns))
        streams = self._streams.get(first.kind, {})
        company = self._company(len(streams))
        num_here = len(self._turns)
        if num_here >= company and len(self._streams) > 1:
            num_here = sum(1 for turn in self._turns if turn.kind is first.kind)
        if num_here >= company:
            return 0.0
        if num_under_way:
            return None
        if not self._window_s:
            return 0.0
        # Streams whose requests each came during the others' launches fall into step here.
        end_s = max(first.waiting[0].arrived_s, self.free_s) + self._window_s
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

    def take(self, now_s: float) -> tuple[list[WaitingQuery], list[WaitingQuery]]:
        """Takes the requests of the next launch out, and those whose deadline is past."""
        batch: list[WaitingQuery] = []
        expired: list[WaitingQuery] = []
        num_tokens = 0
        most = self._max_batch
        for turn in list(self._turns):
            waiting = turn.waiting
            while waiting and waiting[0].deadline_s <= now_s:
                expired.append(waiting.popleft())
            if waiting:
                request = waiting[0]
                if not batch:
                    most = self._company(len(self._streams[turn.kind]))
                    fits = True
                else:
                    fits = num_tokens + request.num_tokens <= _MAX_LAUNCH_TOKENS
                    fits = fits and request.launch_key == batch[0].launch_key
                if fits:
                    batch.append(waiting.popleft())
                    num_tokens += request.num_tokens
                    self._turns.move_to_end(turn)
            if not waiting:
                del self._turns[turn]
            if len(batch) == most:
                break
        self.num_waiting -= len(batch) + len(expired)
        return batch, expired

    def take_all(self) -> list[WaitingQuery]:
        """Takes out all that waits."""
        waiting = [request for turn in self._turns for request in turn.waiting]
        for turn in self._turns:
            turn.waiting.clear()
        self._turns.clear()
        self.num_waiting = 0
        return waiting

    def _company(self, num_streams: int) -> int:
        """Requests that a launch need not wait beyond, and takes at most."""
        if self.num_lanes > 1 and num_streams >= _MANY_STREAMS:
            num_streams = -(-num_streams // self.num_lanes)
        return min(num_streams, self._max_batch)
