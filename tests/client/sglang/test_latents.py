"""Multi-head latent attention: pools of one vector a token, the same on every rank."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polarcache.client.sglang.pages import PagePool
from polarcache.proto.errors import LayoutMismatchError, UnsupportedError
from tests.client.sglang.sglang_pages import KEYS, LAYERS, PAGE_TOKENS, PAGES, slots

LATENT, TURNED = 512, 64
LAYOUTS = ["layer_first", "page_first", "page_first_direct"]
MLA = {"is_mla_model": True}


def make_pool(layout: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A host pool with the attributes of SGLang's `MLATokenToKVPoolHost`."""
    width = LATENT + TURNED
    shape = {
        "layer_first": (LAYERS, PAGES * PAGE_TOKENS, 1, width),
        "page_first": (PAGES * PAGE_TOKENS, LAYERS, 1, width),
        "page_first_direct": (PAGES, LAYERS, PAGE_TOKENS, 1, width),
    }[layout]
    buffer = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return SimpleNamespace(
        layout=layout, kv_buffer=buffer, dtype=dtype, layer_num=LAYERS, page_size=PAGE_TOKENS,
        kv_lora_rank=LATENT, qk_rope_head_dim=TURNED, kv_cache_dim=width,
    )  # fmt: skip


def vectors(pool: Any, page: int) -> torch.Tensor:
    """A page's vectors [L, P, 1, C], whatever the layout."""
    if pool.layout == "page_first_direct":
        return pool.kv_buffer[page]
    part = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
    if pool.layout == "layer_first":
        return pool.kv_buffer[:, part]
    return pool.kv_buffer[part].transpose(0, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_come_back_to_other_places_and_layouts(start_backend: Any, layout: str) -> None:
    one = make_pool(layout)
    backend = start_backend(one, MLA)
    assert backend.batch_set_v1(KEYS[:3], slots(4, 0, 2)) == [True] * 3
    for other in [make_pool(name, seed=1) for name in LAYOUTS]:
        untouched = vectors(other, 5).clone()
        reader = start_backend(other, MLA)
        assert reader.batch_exists(KEYS) == 3
        assert reader.batch_get_v1(KEYS[:4], slots(1, 3, 0, 5)) == [True, True, True, False]
        for stored, loaded in zip((4, 0, 2), (1, 3, 0), strict=True):
            assert torch.equal(vectors(one, stored), vectors(other, loaded))
        assert torch.equal(vectors(other, 5), untouched)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_and_pool_pages_are_the_same(start_backend: Any, layout: str) -> None:
    pool = make_pool(layout)
    backend = start_backend(pool, MLA)
    # As SGLang's `get_data_page` makes one: in the order of the layout.
    flat = {
        "layer_first": pool.kv_buffer[:, :PAGE_TOKENS],
        "page_first": pool.kv_buffer[:PAGE_TOKENS],
        "page_first_direct": pool.kv_buffer[:1],
    }[layout].flatten()
    assert backend.set(KEYS[0], flat)
    assert torch.equal(backend.get(KEYS[0]), flat)
    assert backend.batch_get_v1(KEYS[:1], slots(3)) == [True]
    assert torch.equal(vectors(pool, 0), vectors(pool, 3))
    with pytest.raises(LayoutMismatchError, match="flat page"):
        backend.set(KEYS[1], flat[:-1])


def test_one_rank_stores_and_ranks_of_any_number_read(start_backend: Any) -> None:
    pool = make_pool("page_first")
    follower = start_backend(pool, MLA | {"tp_rank": 1, "tp_size": 2, "is_storage_writer": False})
    writer = start_backend(pool, MLA | {"tp_size": 2})
    # The engine takes what is not written here as written: the other rank does it.
    assert follower.batch_set_v1(KEYS[:2], slots(0, 1)) == [True, True]
    assert writer.batch_exists(KEYS) == 0
    assert writer.batch_set_v1(KEYS[:2], slots(0, 1)) == [True, True]
    assert follower.batch_exists(KEYS) == 2
    assert start_backend(pool, MLA | {"tp_rank": 3, "tp_size": 4}).batch_exists(KEYS) == 2
    assert start_backend(pool, MLA | {"pp_rank": 1, "pp_size": 2}).batch_exists(KEYS) == 0


@pytest.mark.parametrize(
    ("latent", "turned", "heads"), [(512, 64, 2), (256, 32, 1), (192, 64, 1), (1024, 64, 4)]
)
def test_vectors_split_into_as_few_heads_as_can_be(latent: int, turned: int, heads: int) -> None:
    pool = make_pool("page_first")
    pool.kv_buffer = torch.randn(PAGE_TOKENS, LAYERS, 1, latent + turned).to(pool.dtype)
    pool.kv_lora_rank, pool.qk_rope_head_dim, pool.kv_cache_dim = latent, turned, latent + turned
    made = PagePool.of(pool)
    assert (made.num_heads, made.head_dim, made.v_head_dim) == (
        heads, turned // heads, latent // heads,
    )  # fmt: skip
    ((keys, values),) = made.pages(slots(0), 1)
    joined = torch.cat([values.flatten(-2), keys.flatten(-2)], -1)
    assert torch.equal(joined, pool.kv_buffer[:, :, 0].transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kv_cache_dim": 656}, UnsupportedError, "656 elements, expected 576"),
        ({"kv_lora_rank": 500, "kv_cache_dim": 564}, LayoutMismatchError, "kv_buffer"),
        ({"layout": "page_head"}, UnsupportedError, "hicache-mem-layout"),
        ({"layout": "page_first_kv_split"}, UnsupportedError, "hicache-mem-layout"),
        ({"dtype": torch.float8_e4m3fn}, UnsupportedError, "kv-cache-dtype"),
        ({"kv_buffer": None}, UnsupportedError, "kv_buffer"),
        ({"layer_num": LAYERS + 1}, LayoutMismatchError, "kv_buffer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pools_of_other_vectors_are_refused(change: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        PagePool.of(SimpleNamespace(**(vars(make_pool("page_first")) | change)))


def test_vectors_that_do_not_split_are_refused() -> None:
    pool = make_pool("page_first")
    pool.kv_lora_rank, pool.qk_rope_head_dim = 520, 56
    with pytest.raises(UnsupportedError, match="520 and 56"):
        PagePool.of(pool)
