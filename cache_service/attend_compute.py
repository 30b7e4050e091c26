"""Computes a batch of attention requests in one launch: staging, page table, kernel.

One thread owns an `AttendCompute`. What goes in (page table, lengths, queries) lies in one host
buffer and what comes out (out, lse) in another, so that a GPU takes one copy each way; buffers
only grow. On the CPU the kernel works on the host buffers themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from polarcache.cache_service.attend_prefix import AttendKind, HeldPrefix
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.proto.frames import Buffer

__all__ = ["AttendCompute", "Computed", "LayerQuery"]

_ALIGNMENT_BYTES = 256
_SMALLEST_BYTES = 1 << 16


@dataclass(slots=True, eq=False)
class LayerQuery:
    """Queries of one request.

    Attributes:
        prefix: What to attend to.
        layer: Layer of it.
        num_tokens: Query tokens.
        queries: [num_tokens, Hq, D] in the kind's dtype, as bytes.
        position: Position of the first query token; 0 where there is no window.
    """

    prefix: HeldPrefix
    layer: int
    num_tokens: int
    queries: Buffer
    position: int = 0
    launch_key: tuple[AttendKind, int] = field(init=False)
    slice_units: int = field(init=False)

    def __post_init__(self) -> None:
        """Splits the layer's place in a page into page units, for the page table, and the rest.

        Layers whose rests are equal go in one launch: usually all of them.
        """
        start = self.layer * self.prefix.namespace.codec.packed.slice_bytes
        self.slice_units, rest = divmod(start, PAGE_UNIT_BYTES)
        self.launch_key = (self.prefix.kind, rest)


@dataclass(frozen=True, slots=True)
class Computed:
    """Answers of a launch; the views are valid until the next one.

    Attributes:
        answers: For each request the bytes of `out` and of `lse`.
        kernel_ns: Time of the kernel.
    """

    answers: list[tuple[memoryview, memoryview]]
    kernel_ns: int


class AttendCompute:
    """Buffers and kernels of one device. Owned by one thread.

    Args:
        pool: All pages, uint8.
    """

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool
        self._attention: dict[AttendKind, PrefixAttention] = {}
        self._inputs = _Staging(pool.device)
        self._outputs = _Staging(pool.device)
        self._workspace: torch.Tensor | None = None
        self._is_cuda = pool.is_cuda
        if self._is_cuda:
            torch.cuda.set_device(pool.device)
            self._stream = torch.cuda.Stream(pool.device)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)

    def run(self, requests: Sequence[LayerQuery]) -> Computed:
        """Answers requests of one launch key."""
        # Requests for the same layer of the same prefix become one sequence.
        sequences: dict[tuple[int, bytes], list[int]] = {}
        for i, request in enumerate(requests):
            sequence_key = (request.layer, request.prefix.identity)
            sequences.setdefault(sequence_key, []).append(i)
        batch = _Batch(requests, list(sequences.values()))
        attention = self._attention_of(requests[0])
        self._inputs.reserve(batch.input_bytes)
        batch.fill(self._inputs.host)
        self._outputs.reserve(batch.output_bytes)
        if self._is_cuda:
            with torch.cuda.stream(self._stream):
                self._inputs.upload(batch.input_bytes)
                self._begin.record(self._stream)
                self._launch(attention, batch)
                self._end.record(self._stream)
                self._outputs.download(batch.output_bytes)
                self._stream.synchronize()
            kernel_ns = int(self._begin.elapsed_time(self._end) * 1e6)
        else:
            start_ns = time.monotonic_ns()
            self._launch(attention, batch)
            kernel_ns = time.monotonic_ns() - start_ns
        return Computed(batch.answers(self._outputs.host_view), kernel_ns)

    def _launch(self, attention: PrefixAttention, batch: _Batch) -> None:
        query, prefix_batch = batch.tensors(self._inputs.device, self._pool)
        out, lse = batch.output_tensors(self._outputs.device)
        attention(query, prefix_batch, out, lse, self._workspace_for(attention, batch))

    def _attention_of(self, request: LayerQuery) -> PrefixAttention:
        kind = request.prefix.kind
        attention = self._attention.get(kind)
        if attention is None:
            codec = request.prefix.namespace.codec.kernel_codec
            attention = PrefixAttention(codec, kind.query_heads, kind.options)
            self._attention[kind] = attention
        return attention

    def _workspace_for(self, attention: PrefixAttention, batch: _Batch) -> torch.Tensor | None:
        num_bytes = attention.workspace_bytes(batch.num_rows, batch.num_sequences, batch.max_pages)
        if num_bytes and (self._workspace is None or len(self._workspace) < num_bytes):
            size = _grown(num_bytes)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._pool.device)
        return self._workspace


class _Staging:
    """A host buffer and its twin on the device; on the CPU they are one."""

    def __init__(self, device: torch.device) -> None:
        self._target = device
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Makes room; what lay there is lost."""
        if num_bytes <= self._num_bytes:
            return
        size = self._num_bytes = _grown(num_bytes)
        is_cuda = self._target.type == "cuda"
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
        self.device = torch.empty_like(pinned, device=self._target) if is_cuda else pinned
        self._pinned = pinned
        self.host = pinned.numpy()
        self.host_view = self.host.data

    def upload(self, num_bytes: int) -> None:
        """Copies the first bytes to the device, on the current stream."""
        self.device[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)

    def download(self, num_bytes: int) -> None:
        """Copies the first bytes from the device, on the current stream."""
        self._pinned[:num_bytes].copy_(self.device[:num_bytes], non_blocking=True)


