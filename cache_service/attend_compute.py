"""Computes a batch of attention requests in one launch: staging, page table, kernel.

One thread at a time uses an `AttendCompute`. What goes in (page table, lengths, queries) lies in
one host buffer and what comes out (out, lse) in another, so that a GPU takes one copy each way;
buffers only grow. On the CPU the kernel works on the host buffers themselves.

A GPU has two, so that one launch computes while another's answers and requests travel. Their
kernels go through one stream, in turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from polarcache.cache_service.attend_plan import (
    LayerQuery,
    Plan,
    PlanShape,
    Staging,
    arrange,
    grown,
)
from polarcache.cache_service.attend_prefix import HeldPrefix
from polarcache.cache_service.attend_tables import Run, TableShape, split_shared
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES
from polarcache.kernels.attention.merge import merge_states

__all__ = ["AttendCompute", "Computed"]

QueryT = TypeVar("QueryT", bound=LayerQuery)

_MAX_PLANS = 256
_GPU_LANES = 2
_by_place = attrgetter("place")
# The stream that each thread launches in.
_entered = threading.local()
# Two launches and a merge instead of one cost about 100 us on a GPU, in which it reads this much.
# An estimate, not a measurement. On the CPU nothing is shared: it computes run by run.
_WORTH_BYTES = 400_000_000


class Computed(NamedTuple, Generic[QueryT]):
    """Answers of a launch; the views are valid until the next one.

    Attributes:
        requests: The requests, in the order of the answers.
        answers: For each request the bytes of `out` and of `lse`.
        kernel_ns: Time of the kernel.
    """

    requests: Sequence[QueryT]
    answers: list[tuple[memoryview, memoryview]]
    kernel_ns: int


class AttendCompute:
    """Buffers of one launch at a time, and its kernels. Used by one thread at a time.

    Args:
        pool: All pages, uint8.
        worth_bytes: As for `split_shared`. None for the device's own.
        stream: CUDA stream; None for one of its own.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        worth_bytes: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._pool = pool
        if worth_bytes is None and pool.is_cuda:
            worth_bytes = _WORTH_BYTES
        self._worth_bytes = worth_bytes
        self._inputs = Staging(pool.device)
        self._outputs = Staging(pool.device)
        self._workspace: torch.Tensor | None = None
        # Launches differ by their sizes alone: most find their plan.
        self._plans: dict[PlanShape, Plan] = {}
        # The plan whose page tables lie in the input, and of whom if of a request alone.
        self._last_plan: Plan
        self._alone: tuple[HeldPrefix, int] | None = None
        self._under_way: tuple[Plan, Sequence[LayerQuery]] | None = None
        self._kernel_ns = 0
        self._is_cuda = pool.is_cuda
        if self._is_cuda:
            self._stream = stream or torch.cuda.Stream(pool.device)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
            self._done = torch.cuda.Event()

    @classmethod
    def lanes(cls, pool: torch.Tensor) -> list[AttendCompute]:
        """As many as the device has use for."""
        if not pool.is_cuda:
            return [cls(pool)]
        stream = torch.cuda.Stream(pool.device)
        return [cls(pool, stream=stream) for _ in range(_GPU_LANES)]

    def run(self, requests: Sequence[QueryT]) -> Computed[QueryT]:
        """Answers requests of one launch key."""
        self.begin(requests)
        return self.finish()

    def begin(self, requests: Sequence[LayerQuery]) -> None:
        """Launches requests of one launch key; on the CPU, computes them. `finish` must follow."""
        first = requests[0]
        slice_offset = first.layer * first.prefix.slice_bytes
        alone, self._alone = self._alone, None
        if (
            len(requests) == 1
            and alone is not None
            and alone[0] is first.prefix
            and alone[1] == first.num_tokens
        ):
            # As the launch before: its page table is there, and fits any layer.
            plan = self._last_plan
        else:
            is_mixed = False
            if len(requests) > 1:
                requests = sorted(requests, key=_by_place)
                is_mixed = any(one.layer != first.layer for one in requests)
                if is_mixed:
                    slice_offset %= PAGE_UNIT_BYTES
            tables = self._tables_of(requests, is_mixed=is_mixed)
            plan = self._last_plan = self._plan_of(requests, tables)
            plan.write_tables(tables)
        plan.write_queries(requests)
        if len(requests) == 1:
            self._alone = first.prefix, first.num_tokens
        if self._is_cuda:
            self._enter_stream()
            plan.upload()
            self._begin.record(self._stream)
            self._launch(plan, slice_offset)
            self._end.record(self._stream)
            plan.download()
            self._done.record(self._stream)
        else:
            start_ns = time.monotonic_ns()
            self._launch(plan, slice_offset)
            self._kernel_ns = time.monotonic_ns() - start_ns
        self._under_way = plan, requests

    def is_done(self) -> bool:
        """Whether `finish` will not wait."""
        return not self._is_cuda or self._done.query()

    def wait(self) -> None:
        """Sleeps until `is_done`."""
        if self._is_cuda:
            self._done.synchronize()

    def finish(self) -> Computed[Any]:
        """Waits for what was begun; the answers are valid until the next launch begins."""
        if self._under_way is None:
            raise RuntimeError("finish before begin")
        plan, requests = self._under_way
        self._under_way = None
        if self._is_cuda:
            self._done.synchronize()
            self._kernel_ns = int(self._begin.elapsed_time(self._end) * 1e6)
        return Computed(requests, plan.answers(requests), self._kernel_ns)

    def _enter_stream(self) -> None:
        """Makes the stream that of the calling thread, for good.

        To set it for each launch and put the old one back would cost as much as the launch.
        """
        if getattr(_entered, "stream", None) is not self._stream:
            torch.cuda.set_stream(self._stream)
            _entered.stream = self._stream

    def _launch(self, plan: Plan, slice_offset: int) -> None:
        attention = plan.attention
        if plan.launches is None:
            plan.launches = [
                attention.prepare(plan.query, batch, *state, self._workspace)
                for batch, state in zip(
                    plan.prefix_batches(self._pool, slice_offset), plan.states, strict=True
                )
            ]
        if None in plan.launches:
            for batch, (out, lse) in zip(
                plan.prefix_batches(self._pool, slice_offset), plan.states, strict=True
            ):
                attention(plan.query, batch, out, lse, self._workspace)
        else:
            handle = self._stream.cuda_stream
            for launch in plan.launches:
                assert launch is not None
                launch(slice_offset, handle)
        if len(plan.states) == 2:
            (out, lse), own = plan.states
            merged_out, merged_lse = merge_states(out, lse, *own)
            out.copy_(merged_out)
            lse.copy_(merged_lse)

    def _tables_of(
        self, requests: Sequence[LayerQuery], *, is_mixed: bool
    ) -> tuple[Sequence[Run], ...]:
        """The runs of one page table; of two where leading pages are to be read once."""
        runs = arrange(requests, in_tables=is_mixed)
        # Positions count from a sequence's first token: with a window it cannot be cut.
        if self._worth_bytes is not None and len(runs) > 1:
            prefix = requests[0].prefix
            if not prefix.kind.options.window:
                block_tokens = prefix.namespace.spec.layout.block_tokens
                split = split_shared(runs, block_tokens, prefix.slice_bytes, self._worth_bytes)
                if split is not None:
                    return split
        return (runs,)

    def _plan_of(self, requests: Sequence[LayerQuery], tables: Sequence[Sequence[Run]]) -> Plan:
        num_rows = sum([run.num_rows for run in tables[0]])
        prefix = requests[0].prefix
        shape = PlanShape(prefix.kind, num_rows, tuple([TableShape.of(runs) for runs in tables]))
        plan = self._plans.get(shape)
        if plan is None:
            plan = Plan(shape, prefix)
            self._place(plan)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[shape] = plan
        return plan

    def _place(self, plan: Plan) -> None:
        grew = self._inputs.reserve(plan.input_bytes)
        grew |= self._outputs.reserve(plan.staged_output_bytes)
        num_bytes = plan.workspace_bytes
        if num_bytes and (self._workspace is None or len(self._workspace) < num_bytes):
            size = grown(num_bytes)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._pool.device)
            grew = True
        if grew:
            # Their views are of the old buffers.
            self._plans.clear()
        plan.place(self._inputs, self._outputs)
