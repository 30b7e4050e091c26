"""Deadlines of requests on long-lived streams, which gRPC does not know."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

__all__ = ["Guard", "Watchdog"]

_LONGEST_SLEEP_S = 60.0


class Guard:
    """The deadline of what one stream waits for.

    Attributes:
        is_late: Whether a deadline has passed.
    """

    __slots__ = ("_deadline_s", "_dog", "_on_late", "is_late")

    def __init__(self, dog: Watchdog, on_late: Callable[[], object]) -> None:
        self._dog = dog
        self._on_late = on_late
        self._deadline_s = math.inf
        self.is_late = False

    def arm(self, timeout_s: float) -> None:
        """Has `on_late` run unless `disarm` comes within so many seconds."""
        self._deadline_s = time.monotonic() + timeout_s
        self._dog.look_at(self._deadline_s)

    def disarm(self) -> None:
        """What was waited for has come."""
        self._deadline_s = math.inf


class Watchdog:
    """One thread for the deadlines of all streams of a client; it sleeps until the earliest.

    A request costs two assignments: the thread is woken only for a deadline before the one that
    it sleeps to.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: dict[Guard, None] = {}
        self._wake_s = math.inf
        self._thread: threading.Thread | None = None

    def watch(self, on_late: Callable[[], object]) -> Guard:
        """A guard, until `forget`.

        Args:
            on_late: Runs in the watchdog's thread, once, when a deadline passes.
        """
        guard = Guard(self, on_late)
        with self._changed:
            self._guards[guard] = None
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="polarcache-watchdog", daemon=True
                )
                self._thread.start()
        return guard

    def forget(self, guard: Guard) -> None:
        """Ends a guard."""
        with self._changed:
            self._guards.pop(guard, None)
            self._changed.notify()

    def look_at(self, deadline_s: float) -> None:
        """Wakes the thread if it would sleep past a deadline."""
        if deadline_s < self._wake_s:
            with self._changed:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._guards:
                    self._thread = None
                    return
                now_s = time.monotonic()
                # Before the deadlines are read: one that is set meanwhile wakes the thread again.
                self._wake_s = now_s + _LONGEST_SLEEP_S
                late = [guard for guard in self._guards if guard._deadline_s <= now_s]
                for guard in late:
                    del self._guards[guard]
                self._wake_s = min([self._wake_s, *(guard._deadline_s for guard in self._guards)])
                if not late:
                    self._changed.wait(self._wake_s - now_s)
            for guard in late:
                guard.is_late = True
                guard._on_late()