class _Batch:
    """Where everything of one launch lies in the staging buffers.

    Input, int32 words: page table [S, pages], lengths [S], query starts [S + 1], positions
    [rows]; then, aligned, the queries. Output, fp32: out [rows, Hq, Dv], lse [rows, Hq].

    Args:
        requests: The requests.
        sequences: Indices of the requests of each sequence.
    """

    def __init__(self, requests: Sequence[LayerQuery], sequences: list[list[int]]) -> None:
        self._requests = requests
        self._sequences = sequences
        first = requests[0]
        self._kind, self._slice_offset = first.launch_key
        layout = first.prefix.namespace.spec.layout
        self._head_dim, self._v_head_dim = layout.head_dim, layout.v_head_dim
        self._query_token_bytes = first.prefix.query_token_bytes
        self.num_rows = sum(request.num_tokens for request in requests)
        self.num_sequences = len(sequences)
        self.max_pages = max(len(requests[ids[0]].prefix.page_units) for ids in sequences)
        self._has_window = bool(self._kind.options.window)
        self._table_words = self.num_sequences * self.max_pages
        self._words = self._table_words + 2 * self.num_sequences + 1
        if self._has_window:
            self._words += self.num_rows
        self._query_start = -(-self._words * 4 // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.input_bytes = self._query_start + self.num_rows * self._query_token_bytes
        self._out_bytes = self.num_rows * self._kind.query_heads * self._v_head_dim * 4
        self.output_bytes = self._out_bytes + self.num_rows * self._kind.query_heads * 4

    def fill(self, host: np.ndarray) -> None:
        """Writes the input."""
        num_sequences = self.num_sequences
        words = host[: self._words * 4].view(np.int32)
        table = words[: self._table_words].reshape(num_sequences, self.max_pages)
        lengths = words[self._table_words :][:num_sequences]
        starts = words[self._table_words + num_sequences :][: num_sequences + 1]
        starts[0] = row = self.max_rows = 0
        self._rows: list[int] = [0] * len(self._requests)
        for sequence, ids in enumerate(self._sequences):
            first = self._requests[ids[0]]
            units = first.prefix.page_units
            np.add(units, first.slice_units, out=table[sequence, : len(units)])
            lengths[sequence] = first.prefix.num_tokens
            begin = row
            for i in ids:
                self._rows[i] = row
                self._fill_rows(host, words, row, self._requests[i])
                row += self._requests[i].num_tokens
            starts[sequence + 1] = row
            self.max_rows = max(self.max_rows, row - begin)

    def _fill_rows(
        self, host: np.ndarray, words: np.ndarray, row: int, request: LayerQuery
    ) -> None:
        start = self._query_start + row * self._query_token_bytes
        end = start + request.num_tokens * self._query_token_bytes
        host[start:end] = np.frombuffer(request.queries, dtype=np.uint8)
        if self._has_window:
            first = self._words - self.num_rows + row
            words[first : first + request.num_tokens] = np.arange(
                request.position, request.position + request.num_tokens, dtype=np.int32
            )

    def tensors(self, staged: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, PrefixBatch]:
        """The queries and the batch, after `fill`, as views of the staged input."""
        words = staged[: self._words * 4].view(torch.int32)
        query = staged[self._query_start : self.input_bytes].view(self._kind.query_dtype)
        table_end = self._table_words
        lengths_end = table_end + self.num_sequences
        starts_end = lengths_end + self.num_sequences + 1
        return query.view(self.num_rows, self._kind.query_heads, self._head_dim), PrefixBatch(
            memory=pool,
            page_table=words[:table_end].view(self.num_sequences, self.max_pages),
            slice_offset=self._slice_offset,
            lengths=words[table_end:lengths_end],
            query_starts=words[lengths_end:starts_end],
            max_rows=self.max_rows,
            positions=words[starts_end:] if self._has_window else None,
        )

    def output_tensors(self, staged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the staged output: out [rows, Hq, Dv] and lse [rows, Hq]."""
        heads = self._kind.query_heads
        out = staged[: self._out_bytes].view(torch.float32)
        lse = staged[self._out_bytes : self.output_bytes].view(torch.float32)
        return out.view(self.num_rows, heads, self._v_head_dim), lse.view(self.num_rows, heads)

    def answers(self, host: memoryview) -> list[tuple[memoryview, memoryview]]:
        """For each request the bytes of its rows of out and lse."""
        lse_row_bytes = self._kind.query_heads * 4
        out_row_bytes = lse_row_bytes * self._v_head_dim
        found = []
        for request, row in zip(self._requests, self._rows, strict=True):
            end = row + request.num_tokens
            out = host[row * out_row_bytes : end * out_row_bytes]
            start = self._out_bytes + row * lse_row_bytes
            found.append((out, host[start : start + request.num_tokens * lse_row_bytes]))
        return found


def _grown(num_bytes: int) -> int:
    """The size to allocate where so many bytes are needed: a power of two, to grow seldom."""
    return max(_SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
