"""Page tables of a launch: what each run of query rows reads, and what several runs share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from polarcache.kernels.attention.batch import PrefixBatch, typical_lengths

__all__ = ["PageTable", "Run", "TableShape", "split_shared"]

Words = npt.NDArray[np.int32]


class Run(NamedTuple):
    """Query rows, one after the other, that read the same pages: one sequence of a launch.

    Attributes:
        page_units: int32 [pages], places of the pages in the pool, in page units.
        num_tokens: Tokens of them.
        num_rows: Query rows.
        layer_units: Place of the layer in a page, in page units, where it is not the same for
            all runs of the launch; else 0.
        group: Runs of equal ones begin with the same page, for the same layer.
    """

    page_units: Words
    num_tokens: int
    num_rows: int
    layer_units: int = 0
    group: int = 0


def split_shared(
    runs: Sequence[Run], block_tokens: int, slice_bytes: int, worth_bytes: int
) -> tuple[list[Run], list[Run]] | None:
    """Cuts runs that begin with the same pages into what they share and what is their own.

    Args:
        runs: Runs; those of a group next to each other.
        block_tokens: Tokens of a page.
        slice_bytes: Bytes that are read of a page.
        worth_bytes: How many bytes less must be read for it to pay.

    Returns:
        Runs over the same rows, read once for all that share them, of no token for those that
        share nothing; and, run for run, the rest. None when it does not pay.
    """
    groups = [list(members) for _, members in groupby(runs, key=attrgetter("group"))]
    # Most launches end here: they cannot save so much, whatever their pages are.
    most_tokens = sum(
        (len(group) - 1) * min(one.num_tokens for one in group)
        for group in groups
        if len(group) > 1
    )
    if most_tokens // block_tokens * slice_bytes < worth_bytes:
        return None
    shared: list[Run] = []
    own: list[Run] = []
    saved_pages = 0
    for members in groups:
        num_pages = 0
        if len(members) > 1:
            num_pages = min(one.num_tokens // block_tokens for one in members)
            table = np.stack([one.page_units[:num_pages] for one in members])
            differs = (table != table[0]).any(0)
            num_pages = int(differs.argmax()) if differs.any() else num_pages
        saved_pages += (len(members) - 1) * num_pages
        first = members[0]
        shared.append(
            first._replace(
                page_units=first.page_units[:num_pages],
                num_tokens=num_pages * block_tokens,
                num_rows=sum(one.num_rows for one in members),
            )
        )
        own += [
            one._replace(
                page_units=one.page_units[num_pages:],
                num_tokens=one.num_tokens - num_pages * block_tokens,
            )
            for one in members
        ]
    return (shared, own) if saved_pages * slice_bytes >= worth_bytes else None


class TableShape(NamedTuple):
    """What a launch's grid and buffers depend on.

    Attributes:
        num_sequences: Sequences, S.
        max_pages: Columns of the page table, at least 1.
        max_rows: Most query rows of one sequence.
        lengths: Tokens of each sequence as far as they shape a launch.
    """

    num_sequences: int
    max_pages: int
    max_rows: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> TableShape:
        """The shape of some runs."""
        return cls(
            len(runs),
            max(1, max([len(run.page_units) for run in runs])),
            max([run.num_rows for run in runs]),
            typical_lengths([run.num_tokens for run in runs]),
        )

    @property
    def num_words(self) -> int:
        """Words that a table takes."""
        return self.num_sequences * (self.max_pages + 2) + 1


class PageTable:
    """The int32 words of one `PrefixBatch`: pages [S, pages], lengths [S], query starts [S + 1].

    Args:
        shape: Its shape.
        host: int32 [num_words].
        device: Its twin, int32 [num_words].
    """

    def __init__(self, shape: TableShape, host: Words, device: torch.Tensor) -> None:
        self._shape = shape
        table_end = shape.num_sequences * shape.max_pages
        lengths_end = table_end + shape.num_sequences
        size = (shape.num_sequences, shape.max_pages)
        self._host = (
            host[:table_end].reshape(size), host[table_end:lengths_end], host[lengths_end:]
        )  # fmt: skip
        self._device = (
            device[:table_end].view(size), device[table_end:lengths_end], device[lengths_end:]
        )  # fmt: skip

    def write(self, runs: Sequence[Run]) -> None:
        """Writes runs of this shape."""
        table, lengths, starts = self._host
        lengths[:] = [run.num_tokens for run in runs]
        starts[:] = [0, *accumulate([run.num_rows for run in runs])]
        for row, (units, _, _, layer_units, _) in zip(table, runs, strict=True):
            if layer_units:
                np.add(units, layer_units, out=row[: len(units)])
            else:
                row[: len(units)] = units

    def prefix_batch(
        self, pool: torch.Tensor, slice_offset: int, positions: torch.Tensor | None
    ) -> PrefixBatch:
        """The batch of a launch.

        Args:
            pool: All pages.
            slice_offset: As in `PrefixBatch`.
            positions: As in `PrefixBatch`.
        """
        table, lengths, starts = self._device
        return PrefixBatch(
            memory=pool,
            page_table=table,
            slice_offset=slice_offset,
            lengths=lengths,
            query_starts=starts,
            max_rows=self._shape.max_rows,
            positions=positions,
            known_lengths=self._shape.lengths,
        )
