"""A store as an engine's cache backend sees it: there or away, never in the way.

What both the SGLang and the LMCache integration need: blocks that lie scattered in the engine's
host memory go to the service and come back, and whatever the service does the caller gets an
answer within a deadline, never an exception.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from polarcache.client._scratch import BlockTensors, Scratch
from polarcache.client._sync import Client
from polarcache.client._types import Match, Namespace, PackWhere
from polarcache.proto.errors import DeadlineError, PolarCacheError, ServiceUnavailableError
from polarcache.proto.layout import NamespaceSpec

__all__ = ["BlockTensors", "EngineStore", "StoreLimits"]

_log = logging.getLogger(__name__)

# Blocks go to the wire and back through a buffer of about this size, so that a call of thousands of
# blocks does not take their size in memory again.
_SCRATCH_BYTES = 64 << 20
# Keys in one lookup, fewer than any service refuses.
_LOOKUP_KEYS = 4096
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How long an engine waits for a store, and what it shares with it.

    Attributes:
        lookup_timeout_s: A lookup without an answer by then is a miss, seconds.
        transfer_timeout_s: A load or store that is not done by then is given up, seconds.
        retry_s: So long a store that was away is left alone, seconds.
        pack: Where the codec runs; "worker" sends packed bytes.
        shared_memory_bytes: Memory to share with a service on the same host; 0 for none.
    """

    lookup_timeout_s: float = 0.5
    transfer_timeout_s: float = 10.0
    retry_s: float = 2.0
    pack: PackWhere = "service"
    shared_memory_bytes: int = 64 << 20


