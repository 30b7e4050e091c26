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
from polarcache.kernels.attention.prefix import PrefixAttention

__all__ = ["AttendCompute", "Computed"]

_MAX_PLANS = 256


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
            plan.write_table()
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
        batch = plan.prefix_batch(self._pool, first)
        attention(plan.query, batch, plan.out, plan.lse, self._workspace_for(attention, plan))

    def _plan_of(self, requests: Sequence[LayerQuery]) -> Plan:
        first = requests[0]
        key: tuple[object, ...] = (first.prefix.kind, first.prefix.identity, first.num_tokens)
        if len(requests) > 1:
            if any(request.layer != first.layer for request in requests):
                # Their layers are in the page table: of no use to another launch.
                plan = Plan(requests)
                self._place(plan)
                return plan
            key = (key, *((one.prefix.identity, one.num_tokens) for one in requests))
        found = self._plans.get(key)
        if found is not None:
            return found
        plan = Plan(requests)
        self._place(plan)
        if len(self._plans) >= _MAX_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan

    def _place(self, plan: Plan) -> None:
        grew = self._inputs.reserve(plan.input_bytes)
        grew |= self._outputs.reserve(plan.output_bytes)
        if grew:
            # Their views are of the old buffers.
            self._plans.clear()
        plan.place(self._inputs, self._outputs)

    def _workspace_for(self, attention: PrefixAttention, plan: Plan) -> torch.Tensor | None:
        num_bytes = attention.workspace_bytes(plan.num_rows, plan.num_sequences, plan.max_pages)
        if num_bytes and (self._workspace is None or len(self._workspace) < num_bytes):
            size = grown(num_bytes)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._pool.device)
        return self._workspace
