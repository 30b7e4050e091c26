"""Attention of queries over a stored prefix, straight from its packed pages."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polarcache.kernels.attention import plain
from polarcache.kernels.attention.batch import PrefixBatch
from polarcache.kernels.attention.fast import FastDecode, PreparedDecode
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import ShapeError

if TYPE_CHECKING:
    from polarcache.kernels.attention.portable import PortableAttention

__all__ = ["PrefixAttention"]

_TRITON_CAPABILITY = (8, 0)
_FAST_CAPABILITY = 9
_QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PrefixAttention:
    """Attention over packed pages of one codec; holds no buffers, thread-safe.

    Attributes:
        codec: the codec of the pages.
        query_heads: query heads, a multiple of the codec's KV heads.
        options: how scores become weights.
    """

    def __init__(
        self, codec: Codec, query_heads: int, options: AttentionOptions | None = None
    ) -> None:
        """Chooses how to compute.

        Args:
            codec: the codec of the pages.
            query_heads: query heads; query head h reads KV head h // (query_heads / KV heads).
            options: how scores become weights; None means the defaults.

        Raises:
            ShapeError: query_heads is no multiple of the codec's KV heads.
        """
        if query_heads < 1 or query_heads % codec.shape.kv_heads:
            raise ShapeError(
                f"query_heads {query_heads}: expected a multiple of {codec.shape.kv_heads} KV heads"
            )
        self.codec = codec
        self.query_heads = query_heads
        self.options = options or AttentionOptions()
        covered = FastDecode.covers(codec, self.options)
        self._fast = FastDecode(codec, query_heads, self.options) if covered else None
        self._portable: PortableAttention | None = None

    def workspace_bytes(
        self, num_queries: int, num_sequences: int, max_pages: int, max_rows: int | None = None
    ) -> int:
        """Returns the bytes of scratch memory that a call of at most these sizes needs.

        Args:
            num_queries: query rows of all sequences.
            num_sequences: sequences.
            max_pages: columns of the page table.
            max_rows: most query rows of one sequence; None where they may all be of one, which
                takes far more memory where there are many sequences.
        """
        if not torch.cuda.is_available():
            return 0
        num_bytes = self._portable_form().workspace_bytes(num_queries, num_sequences, max_pages)
        if self._fast is not None:
            rows = num_queries if max_rows is None else max_rows
            fast = self._fast.workspace_bytes(num_sequences, max(1, rows), _most_processors())
            num_bytes = max(num_bytes, fast)
        return num_bytes

    def __call__(
        self,
        query: Tensor,
        batch: PrefixBatch,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None = None,
    ) -> None:
        """Writes attention of each query row over its sequence's stored tokens.

        On GPUs of compute capability 9.x the fast form serves what it covers (fast.py); from 8.0 on
        Triton kernels serve every codec. Such a call never waits for the device and, after a first
        one, which compiles and makes tables, can be captured in a CUDA graph. Older GPUs and the
        CPU decode some pages at a time.

        Args:
            query: [num_queries, Hq, D] contiguous; fp16, bf16 or fp32, RoPE applied.
            batch: what to attend to, on the device of `query`.
            out: fp32 [num_queries, Hq, Dv] contiguous; every element is written.
            lse: fp32 [num_queries, Hq] contiguous: natural logarithm of the sum of exp of the
                scores; -inf, with `out` 0, where a row sees no token.
            workspace: uint8, at least `workspace_bytes` long, on the device of `query`, at a
                multiple of 16 bytes; its contents are free between calls. None where 0 bytes are
                needed.

        Raises:
            ShapeError: a tensor differs from the above.
        """
        self._check(query, batch, out, lse)
        if not query.shape[0]:
            return
        prepared = None
        if _has_fast_form(query.device):
            prepared = self._prepared(query, batch, out, lse, workspace)
        if prepared is not None:
            with torch.cuda.device(query.device):
                prepared(batch.slice_offset, torch.cuda.current_stream().cuda_stream)
            return
        if query.is_cuda and torch.cuda.get_device_capability(query.device) >= _TRITON_CAPABILITY:
            self._portable_form().attend(query, batch, out, lse, workspace)
        else:
            plain.attend(self.codec, query, batch, self.options, out, lse)

    def prepare(
        self,
        query: Tensor,
        batch: PrefixBatch,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None = None,
    ) -> PreparedDecode | None:
        """Returns the launch of a call that will be repeated over the same tensors, checked once.

        Args:
            query: as for a call.
            batch: as for a call; `slice_offset` is given to each launch instead.
            out: as for a call.
            lse: as for a call.
            workspace: as for a call.

        Returns:
            The launch; None where calls alone will do, since the fast form does not serve them.

        Raises:
            ShapeError: a tensor differs from what a call takes.
        """
        self._check(query, batch, out, lse)
        if not query.shape[0] or not _has_fast_form(query.device):
            return None
        return self._prepared(query, batch, out, lse, workspace)

    def _prepared(
        self, query: Tensor, batch: PrefixBatch, out: Tensor, lse: Tensor, workspace: Tensor | None
    ) -> PreparedDecode | None:
        """Prepares the fast form; None where it does not cover the call or cannot be compiled."""
        if self._fast is None:
            return None
        try:
            return self._fast.prepare(query, batch, out, lse, workspace)
        except (ImportError, RuntimeError) as error:
            # No CUDA bindings, no NVRTC, or a source that they refuse: the same answer, slower.
            _warn_of_slow_form(f"{type(error).__name__}: {error}")
            self._fast = None
            return None

    def _portable_form(self) -> PortableAttention:
        """Returns the Triton kernels, for the visible device with the most multiprocessors."""
        if self._portable is None:
            # Imported here, so that the CPU path needs no Triton.
            from polarcache.kernels.attention.portable import PortableAttention

            self._portable = PortableAttention.of(
                self.codec, self.query_heads, self.options, _most_processors()
            )
        return self._portable

    def _check(self, query: Tensor, batch: PrefixBatch, out: Tensor, lse: Tensor) -> None:
        shape = self.codec.shape
        rows = query.shape[0]
        if query.dtype not in _QUERY_DTYPES:
            raise ShapeError(f"query {query.dtype}: expected float16, bfloat16 or float32")
        for name, tensor, size in (
            ("query", query, (rows, self.query_heads, shape.head_dim)),
            ("out", out, (rows, self.query_heads, shape.v_head_dim)),
            ("lse", lse, (rows, self.query_heads)),
        ):
            if tuple(tensor.shape) != size or not tensor.is_contiguous():
                raise ShapeError(f"{name} {tuple(tensor.shape)}: expected contiguous {size}")
            if tensor.device != batch.memory.device:
                raise ShapeError(f"{name} on {tensor.device}: expected {batch.memory.device}")
        if out.dtype != torch.float32 or lse.dtype != torch.float32:
            raise ShapeError(f"out {out.dtype}, lse {lse.dtype}: expected float32")
        batch.check(rows, window=bool(self.options.window))


def _has_fast_form(device: torch.device) -> bool:
    """Returns whether a device is of the kind that the fast form is for."""
    return device.type == "cuda" and (
        torch.cuda.get_device_capability(device)[0] == _FAST_CAPABILITY
    )


@functools.cache
def _most_processors() -> int:
    """Returns the multiprocessors of the visible device that has most."""
    return max(
        torch.cuda.get_device_properties(index).multi_processor_count
        for index in range(torch.cuda.device_count())
    )


@functools.cache
def _warn_of_slow_form(reason: str) -> None:
    """Warns once a process and reason."""
    warnings.warn(
        f"the fast form of attention is not to be had ({reason}); portable kernels serve, at a "
        "fraction of its speed. Expected the packages cuda-bindings and nvidia-cuda-nvrtc",
        RuntimeWarning,
        stacklevel=2,
    )
