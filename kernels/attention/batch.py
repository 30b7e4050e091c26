"""What one launch attends to: sequences of pages, and which query rows belong to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polarcache.kernels.errors import ShapeError

__all__ = ["EVEN", "PAGE_UNIT_BYTES", "PrefixBatch", "typical_lengths"]

# A page table counts in these units, so that 32 bits address 512 GiB.
PAGE_UNIT_BYTES = 256
# Sequences are even where the longest has at most this many times the mean's tokens.
EVEN = 1.25


@dataclass(frozen=True, slots=True)
class PrefixBatch:
    """Stored prefixes of several sequences in one memory, and the query rows that see them.

    Rows that share a prefix belong to one sequence: its pages are then read once for all of them.
    Entries of device tensors are trusted, so that no call waits for the device.

    Attributes:
        memory: uint8 [num_bytes], the page pool, at a multiple of 16 bytes.
        page_table: int32 [sequences, max_pages] contiguous: first byte of each page in `memory`,
            in units of 256 bytes. Entries beyond a sequence's pages are never read.
        slice_offset: first byte of the layer's slice in every page, a multiple of 16.
        lengths: int32 [sequences]: valid tokens of each sequence, 0 to max_pages * page tokens;
            the last page may be partly valid.
        query_starts: int32 [sequences + 1], ascending from 0 to num_queries: rows of sequence i
            are query_starts[i] to query_starts[i + 1] - 1.
        max_rows: at least the most query rows of one sequence; sizes the launch.
        positions: int32 [num_queries], position of each query in its sequence; needed with a
            window, else None.
        known_lengths: `lengths` as the caller knows them without asking the device, to share the
            work out by; None means that sequences are about as long as the table is wide. Any
            numbers give right results.
    """

    memory: Tensor
    page_table: Tensor
    slice_offset: int
    lengths: Tensor
    query_starts: Tensor
    max_rows: int
    positions: Tensor | None = None
    known_lengths: Sequence[int] | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch."""
        return self.page_table.shape[0]

    def check(self, num_queries: int, *, window: bool) -> None:
        """Checks shapes, dtypes and devices, never the entries.

        Args:
            num_queries: query rows of the call.
            window: whether a window is asked for.

        Raises:
            ShapeError: an attribute differs from the above.
        """
        if self.memory.dtype != torch.uint8 or self.memory.dim() != 1:
            raise ShapeError(
                f"memory {self.memory.dtype} {tuple(self.memory.shape)}: expected uint8 [bytes]"
            )
        if self.page_table.dim() != 2:
            raise ShapeError(
                f"page_table of {self.page_table.dim()} dims: expected [sequences, max_pages]"
            )
        if self.slice_offset < 0 or self.slice_offset % 16:
            raise ShapeError(f"slice_offset {self.slice_offset}: expected a multiple of 16")
        sequences = self.num_sequences
        for name, tensor, shape in (
            ("page_table", self.page_table, tuple(self.page_table.shape)),
            ("lengths", self.lengths, (sequences,)),
            ("query_starts", self.query_starts, (sequences + 1,)),
            ("positions", self.positions, (num_queries,)),
        ):
            if tensor is None:
                if window:
                    raise ShapeError("positions missing: expected them with a window")
                continue
            if (
                tensor.dtype != torch.int32
                or tuple(tensor.shape) != shape
                or not tensor.is_contiguous()
                or tensor.device != self.memory.device
            ):
                raise ShapeError(
                    f"{name} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: expected "
                    f"contiguous int32 {shape} on {self.memory.device}"
                )
        if num_queries and not 1 <= self.max_rows <= num_queries:
            raise ShapeError(f"max_rows {self.max_rows}: expected 1 to {num_queries}")


def typical_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns `known_lengths` for these and many other lengths, which shape a launch as these do.

    Args:
        lengths: valid tokens of each sequence.

    Returns:
        As many numbers: all the longest, rounded up by at most an eighth, where they are even;
        else that and zeros.
    """
    longest = max(lengths)
    step = 1 << max(0, longest.bit_length() - 4)
    typical = -(-longest // step) * step
    if longest * len(lengths) <= EVEN * sum(lengths):
        return (typical,) * len(lengths)
    return (typical,) + (0,) * (len(lengths) - 1)
