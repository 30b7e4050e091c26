"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from polarcache.client._attend import AttendOpener, AttendSpec, AttendStream
from polarcache.client._channel import DEFAULT_ENDPOINT, channel_options, grpc_target
from polarcache.client._messages import clear_request, lookup_request, match_of, namespace_of
from polarcache.client._retrieve_call import RetrieveCall, receive_layers
from polarcache.client._slices import PackedSlices, RawSlices
from polarcache.client._store_call import StoreCall
from polarcache.client._transport import BlockTransport
from polarcache.client._types import (
    LayerTensors,
    Match,
    Namespace,
    PackWhere,
    Retrieved,
    RetrievedPacked,
    StoreResult,
    Tier,
)
from polarcache.proto.errors import NamespaceUnknownError
from polarcache.proto.frames import Buffer
from polarcache.proto.layout import NamespaceSpec
from polarcache.proto.status import error_from_rpc
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs

__all__ = ["Client"]

ResultT = TypeVar("ResultT")


class Client:
    """Talks to one cache service. Thread-safe.

    Every method ends within its deadline and raises a `PolarCacheError` when it fails. A service
    that restarted is noticed and its namespaces are opened again.

    Args:
        endpoint: `grpc://host:port` or `grpc+unix:///path`.
        timeout_s: Deadline of calls that move no blocks, seconds.
        transfer_timeout_s: Deadline of calls that do, seconds.
        shared_memory_bytes: Memory to share with a service on the same host; 0 for none.

    Raises:
        InvalidRequestError: The endpoint is malformed.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        timeout_s: float = 5.0,
        transfer_timeout_s: float = 60.0,
        shared_memory_bytes: int = 64 << 20,
    ) -> None:
        self._timeout_s = timeout_s
        self._transfer_timeout_s = transfer_timeout_s
        self._channel = grpc.insecure_channel(grpc_target(endpoint), options=channel_options())
        self._stub = stubs.KvCacheStub(self._channel)
        self._admin = stubs.KvCacheAdminStub(self._channel)
        self._transport = BlockTransport(self._channel, transfer_timeout_s, shared_memory_bytes)
        self._attention = AttendOpener(self._channel, self._transport, transfer_timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls under way fail."""
        self._channel.close()
        self._transport.forget_service()

    def describe(self) -> pb.DescribeResponse:
        """Who the service is, what it accepts and how well it is."""
        return self._unary(self._stub.Describe, pb.DescribeRequest())

    def open_namespace(self, spec: NamespaceSpec) -> Namespace:
        """Registers a namespace.

        Args:
            spec: Its definition.

        Raises:
            InvalidRequestError: The profile is unknown or does not fit the geometry.
            LayoutMismatchError: The model identity was opened with another geometry.
        """
        self._transport.service(self.describe)
        request = pb.OpenNamespaceRequest(namespace=spec.to_proto())
        return namespace_of(spec, self._unary(self._stub.OpenNamespace, request))

    def lookup(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        *,
        lease_ms: int = 0,
        lease: bool = True,
    ) -> Match:
        """The longest stored prefix.

        Args:
            namespace: Namespace of the blocks.
            block_keys: Keys from token 0 on.
            lease_ms: Wanted life of the lease, milliseconds; 0 for the service's default.
            lease: Whether to take a lease, without which the blocks cannot be read.
        """
        request = lookup_request(namespace, block_keys, lease_ms, lease=lease)
        response = self._reopening(namespace, lambda: self._unary(self._stub.Lookup, request))
        return match_of(namespace, response)

    def release(self, match: Match) -> None:
        """Gives a match's lease back before it expires."""
        if match.lease_id:
            request = pb.ReleaseLeaseRequest(lease_id=match.lease_id)
            self._unary(self._stub.ReleaseLease, request)

    def store(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        layers: Sequence[tuple[Any, Any]],
        *,
        pack: PackWhere = "service",
        durable: bool = False,
    ) -> StoreResult:
        """Stores the blocks of consecutive tokens.

        A block becomes visible when all of it has arrived and its checksums hold, and never
        before the blocks before it. What does not fit an eighth of the service's memory goes in
        several calls, each of which makes all of its blocks visible at once.

        Args:
            namespace: Namespace of the blocks.
            block_keys: Their keys.
            layers: For each layer K [T, Hkv, D] and V [T, Hkv, Dv] in the namespace's dtype,
                T = len(block_keys) * block_tokens; torch tensors, or C-contiguous buffers.
            pack: Where the codec runs; "worker" sends packed bytes.
            durable: Whether to wait until Redis confirmed the blocks.

        Raises:
            LayoutMismatchError: The tensors do not fit the namespace.
            NonFiniteError: Keys or values hold NaN, infinity, or what the codec cannot carry.
            CapacityError: There is no room.
            TierUnavailableError: `durable`, and Redis did not confirm.
        """
        if pack == "worker":
            from polarcache.client.codec import pack_blocks

            return self.store_packed(
                namespace, block_keys, pack_blocks(namespace, layers), durable=durable
            )
        slices = RawSlices(namespace.spec.layout, len(block_keys), layers)
        return self._reopening(
            namespace, lambda: self._store(namespace, block_keys, slices, durable=durable)
        )

    def store_packed(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        blocks: Sequence[Buffer],
        *,
        durable: bool = False,
    ) -> StoreResult:
        """Stores packed blocks, as `polarcache.client.codec.pack_blocks` makes them.

        Args:
            namespace: Namespace of the blocks.
            block_keys: Their keys.
            blocks: One buffer of `namespace.packed_block_bytes` bytes a block.
            durable: Whether to wait until Redis confirmed the blocks.

        Raises:
            LayoutMismatchError: A buffer is of another length.
            CapacityError: There is no room.
            TierUnavailableError: `durable`, and Redis did not confirm.
        """
        layout = namespace.spec.layout
        slices = PackedSlices(layout.num_layers, namespace.packed_slice_bytes, blocks)
        return self._reopening(
            namespace, lambda: self._store(namespace, block_keys, slices, durable=durable)
        )

    def retrieve(
        self,
        match: Match,
        *,
        first_block: int = 0,
        num_blocks: int | None = None,
        out: Sequence[tuple[Any, Any]] | None = None,
        pack: PackWhere = "service",
    ) -> Retrieved:
        """Reads leased blocks.

        Args:
            match: From `lookup`.
            first_block: First block to read.
            num_blocks: Blocks to read; None for all from there on.
            out: For each layer where to write K [T, Hkv, D] and V [T, Hkv, Dv], T = the asked
                blocks' tokens: contiguous CPU tensors of the namespace's dtype, or writable
                buffers of that size. None to allocate. Saves the page faults of fresh memory.
            pack: Where the codec runs; "worker" receives packed bytes.

        Returns:
            Keys and values of the leading blocks that are still there.

        Raises:
            LeaseExpiredError: Look up again.
            BlockCorruptError: Bytes were damaged on their way; nothing is returned.
        """
        layout = match.namespace.spec.layout
        if pack == "worker":
            from polarcache.client.codec import unpack_blocks

            packed = self.retrieve_packed(match, first_block=first_block, num_blocks=num_blocks)
            layers = unpack_blocks(match.namespace, packed.blocks, out)
            count, reason = len(packed.blocks), packed.miss_reason
        else:
            call = RetrieveCall(match, first_block, num_blocks, packed=False)
            with self._transport.retrieving(call) as rest:
                layers = receive_layers(call, out)
                for _ in rest:
                    pass
            count, reason = call.num_blocks, call.miss_reason
        return Retrieved(layers, count, count * layout.block_tokens, reason)

    def retrieve_layers(
        self, match: Match, *, first_block: int = 0, num_blocks: int | None = None
    ) -> Generator[LayerTensors, None, None]:
        """Like `retrieve`, but yields K and V of each layer as soon as the layer has come.

        The tensors hold the leading blocks that are still there, possibly none. When the call
        fails in between, the error is raised in place of the next layer.
        """
        call = RetrieveCall(match, first_block, num_blocks, packed=False)
        with self._transport.retrieving(call) as rest:
            layers = receive_layers(call, None)
            num_yielded = 0
            while num_yielded < len(layers):
                while num_yielded < call.layers_done:
                    yield layers[num_yielded]
                    num_yielded += 1
                next(rest, None)

    def retrieve_packed(
        self,
        match: Match,
        *,
        first_block: int = 0,
        num_blocks: int | None = None,
        out: Sequence[Buffer] | None = None,
    ) -> RetrievedPacked:
        """Like `retrieve`, but returns the blocks in packed form.

        `out` has a writable buffer of `namespace.packed_block_bytes` bytes for each asked block.
        """
        namespace = match.namespace
        call = RetrieveCall(match, first_block, num_blocks, packed=True)
        with self._transport.retrieving(call) as rest:
            if out is None:
                out = [bytearray(namespace.packed_block_bytes) for _ in range(call.num_blocks)]
            blocks = out[: call.num_blocks]
            num_layers = namespace.spec.layout.num_layers
            slice_bytes = namespace.packed_slice_bytes
            call.write_to(PackedSlices(num_layers, slice_bytes, blocks, writable=True))
            for _ in rest:
                pass
        return RetrievedPacked(blocks, call.miss_reason)

    def attend(
        self,
        match: Match,
        *,
        query_heads: int,
        query_dtype: str = "",
        prefix_tokens: int = 0,
        scale: float = 0.0,
        soft_cap: float = 0.0,
        window: int = 0,
        sink_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> AttendStream:
        """Opens a stream over which to attend to a prefix that stays in the service.

        Blocks that only Redis holds are brought into memory; all are held there, and the lease
        does not expire, until the stream is closed.

        Args:
            match: From `lookup`, with a lease.
            query_heads: Query heads on this rank, a multiple of the namespace's KV heads.
            query_dtype: "float16", "bfloat16" or "float32"; "" for the namespace's dtype.
            prefix_tokens: Tokens of the match to attend to; 0 for all.
            scale: Factor on q.k before the softmax; 0 for 1 / sqrt(head_dim).
            soft_cap: Scores become cap * tanh(score / cap); 0 for no cap.
            window: A query at position p sees stored tokens after p - window alone; 0 for all.
            sink_tokens: First stored tokens that are seen outside of the window too.
            timeout_s: Deadline of each request, seconds; None for the client's.

        Raises:
            InvalidRequestError: An argument is out of range, or the match has no lease.
            LeaseExpiredError: Look up again.
            BlockNotFoundError: A block is gone; the message names it.
        """
        self._transport.service(self.describe)
        spec = AttendSpec(
            match, query_heads, query_dtype, prefix_tokens, scale, soft_cap, window, sink_tokens
        )
        return self._attention.open(spec, timeout_s or self._timeout_s)

    def delete(self, namespace: Namespace, block_keys: Sequence[bytes]) -> int:
        """Removes blocks from every tier; how many were in one."""
        request = pb.DeleteRequest(namespace_id=namespace.namespace_id, block_keys=block_keys)
        response = self._reopening(namespace, lambda: self._unary(self._stub.Delete, request))
        return int(response.num_deleted)

    def stats(self) -> pb.StatsResponse:
        """Counters and gauges of the service."""
        return self._unary(self._stub.Stats, pb.StatsRequest())

    def list_namespaces(self) -> Sequence[pb.NamespaceInfo]:
        """Namespaces opened since the service started. For operators."""
        request = pb.ListNamespacesRequest()
        return self._unary(self._admin.ListNamespaces, request).namespaces

    def clear(
        self, namespace: Namespace | None = None, *, tiers: Sequence[Tier] = ()
    ) -> pb.ClearResponse:
        """Removes all blocks, or one namespace's, from the tiers; none named means all.

        For operators.
        """
        return self._unary(self._admin.Clear, clear_request(namespace, tiers))

    def set_memory_limit(self, limit_bytes: int) -> pb.SetMemoryLimitResponse:
        """Sets the bytes that the memory tier may use; 0 restores all. For operators."""
        request = pb.SetMemoryLimitRequest(limit_bytes=limit_bytes)
        return self._unary(self._admin.SetMemoryLimit, request, self._transfer_timeout_s)

    # -- inside -----------------------------------------------------------------------------

    def _store(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        slices: RawSlices | PackedSlices,
        *,
        durable: bool,
    ) -> StoreResult:
        """Stores in batches that take no more than an eighth of the service's memory each."""
        limits = self._transport.service(self.describe).limits
        per_batch = limits.memory_bytes // 8 // namespace.packed_block_bytes
        per_batch = max(1, min(per_batch, limits.max_blocks_per_call))
        total = StoreResult(0, 0, 0)
        for start in range(0, len(block_keys), per_batch):
            call = StoreCall(
                namespace,
                block_keys[start : start + per_batch],
                slices,
                first_block=start,
                frame_bytes=limits.frame_bytes,
                durable=durable,
            )
            total += self._transport.store(call)
        if per_batch < len(block_keys) <= limits.max_blocks_per_call:
            # Has the service count the prefix as used in whole, so that its end is evicted first.
            self.lookup(namespace, block_keys, lease=False)
        return total

    def _reopening(self, namespace: Namespace, call: Callable[[], ResultT]) -> ResultT:
        """Makes a call; opens the namespace again and repeats it if the service restarted."""
        try:
            return call()
        except NamespaceUnknownError:
            self._transport.forget_service()
            self.open_namespace(namespace.spec)
            return call()

    def _unary(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
