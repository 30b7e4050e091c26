"""RPC handlers: message in, store or codec call, message out. No policy lives here.

`Store` and `Retrieve` see raw frames and live in `polarcache.cache_service.streams`; the others
see parsed messages. Errors leave as exceptions; `polarcache.cache_service.rpc` turns them into
status.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import TypeAlias

import grpc

from polarcache.cache_service.attend_streams import AttendStreams
from polarcache.cache_service.attention import Attention
from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.local import LocalSocket
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import NamespaceRegistry
from polarcache.cache_service.store import BlockStore, Found
from polarcache.cache_service.streams import BlockStreams
from polarcache.cache_service.tiers.redis import RedisTier
from polarcache.cache_service.transfers import Transfers, check_keys
from polarcache.cache_service.workers import Workers
from polarcache.kernels.layout import LAYOUT_VERSION
from polarcache.kernels.profile import KEY_CODECS, VALUE_CODECS
from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.keys import MAX_BLOCK_KEY_BYTES
from polarcache.proto.layout import NamespaceSpec
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["KvCacheServicer"]

Context: TypeAlias = grpc.aio.ServicerContext


class KvCacheServicer:
    """The `KvCache` and `KvCacheAdmin` services.

    Args:
        config: Settings.
        store: The store.
        namespaces: The namespaces.
        redis: The Redis tier, or None; asked for its health only.
        local: The local socket, or None.
        counters: Where to count.
        transfers: Begins stores and retrieves.
        attention: Opens prefixes to attend to.
        workers: Threads for what takes time.
        boot_id: Random for each start.
        device: Name of the memory tier's device.
    """

    def __init__(
        self,
        config: ServiceConfig,
        store: BlockStore,
        namespaces: NamespaceRegistry,
        redis: RedisTier | None,
        local: LocalSocket | None,
        counters: Counters,
        transfers: Transfers,
        attention: Attention,
        workers: Workers,
        boot_id: str,
        device: str,
    ) -> None:
        self._config = config
        self._store = store
        self._namespaces = namespaces
        self._redis = redis
        self._local = local
        self._counters = counters
        self._boot_id = boot_id
        self._device = device
        self._start_s = time.monotonic()
        self.draining = False
        self._workers = workers
        self._streams = BlockStreams(config, transfers, workers)
        self._attention = attention
        self._attend_streams = AttendStreams(config, attention, workers)

    def drain(self) -> None:
        """Refuses new calls, lets those that run end, and ends the streams that attend."""
        self.draining = True
        self._streams.drain()
        self._attend_streams.drain()

    # -- workers ----------------------------------------------------------------------------

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """Says who the service is."""
        config = self._config
        reasons = self.health_reasons()
        health = pb.HEALTH_STATUS_DEGRADED if reasons else pb.HEALTH_STATUS_OK
        return pb.DescribeResponse(
            version=version("polarcache"),
            boot_id=self._boot_id,
            device=self._device,
            layout_version=LAYOUT_VERSION,
            key_codecs=KEY_CODECS,
            value_codecs=VALUE_CODECS,
            limits=pb.Limits(
                max_block_key_bytes=MAX_BLOCK_KEY_BYTES,
                max_blocks_per_call=config.max_blocks_per_call,
                max_message_bytes=config.max_message_bytes,
                frame_bytes=config.frame_bytes,
                memory_bytes=self._store.memory.capacity_bytes,
                max_lease_ms=config.max_lease_ms,
            ),
            health=pb.HEALTH_STATUS_DRAINING if self.draining else health,
            health_reasons=reasons,
            local_socket=str(self._local.path) if self._local else "",
        )

    async def OpenNamespace(
        self, request: pb.OpenNamespaceRequest, context: Context
    ) -> pb.OpenNamespaceResponse:
        """Registers a namespace."""
        spec = NamespaceSpec.from_proto(request.namespace)
        namespace = await self._workers.cpu(self._namespaces.open, spec)
        codec = namespace.codec
        return pb.OpenNamespaceResponse(
            namespace_id=namespace.namespace_id,
            profile=namespace.spec.profile,
            raw_slice_bytes=codec.slice_bytes(packed=False),
            packed_slice_bytes=codec.slice_bytes(packed=True),
            key_bits=float(codec.packed.key_bits),
            value_bits=float(codec.packed.value_bits),
            boot_id=self._boot_id,
        )

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        """Finds and leases the longest stored prefix."""
        namespace = self._namespaces.get(request.namespace_id)
        keys = check_keys(request.block_keys, self._config.max_blocks_per_call)
        lease_ms = min(request.lease_ms or self._config.lease_ms, self._config.max_lease_ms)
        lease_s = None if request.no_lease else lease_ms / 1000
        found = await self._workers.io_owned(
            self._forget_lease, self._store.lookup, namespace, keys, lease_s
        )
        return pb.LookupResponse(
            tiers=[pb.TIER_MEMORY if here else pb.TIER_REDIS for here in found.in_memory],
            lease_id=found.lease.lease_id if found.lease else b"",
            lease_ms=lease_ms if found.lease else 0,
            partial=found.partial,
        )

    async def Store(self, request: AsyncIterator[bytes], context: Context) -> None:
        """Takes blocks."""
        await self._streams.store(context)

    async def Retrieve(self, request: AsyncIterator[bytes], context: Context) -> None:
        """Sends blocks."""
        await self._streams.retrieve(context)

    async def Attend(self, request: AsyncIterator[bytes], context: Context) -> None:
        """Attends to a prefix."""
        await self._attend_streams.attend(context)

    async def AttendLayer(
        self, request: pb.AttendLayerRequest, context: Context
    ) -> pb.AttendLayerResponse:
        """Attends to one layer of a prefix."""
        return await self._attend_streams.attend_layer(request)

    async def ReleaseLease(
        self, request: pb.ReleaseLeaseRequest, context: Context
    ) -> pb.ReleaseLeaseResponse:
        """Gives a lease back."""
        self._store.memory.release(request.lease_id)
        return pb.ReleaseLeaseResponse()

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        """Removes blocks."""
        namespace = self._namespaces.get(request.namespace_id)
        keys = check_keys(request.block_keys, self._config.max_blocks_per_call)
        num_deleted = await self._workers.io(self._store.delete, namespace, keys)
        return pb.DeleteResponse(num_deleted=num_deleted)

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        """Tells counters and gauges."""
        gauges = self._store.memory.gauges() | self._attention.batcher.gauges()
        if self._local is not None:
            gauges |= self._local.gauges()
        if self._redis is not None:
            gauges["redis_up"] = int(self._redis.down_reason is None)
        counters = self._counters.snapshot()
        counters["leases_expired_total"] = self._store.memory.leases_expired
        return pb.StatsResponse(
            counters=counters,
            gauges=gauges,
            boot_id=self._boot_id,
            uptime_s=time.monotonic() - self._start_s,
        )

    # -- operator ---------------------------------------------------------------------------

    async def ListNamespaces(
        self, request: pb.ListNamespacesRequest, context: Context
    ) -> pb.ListNamespacesResponse:
        """Lists the open namespaces."""
        counts = self._store.memory.blocks_by_namespace()
        infos = []
        for namespace in self._namespaces.all():
            message = namespace.spec.to_proto()
            message.ClearField("salt")
            message.ClearField("calibration")
            infos.append(
                pb.NamespaceInfo(
                    namespace_id=namespace.namespace_id,
                    namespace=message,
                    memory_blocks=counts.get(namespace.namespace_id, 0),
                    packed_block_bytes=namespace.codec.packed_block_bytes,
                )
            )
        return pb.ListNamespacesResponse(namespaces=infos)

    async def Clear(self, request: pb.ClearRequest, context: Context) -> pb.ClearResponse:
        """Removes all blocks, or one namespace's."""
        if request.namespace_id and len(request.namespace_id) != 16:
            raise InvalidRequestError(
                f"namespace_id must be 16 bytes or empty, got {len(request.namespace_id)}"
            )
        memory = not request.tiers or pb.TIER_MEMORY in request.tiers
        redis = not request.tiers or pb.TIER_REDIS in request.tiers
        num_blocks, num_records = await self._workers.io(
            lambda: self._store.clear(request.namespace_id or None, memory=memory, redis=redis)
        )
        return pb.ClearResponse(memory_blocks=num_blocks, redis_records=num_records)

    async def SetMemoryLimit(
        self, request: pb.SetMemoryLimitRequest, context: Context
    ) -> pb.SetMemoryLimitResponse:
        """Sets the bytes that memory may use."""
        capacity = self._store.memory.capacity_bytes
        await self._workers.io(self._store.set_limit, request.limit_bytes or capacity)
        gauges = self._store.memory.gauges()
        return pb.SetMemoryLimitResponse(
            limit_bytes=gauges["memory_limit_bytes"], used_bytes=gauges["memory_used_bytes"]
        )

    # -- inside -----------------------------------------------------------------------------

    def health_reasons(self) -> list[str]:
        """Why the service is not well; empty when it is."""
        if self._redis is not None and self._redis.down_reason is not None:
            return [f"redis: {self._redis.down_reason}"]
        return []

    def _forget_lease(self, found: Found) -> None:
        if found.lease is not None:
            self._store.memory.release(found.lease.lease_id)
