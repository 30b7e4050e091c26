"""Where everything of one launch lies in the staging buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from polarcache.cache_service.attend_prefix import AttendKind, HeldPrefix
from polarcache.cache_service.attend_tables import PageTable, Run, TableShape
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES, PrefixBatch
from polarcache.kernels.attention.fast import PreparedDecode
from polarcache.proto.frames import Buffer

__all__ = ["LayerQuery", "Plan", "PlanShape", "Staging", "arrange", "grown"]

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


class PlanShape(NamedTuple):
    """What a plan depends on: launches of equal ones share it.

    Attributes:
        kind: Kind of the requests.
        num_rows: Query tokens of all requests.
        tables: Shape of the page table, or of two: of what is shared, and of the rest.
    """

    kind: AttendKind
    num_rows: int
    tables: tuple[TableShape, ...]


class Plan:
    """One launch's places in the buffers.

    Input: the page tables, int32; positions [rows], int32, where there is a window; then, aligned,
    the queries. Output, fp32: out [rows, Hq, Dv], lse [rows, Hq]; and on the device alone the same
    once more where there are two tables.

    Args:
        shape: Of its launches.
        prefix: A prefix of the kind.

    Attributes:
        attention: Computes it.
        input_bytes: Bytes of the input.
        output_bytes: Bytes of the output that are of use to the host.
        staged_output_bytes: Bytes of the whole output.
        workspace_bytes: Bytes of scratch memory of a launch.
        query: [rows, Hq, D] in the input, on the device; after `place`, as what follows.
        states: (out fp32 [rows, Hq, Dv], lse fp32 [rows, Hq]) for each table, on the device.
        launches: For each table its kernel with all arguments but the layer, None where it has
            none; None altogether before the first launch.
    """

    query: torch.Tensor
    states: list[tuple[torch.Tensor, torch.Tensor]]
    launches: list[PreparedDecode | None] | None = None

    def __init__(self, shape: PlanShape, prefix: HeldPrefix) -> None:
        kind, num_rows, tables = shape
        self._shape = shape
        self._prefix = prefix
        self.attention = kind.attention
        self._has_window = bool(kind.options.window)
        num_words = sum(table.num_words for table in tables)
        num_words += num_rows if self._has_window else 0
        self._query_start = -(-num_words * 4 // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.input_bytes = self._query_start + num_rows * prefix.query_token_bytes
        self.output_bytes = num_rows * prefix.answer_token_bytes
        self.staged_output_bytes = self.output_bytes * len(tables)
        self.workspace_bytes = max(
            kind.attention.workspace_bytes(
                num_rows, table.num_sequences, table.max_pages, table.max_rows
            )
            for table in tables
        )

    def place(self, inputs: Staging, outputs: Staging) -> None:
        """Makes the views of buffers that are long enough."""
        self._place_input(inputs)
        self._input_pair = inputs.pair(self.input_bytes)
        self._output_pair = outputs.pair(self.output_bytes)
        prefix, num_rows = self._prefix, self._shape.num_rows
        heads, v_head_dim = prefix.kind.query_heads, prefix.v_head_dim
        out_bytes = num_rows * heads * v_head_dim * 4
        self.states = []
        for number in range(len(self._shape.tables)):
            start = number * self.output_bytes
            words = outputs.device[start : start + self.output_bytes].view(torch.float32)
            out = words[: out_bytes // 4].view(num_rows, heads, v_head_dim)
            self.states.append((out, words[out_bytes // 4 :].view(num_rows, heads)))
        host = outputs.host.data
        self._out, self._lse = host[:out_bytes], host[out_bytes : self.output_bytes]
        self._row_bytes = heads * v_head_dim * 4, heads * 4

    def write_tables(self, tables: Sequence[Sequence[Run]]) -> None:
        """Writes the page tables; they stay until another plan writes its own.

        Args:
            tables: Runs of each.
        """
        for table, runs in zip(self._tables, tables, strict=True):
            table.write(runs)

    def write_queries(self, requests: Sequence[LayerQuery]) -> None:
        """Writes what differs from launch to launch.

        Args:
            requests: The requests, in the order of their rows.
        """
        target, start = self._queries, 0
        for request in requests:
            end = start + len(request.queries)
            target[start:end] = request.queries
            start = end
        if self._has_window:
            row = 0
            for request in requests:
                end = row + request.num_tokens
                first = request.position
                self._host_positions[row:end] = np.arange(first, first + end - row, dtype=np.int32)
                row = end

    def answers(self, requests: Sequence[LayerQuery]) -> list[tuple[memoryview, memoryview]]:
        """For each request the bytes of its rows of out and lse, on the host."""
        out, lse = self._out, self._lse
        out_row, lse_row = self._row_bytes
        views = []
        row = 0
        for request in requests:
            end = row + request.num_tokens
            views.append((out[row * out_row : end * out_row], lse[row * lse_row : end * lse_row]))
            row = end
        return views

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
        return [table.prefix_batch(pool, slice_offset, self._positions) for table in self._tables]

    def _place_input(self, inputs: Staging) -> None:
        prefix, start, num_rows = self._prefix, self._query_start, self._shape.num_rows
        host = inputs.host[:start].view(np.int32)
        device = inputs.device[:start].view(torch.int32)
        self._tables = []
        word = 0
        for shape in self._shape.tables:
            end = word + shape.num_words
            self._tables.append(PageTable(shape, host[word:end], device[word:end]))
            word = end
        end = word + num_rows
        self._host_positions = host[word:end]
        self._positions = device[word:end] if self._has_window else None
        query = inputs.device[start : self.input_bytes].view(prefix.kind.query_dtype)
        self.query = query.view(num_rows, prefix.kind.query_heads, prefix.head_dim)
        self._queries = inputs.host.data[start : self.input_bytes]


def arrange(requests: Sequence[LayerQuery], *, in_tables: bool) -> list[Run]:
    """The runs of a launch: requests for the same layer of the same prefix are one.

    Args:
        requests: The requests, in the order of `LayerQuery.place`.
        in_tables: Whether page tables hold the layers, which differ.
    """
    runs: list[Run] = []
    group = num_rows = 0
    first = requests[0]
    for request in requests:
        place, before = request.place, first.place
        if place != before:
            runs.append(_run(first, num_rows, group, in_tables=in_tables))
            if place[:2] != before[:2]:
                group += 1
            first, num_rows = request, 0
        num_rows += request.num_tokens
    runs.append(_run(first, num_rows, group, in_tables=in_tables))
    return runs


def _run(first: LayerQuery, num_rows: int, group: int, *, in_tables: bool) -> Run:
    prefix = first.prefix
    units = first.layer * prefix.slice_bytes // PAGE_UNIT_BYTES if in_tables else 0
    return Run(prefix.page_units, prefix.num_tokens, num_rows, units, group)


def grown(num_bytes: int) -> int:
    """The size to allocate where so many bytes are needed: a power of two, to grow seldom."""
    return max(_SMALLEST_BYTES, 1 << (num_bytes - 1).bit_length())
