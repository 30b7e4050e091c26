"""The asyncio client: the blocking one, method for method, in threads of its own.

Threads rather than `grpc.aio`: there a write that fails because the service refused the call
hides the refusal, and copying blocks would hold up the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from polarcache.client._async_attend import AsyncAttendStream
from polarcache.client._channel import DEFAULT_ENDPOINT
from polarcache.client._sync import Client
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
from polarcache.proto.frames import Buffer
from polarcache.proto.layout import NamespaceSpec
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["AsyncClient"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
_MAX_THREADS = 16


class AsyncClient:
    """`Client` for asyncio: the same methods, parameters, results and errors.

    A call whose task is cancelled ends in its thread, at its deadline at the latest; its result
    is dropped. At most 16 calls run at once, further ones wait.

    Args:
        endpoint: As for `Client`.
        timeout_s: As for `Client`.
        transfer_timeout_s: As for `Client`.
        shared_memory_bytes: As for `Client`.

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
        self._client = Client(
            endpoint,
            timeout_s=timeout_s,
            transfer_timeout_s=transfer_timeout_s,
            shared_memory_bytes=shared_memory_bytes,
        )
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="polarcache-client")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Client.close`."""
        self._client.close()
        self._threads.shutdown(wait=False)

    async def describe(self) -> pb.DescribeResponse:
        """See `Client.describe`."""
        return await self._run(self._client.describe)

    async def open_namespace(self, spec: NamespaceSpec) -> Namespace:
        """See `Client.open_namespace`."""
        return await self._run(self._client.open_namespace, spec)

    async def lookup(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        *,
        lease_ms: int = 0,
        lease: bool = True,
    ) -> Match:
        """See `Client.lookup`."""
        return await self._run(
            self._client.lookup, namespace, block_keys, lease_ms=lease_ms, lease=lease
        )

    async def release(self, match: Match) -> None:
        """See `Client.release`."""
        await self._run(self._client.release, match)

    async def store(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        layers: Sequence[tuple[Any, Any]],
        *,
        pack: PackWhere = "service",
        durable: bool = False,
    ) -> StoreResult:
        """See `Client.store`."""
        return await self._run(
            self._client.store, namespace, block_keys, layers, pack=pack, durable=durable
        )

    async def store_packed(
        self,
        namespace: Namespace,
        block_keys: Sequence[bytes],
        blocks: Sequence[Buffer],
        *,
        durable: bool = False,
    ) -> StoreResult:
        """See `Client.store_packed`."""
        return await self._run(
            self._client.store_packed, namespace, block_keys, blocks, durable=durable
        )

    async def retrieve(
        self,
        match: Match,
        *,
        first_block: int = 0,
        num_blocks: int | None = None,
        out: Sequence[tuple[Any, Any]] | None = None,
        pack: PackWhere = "service",
    ) -> Retrieved:
        """See `Client.retrieve`."""
        return await self._run(
            self._client.retrieve,
            match,
            first_block=first_block,
            num_blocks=num_blocks,
            out=out,
            pack=pack,
        )

    async def retrieve_layers(
        self, match: Match, *, first_block: int = 0, num_blocks: int | None = None
    ) -> AsyncIterator[LayerTensors]:
        """See `Client.retrieve_layers`."""
        layers = self._client.retrieve_layers(match, first_block=first_block, num_blocks=num_blocks)
        try:
            while (layer := await self._run(next, layers, None)) is not None:
                yield layer
        finally:
            await self._run(layers.close)

    async def retrieve_packed(
        self,
        match: Match,
        *,
        first_block: int = 0,
        num_blocks: int | None = None,
        out: Sequence[Buffer] | None = None,
    ) -> RetrievedPacked:
        """See `Client.retrieve_packed`."""
        return await self._run(
            self._client.retrieve_packed,
            match,
            first_block=first_block,
            num_blocks=num_blocks,
            out=out,
        )

    async def attend(
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
    ) -> AsyncAttendStream:
        """See `Client.attend`; use it as `async with await client.attend(...) as stream`."""
        stream = await self._run(
            self._client.attend,
            match,
            query_heads=query_heads,
            query_dtype=query_dtype,
            prefix_tokens=prefix_tokens,
            scale=scale,
            soft_cap=soft_cap,
            window=window,
            sink_tokens=sink_tokens,
            timeout_s=timeout_s,
        )
        return AsyncAttendStream(stream, self._run)

    async def delete(self, namespace: Namespace, block_keys: Sequence[bytes]) -> int:
        """See `Client.delete`."""
        return await self._run(self._client.delete, namespace, block_keys)

    async def stats(self) -> pb.StatsResponse:
        """See `Client.stats`."""
        return await self._run(self._client.stats)

    async def list_namespaces(self) -> Sequence[pb.NamespaceInfo]:
        """See `Client.list_namespaces`."""
        return await self._run(self._client.list_namespaces)

    async def clear(
        self, namespace: Namespace | None = None, *, tiers: Sequence[Tier] = ()
    ) -> pb.ClearResponse:
        """See `Client.clear`."""
        return await self._run(self._client.clear, namespace, tiers=tiers)

    async def set_memory_limit(self, limit_bytes: int) -> pb.SetMemoryLimitResponse:
        """See `Client.set_memory_limit`."""
        return await self._run(self._client.set_memory_limit, limit_bytes)

    async def _run(
        self, method: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        return await asyncio.wrap_future(self._threads.submit(method, *args, **kwargs))
