"""Prefixes that streams attend to: checked, brought into memory, held there."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakSet, WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from polarcache.cache_service.leases import Lease
from polarcache.cache_service.namespaces import Namespace, NamespaceRegistry
from polarcache.cache_service.store import BlockStore, Pinned
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.kernels.errors import ShapeError
from polarcache.proto.errors import BlockNotFoundError, InvalidRequestError
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["AttendKind", "HeldPrefix", "PrefixHolder"]

_QUERY_DTYPES = {
    pb.DTYPE_FLOAT16: torch.float16,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_FLOAT32: torch.float32,
}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AttendKind:
    """What must be the same for requests to be computed in one launch: one object for each kind.

    Attributes:
        query_heads: Query heads, Hq.
        query_dtype: Element type of the queries.
        options: How scores become weights.
        attention: Computes them.
    """

    query_heads: int
    query_dtype: torch.dtype
    options: AttentionOptions
    attention: PrefixAttention


@dataclass(frozen=True, slots=True, eq=False)
class HeldPrefix:
    """A prefix whose pages stay where they are until `PrefixHolder.let_go`.

    Attributes:
        kind: How to attend to it.
        namespace: Namespace of the prefix.
        num_tokens: Tokens to attend to.
        page_units: int32 [pages], first byte of each page in the pool, in units of 256 bytes.
        first_unit: The first of them.
        identity: Equal for prefixes of equal pages and tokens.
        slice_bytes: Bytes of one layer of a page.
        head_dim: Channels of a query, D.
        v_head_dim: Channels of a value, Dv.
        query_token_bytes: Bytes of the queries of one token.
        answer_token_bytes: Bytes of `out` and `lse` of one token.
        pinned: The blocks.
        lease: The lease that is kept from expiring.
    """

    kind: AttendKind
    namespace: Namespace
    num_tokens: int
    page_units: npt.NDArray[np.int32]
    first_unit: int
    identity: bytes
    slice_bytes: int
    head_dim: int
    v_head_dim: int
    query_token_bytes: int
    answer_token_bytes: int
    pinned: Pinned
    lease: Lease


class PrefixHolder:
    """Opens prefixes. Thread-safe; may wait on Redis.

    Args:
        store: The store.
        namespaces: The namespaces.
    """

    def __init__(self, store: BlockStore, namespaces: NamespaceRegistry) -> None:
        self._store = store
        self._namespaces = namespaces
        self._lock = threading.Lock()
        # Those of open streams: a worker can ask for any number of them.
        self._kinds: WeakValueDictionary[object, AttendKind] = WeakValueDictionary()
        self._warm: WeakSet[AttendKind] = WeakSet()

    def hold(self, begin: pb.AttendBegin) -> HeldPrefix:
        """Brings a leased prefix into memory and holds it, and the lease, until `let_go`.

        Raises:
            InvalidRequestError: A field is out of range.
            NamespaceUnknownError: The namespace was not opened since the service started.
            LeaseExpiredError: The lease ended.
            BlockNotFoundError: A block is gone; the message names it.
        """
        namespace = self._namespaces.get(begin.namespace_id)
        kind = self._kind(begin, namespace)
        lease = self._store.memory.hold_lease(namespace.namespace_id, begin.lease_id)
        try:
            return self._hold(begin.prefix_tokens, kind, namespace, lease)
        except BaseException:
            self._store.memory.let_go_lease(lease)
            raise

    def let_go(self, prefix: HeldPrefix) -> None:
        """Ends what `hold` began; no kernel may read the pages any more."""
        self._store.unpin(prefix.pinned)
        self._store.memory.let_go_lease(prefix.lease)

    def _hold(
        self, prefix_tokens: int, kind: AttendKind, namespace: Namespace, lease: Lease
    ) -> HeldPrefix:
        block_tokens = namespace.spec.layout.block_tokens
        leased_tokens = len(lease.block_keys) * block_tokens
        num_tokens = prefix_tokens or leased_tokens
        if num_tokens > leased_tokens:
            raise InvalidRequestError(
                f"prefix_tokens {num_tokens}: the lease covers {leased_tokens} tokens"
            )
        num_blocks = -(-num_tokens // block_tokens)
        pinned = self._store.pin_for_read(namespace, lease.lease_id, 0, num_blocks)
        if pinned.miss_reason:
            self._store.unpin(pinned)
            lost = len(pinned.entries)
            raise BlockNotFoundError(
                f"block {lost} of the prefix, key {lease.block_keys[lost].hex()}, is not to be "
                f"had: {pinned.miss_reason}"
            )
        offsets = [entry.page.offset // PAGE_UNIT_BYTES for entry in pinned.entries]
        units = np.array(offsets, dtype=np.int32)
        identity = num_tokens.to_bytes(4, "little") + units.tobytes()
        layout = namespace.spec.layout
        prefix = HeldPrefix(
            kind=kind,
            namespace=namespace,
            num_tokens=num_tokens,
            page_units=units,
            first_unit=offsets[0],
            identity=identity,
            slice_bytes=namespace.codec.packed.slice_bytes,
            head_dim=layout.head_dim,
            v_head_dim=layout.v_head_dim,
            query_token_bytes=kind.query_heads * layout.head_dim * kind.query_dtype.itemsize,
            answer_token_bytes=kind.query_heads * (layout.v_head_dim + 1) * 4,
            pinned=pinned,
            lease=lease,
        )
        try:
            self._warm_up(prefix)
        except BaseException:
            self._store.unpin(pinned)
            raise
        return prefix

    def _warm_up(self, prefix: HeldPrefix) -> None:
        """Has the kernel of a new kind compiled now, before a request waits for it."""
        with self._lock:
            if prefix.kind in self._warm:
                return
            self._warm.add(prefix.kind)
        pool = self._store.memory.pool_bytes
        kind, device = prefix.kind, pool.device
        words = torch.tensor([int(prefix.page_units[0]), 1, 0, 1, 0], dtype=torch.int32).to(device)
        batch = PrefixBatch(
            memory=pool,
            page_table=words[:1].view(1, 1),
            slice_offset=0,
            lengths=words[1:2],
            query_starts=words[2:4],
            max_rows=1,
            positions=words[4:] if kind.options.window else None,
        )
        query = torch.zeros(
            1, kind.query_heads, prefix.head_dim, dtype=kind.query_dtype, device=device
        )
        out = torch.empty(1, kind.query_heads, prefix.v_head_dim, device=device)
        lse = torch.empty(1, kind.query_heads, device=device)
        num_bytes = kind.attention.workspace_bytes(1, 1, 1)
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        kind.attention(query, batch, out, lse, workspace)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _kind(self, begin: pb.AttendBegin, namespace: Namespace) -> AttendKind:
        if begin.query_dtype not in _QUERY_DTYPES:
            raise InvalidRequestError(
                f"query_dtype {begin.query_dtype}: expected FLOAT16, BFLOAT16 or FLOAT32"
            )
        try:
            options = AttentionOptions(
                scale=begin.scale,
                soft_cap=begin.logit_soft_cap,
                window=begin.sliding_window,
                sink_tokens=begin.sink_tokens,
            )
            attention = PrefixAttention(namespace.codec.kernel_codec, begin.num_q_heads, options)
        except ShapeError as error:
            raise InvalidRequestError(str(error)) from error
        dtype = _QUERY_DTYPES[begin.query_dtype]
        key = (namespace.namespace_id, begin.num_q_heads, dtype, options)
        with self._lock:
            kind = self._kinds.get(key)
            if kind is None:
                kind = AttendKind(begin.num_q_heads, dtype, options, attention)
                self._kinds[key] = kind
            return kind
