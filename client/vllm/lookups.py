"""Lookups in the background: asked once a request, awaited step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from polarcache.client._types import Match, Namespace
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.link import StoreLink
from polarcache.client.vllm.plan import LeasedPrefix
from polarcache.proto.errors import PolarCacheError

__all__ = ["FoundPrefix", "Lookup", "Lookups"]

_log = logging.getLogger(__name__)
_THREADS = 4


@dataclass(frozen=True, slots=True)
class FoundPrefix:
    """A stored prefix that every rank holds a lease on.

    Attributes:
        matches: The match of each rank; none when nothing was found.
        until_s: When the leases are taken to be too old to begin a load, on the monotonic clock.
    """

    matches: tuple[Match, ...]
    until_s: float

    @property
    def num_blocks(self) -> int:
        """Stored blocks that every rank has."""
        return min((match.num_blocks for match in self.matches), default=0)

    def leased(self) -> tuple[LeasedPrefix, ...]:
        """The leases in the form in which they travel to the workers."""
        return tuple(
            LeasedPrefix(match.lease_id, match.lease_ms, match.num_blocks) for match in self.matches
        )


NOTHING = FoundPrefix((), float("inf"))


@dataclass(frozen=True, slots=True)
class Lookup:
    """A lookup under way or done.

    Attributes:
        future: Its result.
        deadline_s: When it counts as a miss, on the monotonic clock.
    """

    future: Future[FoundPrefix]
    deadline_s: float


class Lookups:
    """Looks prefixes up for all ranks, in threads. Only `wait` waits.

    Args:
        link: Connection to the store.
        config: The connector's options.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        link: StoreLink,
        config: ConnectorConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._timeout_s = config.lookup_timeout_ms / 1000
        self._lease_ms = config.lease_ms
        self._clock = clock
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="polarcache-lookup")

    def start(self, keys: Sequence[bytes]) -> Lookup:
        """Begins to look keys up."""
        future = self._threads.submit(self._look_up, list(keys))
        return Lookup(future, self._clock() + self._timeout_s)

    def result(self, lookup: Lookup) -> FoundPrefix | None:
        """What was found; None while it is not known. Too late or failed is nothing found."""
        if lookup.future.done():
            if (error := lookup.future.exception()) is None:
                return lookup.future.result()
            # Nothing that a store can cause; still no reason for the engine to die.
            _log.error("unexpected error in a lookup", exc_info=error)
            return NOTHING
        if self._clock() < lookup.deadline_s:
            return None
        _log.warning(
            "a lookup has no answer after %.0f ms (polarcache.lookup_timeout_ms): it is a miss",
            1000 * self._timeout_s,
        )
        self.drop(lookup)
        return NOTHING

    def wait(self, lookup: Lookup, timeout_s: float) -> None:
        """Waits until a lookup is done."""
        wait([lookup.future], timeout_s)

    def is_stale(self, found: FoundPrefix) -> bool:
        """Whether the leases are too old to begin a load with."""
        return self._clock() >= found.until_s

    def drop(self, lookup: Lookup) -> None:
        """Gives the leases of a lookup back, now or when it ends."""
        if not lookup.future.cancel():
            lookup.future.add_done_callback(self._release_found)

    def release(self, found: FoundPrefix) -> None:
        """Gives leases back, in the background."""
        for match in found.matches:
            try:
                self._threads.submit(self._release, match)
            except RuntimeError:  # Shut down: the leases end by themselves.
                return

    def close(self) -> None:
        """Ends the threads; calls under way end at their deadlines."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, keys: list[bytes]) -> FoundPrefix:
        matches: list[Match] = []
        began_s = self._clock()
        try:
            for namespace in self._link.namespaces:
                match = self._match(namespace, keys)
                matches.append(match)
                keys = keys[: match.num_blocks]
                if not keys:
                    break
        except PolarCacheError as error:
            _log.debug("lookup failed: %s: %s", type(error).__name__, error)
            self._link.failed(error)
            keys = []
        found = FoundPrefix(tuple(matches), began_s + self._lease_ms / 2000)
        if keys and matches:
            return found
        self.release(found)
        return NOTHING

    def _match(self, namespace: Namespace, keys: list[bytes]) -> Match:
        return self._link.client.lookup(namespace, keys, lease_ms=self._lease_ms)

    def _release_found(self, future: Future[FoundPrefix]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.release(future.result())

    def _release(self, match: Match) -> None:
        try:
            self._link.client.release(match)
        except PolarCacheError as error:
            _log.debug("release failed: %s: %s", type(error).__name__, error)
