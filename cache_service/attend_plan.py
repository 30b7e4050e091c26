"""Where everything of one launch lies in the staging buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polarcache.cache_service.attend_prefix import AttendKind, HeldPrefix
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.proto.frames import Buffer

__all__ = ["LayerQuery", "Plan", "Staging", "grown"]

_ALIGNMENT_BYTES = 256
_SMALLEST_BYTES = 1 << 16


class LayerQuery:
    """Queries of one request.

    Args:
        prefix: What to attend to.
        layer: Layer of it.
        num_tokens: Query tokens.
        queries: [num_tokens, Hq, D] in the kind's dtype, as bytes.
        position: Position of the first query token; 0 where there is no window.

    Attributes:
        launch_key: Requests of one launch have equal ones. It holds what remains of the layer's
            place in a page beyond whole page units, which the page table can take up: usually
            nothing, so that different layers go in one launch.
    """

    __slots__ = ("launch_key", "layer", "num_tokens", "position", "prefix", "queries")

    def __init__(
        self, prefix: HeldPrefix, layer: int, num_tokens: int, queries: Buffer, position: int = 0
    ) -> None:
        self.prefix = prefix
        self.layer = layer
        self.num_tokens = num_tokens
        self.queries = queries
        self.position = position
        rest = layer * prefix.slice_bytes % PAGE_UNIT_BYTES
        self.launch_key: tuple[AttendKind, int] = (prefix.kind, rest)


class Staging:
    """A host buffer and its twin on the device; on the CPU they are one.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._target = device
        self._num_bytes = 0

    def reserve(self, num_bytes: int) -> bool:
        """Makes room; whether the buffers are other ones now, their contents lost."""
        if num_bytes <= self._num_bytes:
            return False
        size = self._num_bytes = grown(num_bytes)
        is_cuda = self._target.type == "cuda"
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
        self.device = (
            torch.empty_like(self._pinned, device=self._target) if is_cuda else self._pinned
        )
        self.host = self._pinned.numpy()
        return True

    def upload(self, num_bytes: int) -> None:
        """Copies the first bytes to the device, on the current stream."""
        self.device[:num_bytes].copy_(self._pinned[:num_bytes], non_blocking=True)

    def download(self, num_bytes: int) -> None:
        """Copies the first bytes from the device, on the current stream."""
        self._pinned[:num_bytes].copy_(self.device[:num_bytes], non_blocking=True)


