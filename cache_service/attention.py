"""Attention over stored prefixes: what every way in shares.

The gRPC streams (`attend_streams.py`) and the local socket (`attend_local.py`) both open prefixes
and check requests here, and have the batcher compute them.
"""

from __future__ import annotations

from collections.abc import Callable

from polarcache.cache_service.attend_batcher import AttendBatcher
from polarcache.cache_service.attend_compute import AttendCompute
from polarcache.cache_service.attend_prefix import HeldPrefix, PrefixHolder
from polarcache.cache_service.attend_queries import AttendStream, Turn, WaitingQuery
from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import NamespaceRegistry
from polarcache.cache_service.store import BlockStore
from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.frames import Buffer
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["Attention", "OpenPrefix"]

_MAX_REQUEST_TOKENS = 512
_MAX_POSITION = 2**31 - 1 - _MAX_REQUEST_TOKENS


class OpenPrefix:
    """One stream's hold on a prefix, until `close`. Made by `Attention.open`.

    Attributes:
        prefix: The prefix.
        max_tokens: Most query tokens of one request.
    """

    def __init__(
        self,
        prefix: HeldPrefix,
        max_tokens: int,
        batcher: AttendBatcher,
        let_go: Callable[[HeldPrefix], None],
    ) -> None:
        self.prefix = prefix
        self.max_tokens = max_tokens
        self._batcher = batcher
        self._let_go = let_go
        self._turn: Turn | None = None
        self._num_layers = prefix.namespace.spec.layout.num_layers

    def ready(self) -> bytes:
        """The first frame to the worker."""
        ready = pb.AttendReady(
            prefix_tokens=self.prefix.num_tokens, max_request_tokens=self.max_tokens
        )
        return pb.AttendResponse(ready=ready).SerializeToString()

    def join(self, stream: AttendStream) -> None:
        """Says whose requests will come; before the first.

        Raises:
            ServiceUnavailableError: The service is shutting down.
        """
        self._turn = self._batcher.join(stream, self.prefix.kind)

    def submit(
        self,
        request_id: int,
        layer: int,
        num_tokens: int,
        position: int | None,
        timeout_ms: int,
        queries: Buffer,
        *,
        here: bool = False,
    ) -> bool:
        """Checks a request and has it computed; the stream is told of the answer.

        Args:
            request_id: As in AttendRequest.
            layer: As in AttendRequest.
            num_tokens: As in AttendRequest.
            position: As in AttendRequest, None where it is unset.
            timeout_ms: As in AttendRequest.
            queries: Bytes of the queries.
            here: Whether it may be computed in the calling thread, as for `AttendBatcher.submit`.

        Returns:
            Whether it was, so that the stream has been told.

        Raises:
            InvalidRequestError: A value is out of range.
            CapacityError: Too many requests wait.
            ServiceUnavailableError: The service is shutting down.
        """
        prefix = self.prefix
        if layer >= self._num_layers:
            raise InvalidRequestError(f"layer {layer}: the model has {self._num_layers} layers")
        if not 1 <= num_tokens <= self.max_tokens:
            raise InvalidRequestError(f"num_tokens {num_tokens}: expected 1 to {self.max_tokens}")
        expected = num_tokens * prefix.query_token_bytes
        if len(queries) != expected:
            raise InvalidRequestError(
                f"queries are {len(queries)} bytes: {num_tokens} tokens of "
                f"{prefix.kind.query_heads} heads in {prefix.kind.query_dtype} are {expected}"
            )
        if position is None:
            if prefix.kind.options.window:
                raise InvalidRequestError("position missing: expected it with a sliding window")
            position = 0
        if position > _MAX_POSITION:
            raise InvalidRequestError(f"position {position}: expected at most {_MAX_POSITION}")
        if self._turn is None:
            raise RuntimeError("submit before join")
        return self._batcher.submit(
            self._turn,
            WaitingQuery(prefix, layer, num_tokens, queries, position, request_id, timeout_ms),
            here=here,
        )

    def close(self) -> None:
        """Takes back the requests that wait, and lets go of the prefix when no launch reads it."""
        prefix, let_go = self.prefix, self._let_go
        if self._turn is None:
            let_go(prefix)
        else:
            self._batcher.leave(self._turn, lambda: let_go(prefix))


class Attention:
    """Opens prefixes. Thread-safe.

    Args:
        config: Settings.
        store: The store.
        namespaces: The namespaces.
        counters: Where to count.
    """

    def __init__(
        self,
        config: ServiceConfig,
        store: BlockStore,
        namespaces: NamespaceRegistry,
        counters: Counters,
    ) -> None:
        self._counters = counters
        self._holder = PrefixHolder(store, namespaces)
        self._max_bytes = config.max_message_bytes // 2
        pool = store.memory.pool_bytes
        self.batcher = AttendBatcher(
            lambda: AttendCompute.lanes(pool),
            counters,
            max_waiting=config.attend_queue,
            max_batch=config.attend_batch,
            window_us=config.attend_window_us,
        )

    def open(self, begin: pb.AttendBegin) -> OpenPrefix:
        """Holds a prefix; may wait on Redis.

        Raises:
            PolarCacheError: As `PrefixHolder.hold`.
        """
        prefix = self._holder.hold(begin)
        self._counters.add("attend_streams_opened_total")
        longest = max(prefix.query_token_bytes, prefix.answer_token_bytes)
        max_tokens = max(1, min(_MAX_REQUEST_TOKENS, self._max_bytes // longest))
        return OpenPrefix(prefix, max_tokens, self.batcher, self._holder.let_go)

    def close(self) -> None:
        """Refuses what waits and ends the thread."""
        self.batcher.close()
