"""Where everything of one launch lies in the staging buffers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from polarcache.cache_service.attend_prefix import AttendKind, HeldPrefix
from polarcache.cache_service.attend_tables import PageTable, Run, split_shared
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.fast import PreparedDecode
from polarcache.proto.frames import Buffer

__all__ = ["LayerQuery", "Plan", "Staging", "grown"]

_ALIGNMENT_BYTES = 256
_SMALLEST_BYTES = 1 << 16
# Decoding, also of a few tokens at a time, goes apart from prompts.
_FEW_TOKENS = 16


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
            nothing, so that different layers go in one launch; and whether there are many
            queries, since the run with the most of them shapes a launch.
        place: Orders the requests of a launch: first page, layer, and identity of the prefix.
    """

    __slots__ = ("launch_key", "layer", "num_tokens", "place", "position", "prefix", "queries")

    def __init__(
        self, prefix: HeldPrefix, layer: int, num_tokens: int, queries: Buffer, position: int = 0
    ) -> None:
        self.prefix = prefix
        self.layer = layer
        self.num_tokens = num_tokens
        self.queries = queries
        self.position = position
        rest = layer * prefix.slice_bytes % PAGE_UNIT_BYTES
        self.launch_key: tuple[AttendKind, int, bool] = (
            prefix.kind,
            rest,
            num_tokens > _FEW_TOKENS,
        )
        self.place: tuple[int, int, bytes] = (prefix.first_unit, layer, prefix.identity)


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

    def pair(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first bytes on the host and on the device."""
        return self._pinned[:num_bytes], self.device[:num_bytes]


class Plan:
    """One launch's places. `place` first; then any number of `write_*` and launches.

    Input: the page tables, int32; positions [rows], int32, where there is a window; then, aligned,
    the queries. Output, fp32: out [rows, Hq, Dv], lse [rows, Hq]; and on the device alone the same
    once more where there are two tables. Requests for the same layer of the same prefix are one
    run of rows. Requests of equal `shape_of` have one plan, whatever their layers are: these are
    written into the page tables where they differ.

    Args:
        requests: The requests, in the order of `LayerQuery.place`.
        worth_bytes: How many bytes less must be read for leading pages that differing prefixes
            share to be read once, in a launch of their own. None for never.

    Attributes:
        attention: Computes it.
        num_rows: Query tokens of all requests.
        tables: One page table, or two: of what is shared, and of the rest.
        input_bytes: Bytes of the input.
        output_bytes: Bytes of the output that are of use to the host.
        staged_output_bytes: Bytes of the whole output.
        workspace_bytes: Bytes of scratch memory of a launch.
        query: [rows, Hq, D] in the input, on the device.
        states: (out fp32 [rows, Hq, Dv], lse fp32 [rows, Hq]) for each table, on the device.
        answers: For each request the bytes of its rows of out and lse, on the host.
        launches: For each table its kernel with all arguments but the layer, None where it has
            none; None altogether before the first launch.
    """

    query: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]]
    answers: list[tuple[memoryview, memoryview]]

    def __init__(self, requests: Sequence[LayerQuery], worth_bytes: int | None = None) -> None:
        first = requests[0]
        prefix = self._prefix = first.prefix
        kind = prefix.kind
        self.attention = kind.attention
        self.launches: list[PreparedDecode | None] | None = None
        self._has_window = bool(kind.options.window)
        runs = self._arrange(requests)
        self.num_rows = sum(run.num_rows for run in runs)
        self.tables = [PageTable(runs)]
        # Positions count from a sequence's first token: with a window it cannot be cut.
        if worth_bytes is not None and len(runs) > 1 and not self._has_window:
            block_tokens = prefix.namespace.spec.layout.block_tokens
            split = split_shared(runs, block_tokens, prefix.slice_bytes, worth_bytes)
            if split is not None:
                self.tables = [PageTable(part) for part in split]
        num_words = sum(table.num_words for table in self.tables)
        num_words += self.num_rows if self._has_window else 0
        self._query_start = -(-num_words * 4 // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.input_bytes = self._query_start + self.num_rows * prefix.query_token_bytes
        self.output_bytes = self.num_rows * prefix.answer_token_bytes
        self.staged_output_bytes = self.output_bytes * len(self.tables)
        self.workspace_bytes = max(
            kind.attention.workspace_bytes(
                self.num_rows, table.num_sequences, table.max_pages, table.max_rows
            )
            for table in self.tables
        )

    def place(self, inputs: Staging, outputs: Staging) -> None:
        """Makes the views of buffers that are long enough."""
        self._place_input(inputs)
        self._input_pair = inputs.pair(self.input_bytes)
        self._output_pair = outputs.pair(self.output_bytes)
        prefix = self._prefix
        heads, v_head_dim = prefix.kind.query_heads, prefix.v_head_dim
        out_bytes = self.num_rows * heads * v_head_dim * 4
        self.states = []
        for number in range(len(self.tables)):
            start = number * self.output_bytes
            words = outputs.device[start : start + self.output_bytes].view(torch.float32)
            out = words[: out_bytes // 4].view(self.num_rows, heads, v_head_dim)
            self.states.append((out, words[out_bytes // 4 :].view(self.num_rows, heads)))
        host = outputs.host.data
        out_row, lse_row = heads * v_head_dim * 4, heads * 4
        self.answers = [
            (
                host[row * out_row : end * out_row],
                host[out_bytes + row * lse_row : out_bytes + end * lse_row],
            )
            for row, end in self._spans
        ]

    @staticmethod
    def shape_of(requests: Sequence[LayerQuery]) -> tuple[object, ...]:
        """What of the requests a plan depends on; they are in the order of `LayerQuery.place`."""
        first = requests[0]
        shape: list[object] = [first.prefix.kind]
        unit = layer = -1
        identity = b""
        for one in requests:
            prefix = one.prefix
            if one.layer != layer or one.place[0] != unit:
                boundary = 2
            else:
                boundary = 1 if prefix.identity != identity else 0
            unit, layer, identity = one.place
            shape += (identity, one.num_tokens, boundary)
        return tuple(shape)

    def write_tables(self, layers: Sequence[int]) -> None:
        """Writes the page tables; they stay until another plan writes its own.

        Args:
            layers: Layer of each request, if they differ; else none.
        """
        units = None
        if layers:
            offsets = np.array(layers, np.int64) * self._prefix.slice_bytes
            units = (offsets // PAGE_UNIT_BYTES).astype(np.int32)
        for table in self.tables:
            table.write(units)

    def write_queries(self, requests: Sequence[LayerQuery]) -> None:
        """Writes what differs from launch to launch."""
        for request, target in zip(requests, self._queries, strict=True):
            target[:] = request.queries
        if self._has_window:
            for request, (row, end) in zip(requests, self._spans, strict=True):
                first = request.position
                self._host_positions[row:end] = np.arange(first, first + end - row, dtype=np.int32)

    def upload(self) -> None:
        """Copies the input to the device, on the current stream."""
        host, device = self._input_pair
        device.copy_(host, non_blocking=True)

    def download(self) -> None:
        """Copies the output from the device, on the current stream."""
        host, device = self._output_pair
        host.copy_(device, non_blocking=True)

    def prefix_batches(self, pool: torch.Tensor, slice_offset: int) -> list[PrefixBatch]:
        """The batch of each table.

        Args:
            pool: All pages.
            slice_offset: As in `PrefixBatch`.
        """
        return [table.prefix_batch(pool, slice_offset, self._positions) for table in self.tables]

    def _arrange(self, requests: Sequence[LayerQuery]) -> list[Run]:
        """Gives every request its rows."""
        self._spans: list[tuple[int, int]] = []
        runs: list[Run] = []
        row = group = 0
        for place, members in groupby(enumerate(requests), key=lambda one: one[1].place):
            begin = row
            ids = []
            for i, request in members:
                self._spans.append((row, row + request.num_tokens))
                row += request.num_tokens
                ids.append(i)
            prefix = requests[ids[0]].prefix
            if runs and place[:2] != requests[runs[-1].request].place[:2]:
                group += 1
            runs.append(Run(prefix.page_units, prefix.num_tokens, row - begin, ids[0], group))
        return runs

    def _place_input(self, inputs: Staging) -> None:
        prefix, start = self._prefix, self._query_start
        host = inputs.host[:start].view(np.int32)
        device = inputs.device[:start].view(torch.int32)
        word = 0
        for table in self.tables:
            end = word + table.num_words
            table.place(host[word:end], device[word:end])
            word = end
        end = word + self.num_rows
        self._host_positions = host[word:end]
        self._positions = device[word:end] if self._has_window else None
        query = inputs.device[start : self.input_bytes].view(prefix.kind.query_dtype)
        self.query = query.view(self.num_rows, prefix.kind.query_heads, prefix.head_dim)
        view, size = inputs.host.data, prefix.query_token_bytes
        self._queries = [view[start + row * size : start + end * size] for row, end in self._spans]


def grown(num_bytes: int) -> int:
    """The size to allocate where so many bytes are needed: a power of two, to grow seldom."""
    return max(_SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
