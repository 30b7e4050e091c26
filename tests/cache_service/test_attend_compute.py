"""Launches of many requests give what each gives alone, whatever company it is in."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polarcache.cache_service import attend_compute
from polarcache.cache_service.attend_compute import AttendCompute
from polarcache.cache_service.attend_plan import LayerQuery
from polarcache.cache_service.attend_prefix import AttendKind
from polarcache.kernels.attention.batch import PAGE_UNIT_BYTES
from polarcache.kernels.attention.options import AttentionOptions
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.kernels.codec import Codec
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.profile import Profile

HEADS, LAYERS, TOKENS = 4, 3, 32
# Slices of 1024 bytes, and of a size that is no multiple of page units.
SHAPES = {"whole units": ("exact", 2, 16), "odd units": ("k=exact,v=int4", 1, 16)}
# The same sums in another order.
TOLERANCE = 1e-5
# Queries, weights and values are fp16 in the tensor cores.
GPU_TOLERANCE = 5e-3


class World:
    """A pool with pages of random blocks."""

    def __init__(
        self, profile: str, kv_heads: int, head_dim: int, window: int = 0, tokens: int = TOKENS
    ) -> None:
        self.tokens = tokens
        shape = BlockShape(
            tokens=tokens, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=head_dim,
            pairing="half", rotary_dim=head_dim,
        )  # fmt: skip
        codec = Codec(Profile.parse(profile), shape, torch.float16)
        self.head_dim = head_dim
        self.slice_bytes = codec.layout.slice_bytes
        self.units = -(-LAYERS * self.slice_bytes // PAGE_UNIT_BYTES)
        self.pool = torch.zeros(12 * self.units * PAGE_UNIT_BYTES, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(1)
        for page in range(12):
            sides = torch.randn(2, LAYERS, tokens, kv_heads, head_dim, generator=generator).half()
            start = page * self.units * PAGE_UNIT_BYTES
            out = self.pool[start : start + LAYERS * self.slice_bytes].view(LAYERS, -1)
            codec.encode(sides[0], sides[1], out)
        options = AttentionOptions(window=window, sink_tokens=2 if window else 0)
        self.kind = AttendKind(
            HEADS, torch.float16, options, PrefixAttention(codec, HEADS, options)
        )

    def query(self, pages: list[int], num_tokens: int, layer: int, rows: int, seed: int) -> Any:
        """A request; prefixes of equal pages and tokens are one."""
        units = np.array(pages, dtype=np.int32) * self.units
        prefix: Any = SimpleNamespace(
            kind=self.kind,
            num_tokens=num_tokens,
            page_units=units,
            first_unit=int(units[0]),
            identity=num_tokens.to_bytes(4, "little") + units.tobytes(),
            slice_bytes=self.slice_bytes,
            namespace=SimpleNamespace(
                spec=SimpleNamespace(layout=SimpleNamespace(block_tokens=self.tokens))
            ),
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            query_token_bytes=HEADS * self.head_dim * 2,
            answer_token_bytes=HEADS * (self.head_dim + 1) * 4,
        )
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(rows, HEADS, self.head_dim, generator=generator).half()
        payload = queries.numpy().tobytes()
        return LayerQuery(prefix, layer, rows, payload, position=num_tokens + seed)


def answers(compute: AttendCompute, requests: list[Any]) -> list[np.ndarray]:
    computed = compute.run(requests)
    assert computed.kernel_ns > 0
    got = {
        id(request): np.concatenate([np.frombuffer(bytes(side), np.float32) for side in one])
        for request, one in zip(computed.requests, computed.answers, strict=True)
    }
    return [got[id(request)] for request in requests]


@pytest.mark.parametrize("window", [0, 40], ids=["all", "window"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_company_gives_what_each_gets_alone(shape: str, window: int) -> None:
    world = World(*SHAPES[shape], window)
    assert (world.slice_bytes % PAGE_UNIT_BYTES == 0) == (shape == "whole units")
    prefixes = [([3, 1, 7], 90), ([3, 1, 7], 96), ([3, 1, 7], 90), ([5], 1), ([0, 11, 2, 4], 128)]
    requests = [
        world.query(pages, tokens, layer, 1 + seed % 3, seed)
        for seed, ((pages, tokens), layer) in enumerate(itertools.product(prefixes, range(LAYERS)))
    ]
    alone = {id(one): answers(AttendCompute(world.pool), [one])[0] for one in requests}
    compute = AttendCompute(world.pool)
    by_key: dict[object, list[Any]] = {}
    for request in requests:
        by_key.setdefault(request.launch_key[1], []).append(request)
    # All layers whose places in a page leave the same rest, then each layer for itself, twice.
    groups = list(by_key.values())
    assert len(groups) == (1 if shape == "whole units" else 2)
    groups += 2 * [[one for one in requests if one.layer == layer] for layer in range(LAYERS)]
    groups += [[one] for one in requests]
    for group in groups:
        for request, got in zip(group, answers(compute, group), strict=True):
            np.testing.assert_allclose(got, alone[id(request)], atol=TOLERANCE)


def test_leading_pages_that_differing_prefixes_share_are_read_once() -> None:
    world = World(*SHAPES["whole units"])
    prefixes = [
        ([3, 1, 7, 4], 128), ([3, 1, 7], 96), ([3, 1, 8, 2], 100), ([5, 6], 64), ([5, 6], 33),
        ([9], 20), ([9], 32), ([10, 3], 64),
    ]  # fmt: skip
    requests = [
        world.query(pages, tokens, 1, 1 + seed % 2, seed)
        for seed, (pages, tokens) in enumerate(prefixes)
    ]
    alone = [answers(AttendCompute(world.pool), [one])[0] for one in requests]
    # 3, 1 is shared by three; 5 by two; 9 by none, since one of them sees a part of it.
    saved_bytes = (2 * 2 + 1) * world.slice_bytes
    for worth_bytes, num_launches in ((saved_bytes, 2), (saved_bytes + 1, 1)):
        compute = AttendCompute(world.pool, worth_bytes)
        for order in (requests, requests[::-1]):
            got = answers(compute, order)
            for request, one in zip(order, got, strict=True):
                expected = alone[requests.index(request)]
                np.testing.assert_allclose(one, expected, atol=TOLERANCE)
            (plan,) = compute._plans.values()
            assert len(plan.states) == num_launches
    mixed = [world.query(pages, tokens, layer, 1, 0) for pages, tokens in prefixes
             for layer in range(LAYERS)]  # fmt: skip
    alone = [answers(AttendCompute(world.pool), [one])[0] for one in mixed]
    compute = AttendCompute(world.pool, 1)
    for one, expected in zip(answers(compute, mixed), alone, strict=True):
        np.testing.assert_allclose(one, expected, atol=TOLERANCE)


def test_buffers_grow_and_plans_of_the_old_ones_are_forgotten() -> None:
    world = World(*SHAPES["whole units"])
    compute = AttendCompute(world.pool)
    small = world.query([3, 1], 64, 1, 1, 0)
    large = world.query([3, 1], 64, 1, 900, 1)
    first = answers(compute, [small])[0]
    expected = answers(AttendCompute(world.pool), [large])[0]
    np.testing.assert_allclose(answers(compute, [large])[0], expected, atol=TOLERANCE)
    np.testing.assert_array_equal(answers(compute, [small])[0], first)
    np.testing.assert_allclose(answers(compute, [large])[0], expected, atol=TOLERANCE)


def test_many_companies_do_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_compute, "_MAX_PLANS", 4)
    world = World(*SHAPES["whole units"])
    compute = AttendCompute(world.pool)
    for rows in range(1, 11):
        answers(compute, [world.query([3], 32, 0, rows, 0)])
        assert 1 <= len(compute._plans) <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["k=pair:r4t4,v=int4", "exact"], ids=["fast", "portable"])
def test_on_a_gpu_two_launches_under_way_give_what_the_cpu_gives(profile: str) -> None:
    world = World(profile, 2, 64, tokens=128)
    prefixes = [([3, 1, 7], 300), ([3, 1, 7], 384), ([5], 1), ([0, 11, 2, 4], 512)]
    expected = AttendCompute(world.pool)
    lanes = AttendCompute.lanes(world.pool.cuda())
    assert len(lanes) == 2
    for trial in range(6):
        # One layer, several layers, and company that changes: plans and tables are made again.
        companies = [
            [
                world.query(*prefixes[(i + trial) % 4], (i * (trial % 2)) % LAYERS, 1 + i % 2, i)
                for i in range(size)
            ]
            for size in (1 + trial, 7)
        ]
        for lane, company in zip(lanes, companies, strict=True):
            lane.begin(company)
        for lane, company in zip(lanes, companies, strict=True):
            computed = lane.finish()
            got = {
                id(request): [np.frombuffer(bytes(side), np.float32) for side in one]
                for request, one in zip(computed.requests, computed.answers, strict=True)
            }
            for request, one in zip(company, answers(expected, company), strict=True):
                np.testing.assert_allclose(
                    np.concatenate(got[id(request)]), one, atol=GPU_TOLERANCE
                )
