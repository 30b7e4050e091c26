"""The backend without SGLang: pools and configuration as SGLang has them, a real service."""

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polarcache.client.sglang.backend import block_key
from polarcache.client.sglang.pages import PagePool
from polarcache.proto.errors import (
    InvalidRequestError,
    LayoutMismatchError,
    PolarCacheError,
    UnsupportedError,
)
from tests.client.sglang.sglang_pages import KEYS, LAYERS, PAGE_TOKENS, PAGES, slots

HEADS, HEAD_DIM = 2, 32
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]


def make_pool(layout: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> Any:
    """A host pool with the attributes and methods of SGLang's."""
    shape = {
        "layer_first": (2, LAYERS, PAGES * PAGE_TOKENS, HEADS, HEAD_DIM),
        "page_first": (2, PAGES * PAGE_TOKENS, LAYERS, HEADS, HEAD_DIM),
        "page_first_direct": (2, PAGES, LAYERS, PAGE_TOKENS, HEADS, HEAD_DIM),
        "page_head": (2, PAGES, HEADS, PAGE_TOKENS, LAYERS, HEAD_DIM),
    }[layout]
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(*shape, generator=generator).to(dtype)
    return SimpleNamespace(
        layout=layout, kv_buffer=buffer, k_buffer=buffer[0], v_buffer=buffer[1], dtype=dtype,
        layer_num=LAYERS, page_size=PAGE_TOKENS, head_num=HEADS, head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
    )  # fmt: skip


def flat_page(pool: Any, page: int) -> torch.Tensor:
    """The tokens of a page, in the order of the pool's layout."""
    if pool.layout == "layer_first":
        part = pool.kv_buffer[:, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
    elif pool.layout == "page_first":
        part = pool.kv_buffer[:, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS]
    else:
        part = pool.kv_buffer[:, page : page + 1]
    return part.flatten()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_pages_of_a_pool_come_back_to_other_places(
    start_backend: Any, layout: str, dtype: torch.dtype
) -> None:
    one, other = make_pool(layout, dtype), make_pool(layout, dtype, seed=1)
    backend, reader = start_backend(one), start_backend(other)
    before = flat_page(other, 5).clone()

    assert backend.batch_set_v1(KEYS[:3], slots(4, 0, 2)) == [True] * 3
    assert reader.batch_exists(KEYS) == 3
    got = reader.batch_get_v1(KEYS[:4], slots(1, 3, 0, 5))

    assert got == [True, True, True, False]
    for stored, loaded in zip((4, 0, 2), (1, 3, 0), strict=True):
        assert torch.equal(flat_page(one, stored), flat_page(other, loaded))
    assert torch.equal(before, flat_page(other, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flat_pages_and_pool_pages_are_the_same(start_backend: Any, layout: str) -> None:
    pool = make_pool(layout)
    backend = start_backend(pool)
    pages = [flat_page(pool, page).clone() for page in range(3)]

    assert backend.set(KEYS[0], pages[0])
    assert backend.batch_set(KEYS[1:3], pages[1:])
    assert [backend.exists(key) for key in KEYS[:4]] == [True, True, True, False]
    assert torch.equal(backend.get(KEYS[1]), pages[1])
    target = torch.zeros_like(pages[2])
    assert backend.get(KEYS[2], target) is target
    assert torch.equal(target, pages[2])
    got = backend.batch_get(KEYS[:4], [torch.zeros_like(target) for _ in range(4)])
    assert got[3] is None
    assert all(torch.equal(a, b) for a, b in zip(got[:3], pages, strict=True))
    assert backend.get(KEYS[4]) is None

    pool.kv_buffer.zero_()
    assert backend.batch_get_v1(KEYS[:3], slots(0, 1, 2)) == [True] * 3
    assert all(torch.equal(flat_page(pool, page), pages[page]) for page in range(3))


def test_a_pool_of_another_layout_reads_the_same_tokens(start_backend: Any) -> None:
    one = make_pool("layer_first")
    start_backend(one).batch_set_v1(KEYS[:2], slots(0, 1))
    for layout in LAYOUTS[1:]:
        other = make_pool(layout, seed=1)
        assert start_backend(other).batch_get_v1(KEYS[:2], slots(2, 3)) == [True, True]
        for mine, theirs in zip(
            PagePool.of(one).pages(slots(0, 1), 2),
            PagePool.of(other).pages(slots(2, 3), 2),
            strict=True,
        ):
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1], theirs[1])


def test_the_longest_prefix_counts(start_backend: Any) -> None:
    backend = start_backend(make_pool("page_first"))
    backend.batch_set_v1([KEYS[0], KEYS[1], KEYS[3]], slots(0, 1, 3))
    assert backend.batch_exists(KEYS) == 2
    assert backend.batch_exists(KEYS[2:]) == 0
    assert backend.batch_get_v1(KEYS[:4], slots(0, 1, 2, 3)) == [True, True, False, False]
    assert backend.batch_exists([]) == 0
    assert backend.batch_get_v1([], slots()) == []


def test_ranks_models_and_options_do_not_see_each_other(start_backend: Any) -> None:
    def is_there(facts: Any = None, **options: Any) -> bool:
        return bool(start_backend(make_pool("page_first"), facts, **options).exists(KEYS[0]))

    first = start_backend(make_pool("page_first"))
    first.batch_set_v1(KEYS[:1], slots(0))
    assert is_there()
    assert is_there({"dp_rank": 3})
    for kind in ("tp", "pp"):
        rank = {f"{kind}_rank": 1, f"{kind}_size": 2}
        assert not is_there(rank)
        start_backend(make_pool("page_first"), rank).batch_set_v1(KEYS[:1], slots(0))
        assert is_there(rank)
        assert not is_there({f"{kind}_size": 2})
    assert not is_there(revision="2")
    assert not is_there(salt="s")
    assert not is_there(tenant="t")
    assert not is_there(profile="k=exact,v=int4")
    assert not is_there(model="another")


def test_clear_and_close(start_backend: Any) -> None:
    backend = start_backend(make_pool("page_first"))
    backend.batch_set_v1(KEYS[:2], slots(0, 1))
    loads, saves = backend.take_transfers()
    assert (loads.pages, saves.pages) == ([], [2])
    assert saves.gb_per_s[0] > 0
    backend.clear()
    assert backend.batch_exists(KEYS) == 0
    backend.close()
    assert backend.batch_get_v1(KEYS[:1], slots(0)) == [False]
    with pytest.raises(PolarCacheError, match="did not clear"):
        backend.clear()


def test_what_cannot_be_stored_is_refused_with_words(start_backend: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"MLA.*k=exact,v=int4"):
        start_backend(facts={"is_mla_model": True}, profile="k=exact,v=int4")
    with pytest.raises(UnsupportedError, match="dcp_size 2"):
        start_backend(facts={"is_mla_model": True, "dcp_size": 2})
    with pytest.raises(UnsupportedError, match="attn_cp_size 2"):
        start_backend(facts={"attn_cp_size": 2})
    with pytest.raises(UnsupportedError, match="tp_lcm_size"):
        start_backend(facts={"should_split_heads": True})
    with pytest.raises(UnsupportedError, match="mamba"):
        start_backend().register_mem_host_pool_v2(object(), "mamba")
    start_backend().register_mem_host_pool_v2(object(), "kv")
    with pytest.raises(InvalidRequestError, match="register_mem_pool_host"):
        start_backend().exists(KEYS[0])
    with pytest.raises(InvalidRequestError, match="model"):
        start_backend(make_pool("page_first"), {"model_name": None})

    pool = make_pool("page_first")
    for change, error, words in [
        ({"v_buffer": None}, UnsupportedError, "v_buffer"),
        ({"layout": "page_unified"}, UnsupportedError, "hicache-mem-layout"),
        ({"dtype": torch.uint8}, UnsupportedError, "kv-cache-dtype"),
        ({"stores_page_envelope": True}, UnsupportedError, "separate buffers"),
        ({"layer_num": LAYERS + 1}, LayoutMismatchError, "k_buffer"),
        ({"v_head_dim": 2 * HEAD_DIM}, LayoutMismatchError, "v_buffer"),
        ({"page_size": 1}, InvalidRequestError, "--page-size"),
    ]:
        with pytest.raises(error, match=words):
            start_backend(SimpleNamespace(**(vars(pool) | change)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"endpont": "grpc://x:1"}, "endpont.*options are endpoint"),
        ({"lookup_timeout_ms": 0}, "lookup_timeout_ms.*got 0"),
        ({"pack": "both"}, "pack"),
        ({"endpoint": "http://x"}, "endpoint must be"),
        ({"calibration_file": "/nowhere"}, "calibration_file"),
        ({"profile": "k=zip,v=int4"}, "profile"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_options_are_refused_when_the_engine_starts(
    start_backend: Any, options: Any, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        start_backend(make_pool("page_first"), **options)


def test_wrong_arguments_are_refused(start_backend: Any) -> None:
    backend = start_backend(make_pool("page_first"))
    with pytest.raises(LayoutMismatchError, match="host indices"):
        backend.batch_get_v1(KEYS[:2], slots(0))
    with pytest.raises(LayoutMismatchError, match="flat page"):
        backend.set(KEYS[0], torch.zeros(3))
    with pytest.raises(InvalidRequestError, match="2 keys"):
        backend.batch_set(KEYS[:2], [])


def test_block_keys_are_the_bytes_of_the_hash() -> None:
    assert block_key(KEYS[0]).hex() == KEYS[0]
    assert block_key("x" * 64) == hashlib.sha256(b"x" * 64).digest()
    assert block_key("ab") == hashlib.sha256(b"ab").digest()
