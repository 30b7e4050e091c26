"""Computes a batch of attention requests in one launch: staging, page table, kernel.

One thread owns an `AttendCompute`. What goes in (page table, lengths, queries) lies in one host
buffer and what comes out (out, lse) in another, so that a GPU takes one copy each way; buffers
only grow. On the CPU the kernel works on the host buffers themselves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polarcache.cache_service.attend_plan import LayerQuery, Plan, Staging, grown
from polarcache.kernels.attention.merge import merge_states
from polarcache.kernels.attention.prefix import PrefixAttention

__all__ = ["AttendCompute", "Computed"]

_MAX_PLANS = 256
# Two launches and a merge instead of one cost about 100 us on a GPU, in which it reads this much.
# An estimate, not a measurement. On the CPU nothing is shared: it computes run by run.
_WORTH_BYTES = 400_000_000


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
        worth_bytes: As for `Plan`. None for the device's own.
    """

    def __init__(self, pool: torch.Tensor, worth_bytes: int | None = None) -> None:
        self._pool = pool
        if worth_bytes is None and pool.is_cuda:
            worth_bytes = _WORTH_BYTES
        self._worth_bytes = worth_bytes
        self._inputs = Staging(pool.device)
        self._outputs = Staging(pool.device)
        self._workspace: torch.Tensor | None = None
        # Streams that decode come again in the same company: most launches find their plan.
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._last_plan: Plan | None = None
        self._is_cuda = pool.is_cuda
        if self._is_cuda:
            torch.cuda.set_device(pool.device)
            self._stream = torch.cuda.Stream(pool.device)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)

    def run(self, requests: Sequence[LayerQuery]) -> Computed:
        """Answers requests of one launch key."""
        plan = self._plan_of(requests)
        if plan is not self._last_plan:
            plan.write_tables()
            self._last_plan = plan
        plan.write_queries(requests)
        attention = requests[0].prefix.kind.attention
        if self._is_cuda:
            with torch.cuda.stream(self._stream):
                self._inputs.upload(plan.input_bytes)
                self._begin.record(self._stream)
                self._launch(attention, plan, requests[0])
                self._end.record(self._stream)
                self._outputs.download(plan.output_bytes)
                self._stream.synchronize()
            kernel_ns = int(self._begin.elapsed_time(self._end) * 1e6)
        else:
            start_ns = time.monotonic_ns()
            self._launch(attention, plan, requests[0])
            kernel_ns = time.monotonic_ns() - start_ns
        return Computed(plan.answers, kernel_ns)

    def _launch(self, attention: PrefixAttention, plan: Plan, first: LayerQuery) -> None:
        workspace = self._workspace_of(plan.workspace_bytes)
        batches = plan.prefix_batches(self._pool, first)
        for batch, (out, lse) in zip(batches, plan.states, strict=True):
            attention(plan.query, batch, out, lse, workspace)
        if len(batches) == 2:
            (out, lse), own = plan.states
            merged_out, merged_lse = merge_states(out, lse, *own)
            out.copy_(merged_out)
            lse.copy_(merged_lse)

    def _plan_of(self, requests: Sequence[LayerQuery]) -> Plan:
        first = requests[0]
        key: tuple[object, ...] = (first.prefix.kind, first.prefix.identity, first.num_tokens)
        if len(requests) > 1:
            if any(request.layer != first.layer for request in requests):
                # Their layers are in the page table: of no use to another launch.
                plan = Plan(requests, self._worth_bytes)
                self._place(plan)
                return plan
            key = (key, *((one.prefix.identity, one.num_tokens) for one in requests))
        found = self._plans.get(key)
        if found is not None:
            return found
        plan = Plan(requests, self._worth_bytes)
        self._place(plan)
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan

    def _place(self, plan: Plan) -> None:
        grew = self._inputs.reserve(plan.input_bytes)
        grew |= self._outputs.reserve(plan.staged_output_bytes)
        if grew:
            # Their views are of the old buffers.
            self._plans.clear()
        plan.place(self._inputs, self._outputs)

    def _workspace_of(self, num_bytes: int) -> torch.Tensor | None:
        if num_bytes and (self._workspace is None or len(self._workspace) < num_bytes):
            size = grown(num_bytes)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._pool.device)
        return self._workspace