class Plan:
    """One launch's places. `place` first; then any number of `write_*` and launches.

    Input, int32 words: page table [S, pages], lengths [S], query starts [S + 1], positions
    [rows] where there is a window; then, aligned, the queries. Output, fp32: out [rows, Hq, Dv],
    lse [rows, Hq]. Requests for the same layer of the same prefix are one sequence of S.

    Args:
        requests: The requests. Where their layers differ, the page table holds them; else
            the plan fits any layer.

    Attributes:
        num_rows: Query tokens of all requests.
        num_sequences: Sequences, S.
        max_pages: Columns of the page table.
        input_bytes: Bytes of the input.
        output_bytes: Bytes of the output.
        query: [rows, Hq, D] in the input, on the device.
        out: fp32 [rows, Hq, Dv] in the output, on the device.
        lse: fp32 [rows, Hq] likewise.
        answers: For each request the bytes of its rows of out and lse, on the host.
    """

    query: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    answers: list[tuple[memoryview, memoryview]]

    def __init__(self, requests: Sequence[LayerQuery]) -> None:
        first = requests[0]
        kind = first.prefix.kind
        self._prefix = first.prefix
        self._has_window = bool(kind.options.window)
        self._is_mixed = any(request.layer != first.layer for request in requests)
        sequences: dict[tuple[int, bytes], list[int]] = {}
        for i, request in enumerate(requests):
            key = (request.layer, request.prefix.identity)
            sequences.setdefault(key, []).append(i)
        # Of each sequence its pages, its length and its end in query rows.
        self._sequences: list[tuple[np.ndarray, int, int]] = []
        self._spans: list[tuple[int, int]] = [(0, 0)] * len(requests)
        row = self._max_rows = 0
        for ids in sequences.values():
            begin = row
            for i in ids:
                self._spans[i] = (row, row + requests[i].num_tokens)
                row += requests[i].num_tokens
            one = requests[ids[0]]
            units = one.prefix.page_units
            if self._is_mixed:
                units = units + one.layer * one.prefix.slice_bytes // PAGE_UNIT_BYTES
            self._sequences.append((units, one.prefix.num_tokens, row))
            self._max_rows = max(self._max_rows, row - begin)
        self.num_rows = row
        self.num_sequences = len(sequences)
        self.max_pages = max(len(units) for units, _, _ in self._sequences)
        words = self.num_sequences * (self.max_pages + 2) + 1
        self._num_words = words + (row if self._has_window else 0)
        self._query_start = -(-self._num_words * 4 // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.input_bytes = self._query_start + row * first.prefix.query_token_bytes
        self.output_bytes = row * first.prefix.answer_token_bytes

    def place(self, inputs: Staging, outputs: Staging) -> None:
        """Makes the views of buffers that are long enough."""
        self._place_input(inputs)
        prefix = self._prefix
        heads, v_head_dim = prefix.kind.query_heads, prefix.v_head_dim
        out_bytes = self.num_rows * heads * v_head_dim * 4
        words = outputs.device[: self.output_bytes].view(torch.float32)
        self.out = words[: out_bytes // 4].view(self.num_rows, heads, v_head_dim)
        self.lse = words[out_bytes // 4 :].view(self.num_rows, heads)
        host = outputs.host.data
        out_row, lse_row = heads * v_head_dim * 4, heads * 4
        self.answers = [
            (
                host[row * out_row : end * out_row],
                host[out_bytes + row * lse_row : out_bytes + end * lse_row],
            )
            for row, end in self._spans
        ]

    def write_table(self) -> None:
        """Writes page table, lengths and starts; they stay until another plan writes its own."""
        table, lengths, starts = self._host
        starts[0] = 0
        for sequence, (units, num_tokens, end) in enumerate(self._sequences):
            table[sequence, : len(units)] = units
            lengths[sequence] = num_tokens
            starts[sequence + 1] = end

    def write_queries(self, requests: Sequence[LayerQuery]) -> None:
        """Writes what differs from launch to launch."""
        for request, target in zip(requests, self._queries, strict=True):
            target[:] = request.queries
        if self._has_window:
            for request, (row, end) in zip(requests, self._spans, strict=True):
                first = request.position
                self._host_positions[row:end] = np.arange(first, first + end - row, dtype=np.int32)

    def prefix_batch(self, pool: torch.Tensor, first: LayerQuery) -> PrefixBatch:
        """The batch of a launch.

        Args:
            pool: All pages.
            first: The first of its requests.
        """
        slice_offset = first.layer * first.prefix.slice_bytes
        if self._is_mixed:
            slice_offset %= PAGE_UNIT_BYTES
        return PrefixBatch(
            memory=pool,
            page_table=self._page_table,
            slice_offset=slice_offset,
            lengths=self._lengths,
            query_starts=self._starts,
            max_rows=self._max_rows,
            positions=self._positions,
        )

    def _place_input(self, inputs: Staging) -> None:
        sequences = self.num_sequences
        table_end = sequences * self.max_pages
        lengths_end, starts_end = table_end + sequences, table_end + 2 * sequences + 1
        host = inputs.host[: self._num_words * 4].view(np.int32)
        self._host = (
            host[:table_end].reshape(sequences, self.max_pages),
            host[table_end:lengths_end],
            host[lengths_end:starts_end],
        )
        self._host_positions = host[starts_end:]
        words = inputs.device[: self._num_words * 4].view(torch.int32)
        self._page_table = words[:table_end].view(sequences, self.max_pages)
        self._lengths = words[table_end:lengths_end]
        self._starts = words[lengths_end:starts_end]
        self._positions = words[starts_end:] if self._has_window else None
        prefix = self._prefix
        query = inputs.device[self._query_start : self.input_bytes].view(prefix.kind.query_dtype)
        self.query = query.view(self.num_rows, prefix.kind.query_heads, prefix.head_dim)
        view, size = inputs.host.data, prefix.query_token_bytes
        start = self._query_start
        self._queries = [view[start + row * size : start + end * size] for row, end in self._spans]


def grown(num_bytes: int) -> int:
    """The size to allocate where so many bytes are needed: a power of two, to grow seldom."""
    return max(_SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