class EngineStore:
    """Moves an engine's blocks to a service and back. Thread-safe; no call raises but `check`.

    A call that finds the store away is a miss, and for `retry_s` after it every call is one at
    once. `load` and `save` end after at most twice `transfer_timeout_s`.

    Args:
        endpoint: `grpc://host:port` or `grpc+unix:///path`.
        limits: Deadlines and resources.
        clock: Seconds, for tests.

    Raises:
        InvalidRequestError: The endpoint is malformed.
    """

    def __init__(
        self,
        endpoint: str,
        limits: StoreLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._clock = clock
        self._client = Client(
            endpoint,
            timeout_s=limits.lookup_timeout_s,
            transfer_timeout_s=limits.transfer_timeout_s,
            shared_memory_bytes=limits.shared_memory_bytes,
        )
        self._namespaces: dict[NamespaceSpec, Namespace] = {}
        self._away_until_s = 0.0
        self._is_away = False
        self._is_closed = False
        self._load_scratch = Scratch(_SCRATCH_BYTES)
        self._save_scratch = Scratch(_SCRATCH_BYTES)

    def check(self, spec: NamespaceSpec) -> None:
        """Opens a namespace, so that a wrong configuration is found when the engine starts.

        A store that is away is logged and looked for again later.

        Raises:
            PolarCacheError: The service refuses the namespace; the message says why.
        """
        try:
            self._namespace(spec)
        except (DeadlineError, ServiceUnavailableError) as error:
            self._lost(error)

    def count(self, spec: NamespaceSpec, keys: Sequence[bytes]) -> int:
        """How many leading blocks the store has; 0 when it is away.

        Args:
            spec: Their namespace.
            keys: Their keys.
        """

        def count() -> int:
            found = 0
            while found < len(keys):
                asked = keys[found : found + _LOOKUP_KEYS]
                match = self._client.lookup(self._namespace(spec), asked, lease=False)
                found += match.num_blocks
                if match.num_blocks < len(asked):
                    break
            return found

        return self._guarded("lookup", 0, count)

    def load(
        self, spec: NamespaceSpec, keys: Sequence[bytes], blocks: Sequence[BlockTensors]
    ) -> int:
        """Reads leading blocks into the engine's memory.

        Args:
            spec: Their namespace.
            keys: Their keys.
            blocks: Where each goes; those after the returned number may hold anything.

        Returns:
            How many leading blocks came, whole and checked; 0 when the store is away.
        """
        num_loaded = 0

        def load() -> int:
            nonlocal num_loaded
            match = self._client.lookup(self._namespace(spec), keys)
            try:
                for loaded in self._load_pieces(match, blocks):
                    num_loaded += loaded
            finally:
                self._release(match)
            return num_loaded

        self._guarded("load", 0, load)
        return num_loaded

    def save(
        self, spec: NamespaceSpec, keys: Sequence[bytes], blocks: Sequence[BlockTensors]
    ) -> int:
        """Stores blocks of the engine's memory.

        Args:
            spec: Their namespace.
            keys: Their keys.
            blocks: The blocks, which must not change until this returns.

        Returns:
            How many leading blocks the store has now; 0 when it is away.
        """
        num_saved = 0

        def save() -> int:
            nonlocal num_saved
            for saved in self._save_pieces(self._namespace(spec), keys, blocks):
                num_saved += saved
            return num_saved

        self._guarded("store", 0, save)
        return num_saved

    def delete(self, spec: NamespaceSpec, keys: Sequence[bytes]) -> int:
        """Removes blocks; how many were there."""
        return self._guarded("delete", 0, lambda: self._client.delete(self._namespace(spec), keys))

    def clear(self, spec: NamespaceSpec) -> bool:
        """Removes all blocks of a namespace; whether that was done."""

        def clear() -> bool:
            self._client.clear(self._namespace(spec))
            return True

        return self._guarded("clear", False, clear)

    @property
    def is_away(self) -> bool:
        """Whether the last call did not reach the store."""
        return self._is_away

    def close(self) -> None:
        """Closes the connection; calls under way and later ones are misses."""
        self._is_closed = True
        self._client.close()

    # -- inside -----------------------------------------------------------------------------

    def _namespace(self, spec: NamespaceSpec) -> Namespace:
        namespace = self._namespaces.get(spec)
        if namespace is None:
            namespace = self._client.open_namespace(spec)
            self._namespaces[spec] = namespace
        return namespace

    def _load_pieces(self, match: Match, blocks: Sequence[BlockTensors]) -> Iterator[int]:
        """Loads piece by piece until the deadline; yields how many blocks of each came."""
        end_s = self._clock() + self._limits.transfer_timeout_s
        done = 0
        while done < match.num_blocks and self._clock() < end_s:
            with self._load_scratch.of(match.namespace.spec.layout) as scratch:
                wanted = min(scratch.num_blocks, match.num_blocks - done)
                got = self._client.retrieve(
                    match,
                    first_block=done,
                    num_blocks=wanted,
                    out=scratch.layers(wanted),
                    pack=self._limits.pack,
                )
                scratch.write_to(blocks[done : done + got.num_blocks])
            done += got.num_blocks
            yield got.num_blocks
            if got.num_blocks < wanted:
                return

    def _save_pieces(
        self, namespace: Namespace, keys: Sequence[bytes], blocks: Sequence[BlockTensors]
    ) -> Iterator[int]:
        """Stores piece by piece until the deadline; yields how many blocks each has."""
        end_s = self._clock() + self._limits.transfer_timeout_s
        done = 0
        while done < len(keys) and self._clock() < end_s:
            with self._save_scratch.of(namespace.spec.layout) as scratch:
                piece = blocks[done : done + scratch.num_blocks]
                scratch.read_from(piece)
                self._client.store(
                    namespace,
                    keys[done : done + len(piece)],
                    scratch.layers(len(piece)),
                    pack=self._limits.pack,
                )
            done += len(piece)
            yield len(piece)

    def _release(self, match: Match) -> None:
        try:
            self._client.release(match)
        except PolarCacheError as error:
            # The lease ends by itself.
            _log.debug("release failed: %s: %s", type(error).__name__, error)

    def _guarded(self, what: str, missed: ResultT, call: Callable[[], ResultT]) -> ResultT:
        """Makes a call whose failure is a miss."""
        if self._is_closed or self._clock() < self._away_until_s:
            return missed
        try:
            result = call()
        except (DeadlineError, ServiceUnavailableError) as error:
            self._lost(error)
            return missed
        except PolarCacheError as error:
            _log.warning("PolarCache %s failed: %s: %s", what, type(error).__name__, error)
            return missed
        except ValueError:
            # What grpc raises on a channel that was closed in the meantime.
            if not self._is_closed:
                raise
            return missed
        if self._is_away:
            self._is_away = False
            _log.info("PolarCache at %s is there", self._endpoint)
        return result

    def _lost(self, error: PolarCacheError) -> None:
        self._away_until_s = self._clock() + self._limits.retry_s
        if not self._is_away and not self._is_closed:
            # Said once: an engine without a store is no reason to fill its log.
            self._is_away = True
            _log.warning(
                "PolarCache at %s is away: %s: %s", self._endpoint, type(error).__name__, error
            )
