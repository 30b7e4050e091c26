"""Page tables of a launch: what each run of query rows reads, and what several runs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np
import numpy.typing as npt
import torch

from polarcache.kernels.attention.batch import PrefixBatch

__all__ = ["PageTable", "Run", "split_shared"]

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Run:
    """Query rows, one after the other, that read the same pages: one sequence of a launch.

    Attributes:
        page_units: int32 [pages], places of the pages in the pool, in page units.
        num_tokens: Tokens of them.
        num_rows: Query rows.
        request: Number of a request of it, whose layer is the layer of all.
        group: Runs that may begin with the same pages, for the same layer, have equal ones.
    """

    page_units: Words
    num_tokens: int
    num_rows: int
    request: int = 0
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
    shared: list[Run] = []
    own: list[Run] = []
    saved_pages = 0
    for _, group in groupby(runs, key=lambda run: run.group):
        members = list(group)
        num_pages = 0
        if len(members) > 1:
            num_pages = min(one.num_tokens // block_tokens for one in members)
            table = np.stack([one.page_units[:num_pages] for one in members])
            differs = (table != table[0]).any(0)
            num_pages = int(differs.argmax()) if differs.any() else num_pages
        saved_pages += (len(members) - 1) * num_pages
        num_rows = sum(one.num_rows for one in members)
        units = members[0].page_units[:num_pages]
        shared.append(Run(units, num_pages * block_tokens, num_rows, members[0].request))
        own += [
            replace(
                one,
                page_units=one.page_units[num_pages:],
                num_tokens=one.num_tokens - num_pages * block_tokens,
            )
            for one in members
        ]
    return (shared, own) if saved_pages * slice_bytes >= worth_bytes else None


class PageTable:
    """The int32 words of one `PrefixBatch`: pages [S, pages], lengths [S], query starts [S + 1].

    Args:
        runs: The S sequences, in the order of their rows.

    Attributes:
        num_words: Words that it takes.
        num_sequences: Sequences, S.
        max_pages: Columns of the table, at least 1.
        max_rows: Most query rows of one sequence.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.num_sequences = len(runs)
        self.max_pages = max(1, *(len(run.page_units) for run in runs))
        self.max_rows = max(run.num_rows for run in runs)
        self.num_words = self.num_sequences * (self.max_pages + 2) + 1
        self._requests = np.array([run.request for run in runs])
        self._lengths = [run.num_tokens for run in runs]
        self._starts = [0, *accumulate(run.num_rows for run in runs)]
        self._units = np.zeros((self.num_sequences, self.max_pages), np.int32)
        for units, run in zip(self._units, runs, strict=True):
            units[: len(run.page_units)] = run.page_units

    def place(self, host: Words, device: torch.Tensor) -> None:
        """Makes the views.

        Args:
            host: int32 [num_words].
            device: Its twin, int32 [num_words].
        """
        table_end = self.num_sequences * self.max_pages
        lengths_end = table_end + self.num_sequences
        shape = (self.num_sequences, self.max_pages)
        self._host = (
            host[:table_end].reshape(shape), host[table_end:lengths_end], host[lengths_end:]
        )  # fmt: skip
        self._device = (
            device[:table_end].view(shape), device[table_end:lengths_end], device[lengths_end:]
        )  # fmt: skip

    def write(self, request_units: Words | None) -> None:
        """Writes the words.

        Args:
            request_units: int32, place of each request's layer in a page, in page units; None to
                leave layers out.
        """
        table, lengths, starts = self._host
        lengths[:] = self._lengths
        starts[:] = self._starts
        if request_units is None:
            table[:] = self._units
        else:
            np.add(self._units, request_units[self._requests, None], out=table)

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
            max_rows=self.max_rows,
            positions=positions,
            known_lengths=self._lengths,
        )
