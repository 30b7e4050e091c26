"""How blocks travel: over the local socket where there is one, else over gRPC streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from polarcache.client._grpc_streams import StoreStreams, run_retrieve
from polarcache.client._local import LocalConnection, LocalPool
from polarcache.client._retrieve_call import RetrieveCall
from polarcache.client._store_call import StoreCall
from polarcache.client._types import StoreResult
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["BlockTransport"]


class BlockTransport:
    """Runs store and retrieve calls. Thread-safe.

    Args:
        channel: The gRPC channel to the service.
        timeout_s: Deadline of a call, seconds.
        shared_memory_bytes: Memory to share with a service on the same host; 0 for none.
    """

    def __init__(self, channel: grpc.Channel, timeout_s: float, shared_memory_bytes: int) -> None:
        self._timeout_s = timeout_s
        self._shared_memory_bytes = shared_memory_bytes
        # No serializers: frames are bytes.
        self._stores = StoreStreams(channel.stream_stream("/polarcache.v1.KvCache/Store"))
        self._retrieve_stream = channel.unary_stream("/polarcache.v1.KvCache/Retrieve")
        self._lock = threading.Lock()
        self._service: pb.DescribeResponse | None = None
        self._local: LocalPool | None = None

    def service(self, describe: Callable[[], pb.DescribeResponse]) -> pb.DescribeResponse:
        """What the service told of itself when it was first met.

        Then shared memory is set up as well, so that the first transfer need not.
        """
        service = self._service
        if service is not None:
            return service
        service = describe()
        pool = None
        with self._lock:
            if self._service is None:
                self._service = service
                pool = self._local = LocalPool(service, self._shared_memory_bytes)
        if pool is not None and (connection := pool.borrow()) is not None:
            pool.give_back(connection)
        return service

    def forget_service(self) -> None:
        """Has it be met anew: it restarted, or the client closes."""
        with self._lock:
            local, self._local, self._service = self._local, None, None
        if local is not None:
            local.close()
        self._stores.close()

    def local_address(self) -> tuple[str, str] | None:
        """Socket and boot id of a service on the same host; None where memory is not shared."""
        pool = self._local
        return pool.address() if pool else None

    def store(self, call: StoreCall) -> StoreResult:
        """Runs a store.

        Raises:
            PolarCacheError: The call failed.
        """
        with self._local_connection(call.slice_bytes) as local:
            if local is not None:
                call.use_slots(local.slots)
                return local.store(call, self._timeout_s)
            return self._stores.store(call, self._timeout_s)

    @contextmanager
    def retrieving(self, call: RetrieveCall) -> Iterator[Iterator[None]]:
        """Runs a retrieve: its header has come; the iterator receives the rest.

        Raises:
            PolarCacheError: The call failed.
        """
        with self._local_connection(call.slice_bytes) as local:
            if local is not None:
                call.use_slots(local.slots)
                received = local.retrieve(call, self._timeout_s)
            else:
                received = run_retrieve(self._retrieve_stream, call, self._timeout_s)
            next(received)
            yield received
            call.finish()

    @contextmanager
    def _local_connection(self, slice_bytes: int) -> Iterator[LocalConnection | None]:
        """A connection with shared memory for one call, if one is to be had."""
        pool = self._local
        local = pool.borrow() if pool and pool.slot_bytes >= slice_bytes else None
        if pool is None or local is None:
            yield None
            return
        try:
            yield local
        except BaseException:
            pool.drop(local)
            raise
        pool.give_back(local)
