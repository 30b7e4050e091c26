"""SGLang's own `HiCacheController` with PolarCache behind it: backup, prefetch, failures."""

import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import base as pool_host_base
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.mha import get_mha_host_pool_cls
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel

from polarcache.client.sglang import PolarCacheHiCache
from polarcache.proto.errors import InvalidRequestError, UnsupportedError

PAGE_TOKENS = 64
LAYERS, HEADS, HEAD_DIM = 3, 2, 64
LATENT, TURNED = 512, 64
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
INTERFACES = {"v0": 0, "v1": 1}


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The engine leaves 10 GB of host memory alone; the pools of these tests take a few MB.
    monkeypatch.setattr(pool_host_base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", 0)
    ranks = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1}
    widths = {"attn_dp_size": 1, "attn_dp_enabled": False, "attn_dcp_size": 1, "attn_dcp_rank": 0}
    with get_parallel().override(**ranks, **widths):
        yield


@dataclasses.dataclass
class Engine:
    """What SGLang's scheduler does with its controller."""

    controller: HiCacheController
    host: Any

    def fill(self, num_pages: int, seed: int) -> torch.Tensor:
        """Fills pages of the host pool; the slots of their tokens, pages in no order."""
        slots = self.host.alloc(num_pages * PAGE_TOKENS)
        pages = list(slots.split(PAGE_TOKENS))
        generator = torch.Generator().manual_seed(seed)
        for page in pages:
            flat = torch.randn(self.flat(page).numel(), generator=generator)
            self.host.set_from_flat_data_page(int(page[0]), flat.to(self.host.dtype))
        return torch.cat(pages[::-1])

    def flat(self, page: torch.Tensor) -> torch.Tensor:
        return self.host.get_data_page(int(page[0])).clone()

    def flat_pages(self, slots: torch.Tensor) -> list[torch.Tensor]:
        return [self.flat(page) for page in slots.split(PAGE_TOKENS)]

    def backup(self, slots: torch.Tensor, tokens: list[int]) -> int:
        """Stores pages; how many tokens of them."""
        hashes = get_storage_hash_str(tokens, page_size=PAGE_TOKENS)
        self.controller.write_storage(slots, tokens, hashes)
        return self.controller.ack_backup_queue.get(timeout=30).completed_tokens

    def request(self) -> Any:
        """What the controller calls a request."""
        is_hybrid = isinstance(self.controller, HybridCacheController)
        return CacheRequestHandle("request", attempt_id=0) if is_hybrid else "request"

    def prefetch(self, tokens: list[int]) -> tuple[torch.Tensor, int]:
        """Reads the stored prefix of tokens; where it lies now and how long it is."""
        operation = self.controller.prefetch(self.request(), tokens)
        assert self.controller.prefetch_hit_queue.get(timeout=30) is operation
        operation.host_indices = self.host.alloc(operation.storage_hit_count)
        self.controller.prefetch_buffer.put(operation)
        completed = 0
        while not (ack := self.controller.ack_prefetch_queue.get(timeout=30)).completed_req:
            completed = ack.completed_tokens
        return operation.host_indices[:completed], completed


@pytest.fixture
def start_engine(service: Any, spec: Any) -> Iterator[Callable[..., Engine]]:
    with ExitStack() as stack:

        def start(
            layout: str = "page_first",
            interface: str = "v1",
            controller: str = "hybrid",
            **options: Any,
        ) -> Engine:
            sizes = {
                "size": PAGE_TOKENS * 8, "page_size": PAGE_TOKENS, "dtype": torch.float16,
                "layer_num": LAYERS, "device": "cpu", "enable_memory_saver": False,
            }  # fmt: skip
            is_latent = options.pop("is_latent", False)
            if is_latent:
                device = MLATokenToKVPool(kv_lora_rank=LATENT, qk_rope_head_dim=TURNED, **sizes)
            else:
                v_head_dim = options.pop("v_head_dim", None)
                device = MHATokenToKVPool(
                    head_num=HEADS, head_dim=HEAD_DIM, v_head_dim=v_head_dim, **sizes
                )
            allocator = PagedTokenToKVPoolAllocator(
                device.size, PAGE_TOKENS, device.dtype, "cpu", device, need_sort=False
            )
            info = device.get_device_pool_infos()[0].buffer_info
            kind = MLATokenToKVPoolHost if is_latent else get_mha_host_pool_cls(info)
            of_target = {"target_layer_num": LAYERS} if is_latent else {}
            host = kind(
                info, 40.0, 0, PAGE_TOKENS, layout, pin_memory=False,
                device_capacity_tokens=device.size, start_layer=0, end_layer=LAYERS, **of_target,
            )  # fmt: skip
            extra_config = {
                "backend_name": "polarcache",
                "module_path": "polarcache.client.sglang",
                "class_name": "PolarCacheHiCache",
                "interface_v1": INTERFACES[interface],
                "endpoint": service.endpoint,
                "revision": "1",
            } | options
            group = HostPoolGroup([PoolEntry(PoolName.KV, host, device, lambda layer: layer, True)])
            of_kind = HybridCacheController if controller == "hybrid" else HiCacheController
            made = of_kind(
                allocator, group if controller == "hybrid" else host, PAGE_TOKENS,
                tp_group=None, load_cache_event=None,
                write_policy="write_through", io_backend="kernel", storage_backend="dynamic",
                model_name=spec.model, storage_backend_extra_config=extra_config,
                enable_storage_metrics=True,
            )  # fmt: skip
            stack.callback(made.detach_storage_backend)
            return Engine(made, host)

        yield start


@pytest.mark.parametrize("controller", ["plain", "hybrid"])
@pytest.mark.parametrize("interface", list(INTERFACES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_backed_up_by_one_engine_are_prefetched_by_another(
    start_engine: Callable[..., Engine], layout: str, interface: str, controller: str
) -> None:
    tokens = list(range(5 * PAGE_TOKENS + 7))
    one = start_engine(layout, interface, controller)
    other = start_engine(layout, interface, controller)
    assert isinstance(one.controller.storage_backend, PolarCacheHiCache)
    stored = one.fill(5, seed=1)

    assert one.backup(stored, tokens[: 5 * PAGE_TOKENS]) == 5 * PAGE_TOKENS
    other.fill(3, seed=2)
    found, num_tokens = other.prefetch([*tokens[: 4 * PAGE_TOKENS], *range(9000, 9000 + 100)])

    assert num_tokens == 4 * PAGE_TOKENS
    for expected, got in zip(one.flat_pages(stored)[:4], other.flat_pages(found), strict=True):
        assert torch.equal(expected, got)


def test_engines_of_different_layouts_share_pages(start_engine: Callable[..., Engine]) -> None:
    one = start_engine("layer_first")
    tokens = list(range(2 * PAGE_TOKENS))
    stored = one.fill(2, seed=3)
    one.backup(stored, tokens)
    keys = [one.host.k_buffer[:, page] for page in stored.split(PAGE_TOKENS)]
    for layout in LAYOUTS[1:]:
        other = start_engine(layout)
        found, num_tokens = other.prefetch(tokens)
        assert num_tokens == 2 * PAGE_TOKENS
        views = other.controller.storage_backend._pool.pages(found, 2)
        assert all(torch.equal(a, b) for a, (b, _) in zip(keys, views, strict=True))


def test_keys_and_values_of_different_widths(start_engine: Callable[..., Engine]) -> None:
    one = start_engine("page_first", v_head_dim=32)
    other = start_engine("page_first_direct", v_head_dim=32)
    slots = one.host.alloc(2 * PAGE_TOKENS)
    one.host.k_buffer.normal_()
    one.host.v_buffer.normal_()
    one.backup(slots, list(range(2 * PAGE_TOKENS)))
    found, num_tokens = other.prefetch(list(range(2 * PAGE_TOKENS)))
    assert num_tokens == 2 * PAGE_TOKENS
    for side in ("k_buffer", "v_buffer"):
        stored = getattr(one.host, side)[slots].transpose(0, 1)
        loaded = getattr(other.host, side)[(found[::PAGE_TOKENS] // PAGE_TOKENS)]
        assert torch.equal(stored, loaded.transpose(0, 1).flatten(1, 2))


@pytest.mark.parametrize("controller", ["plain", "hybrid"])
@pytest.mark.parametrize("interface", list(INTERFACES))
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_latent_vectors_are_stored_by_one_rank_and_read_by_all(
    start_engine: Callable[..., Engine], layout: str, interface: str, controller: str
) -> None:
    tokens = list(range(4 * PAGE_TOKENS))
    one = start_engine(layout, interface, controller, is_latent=True)
    with get_parallel().override(tp_rank=1, tp_size=2):
        other = start_engine(layout, interface, controller, is_latent=True)
    assert one.controller.storage_config.is_mla_model
    assert not other.controller.storage_config.is_storage_writer

    mine = other.fill(4, seed=8)
    other.backup(mine, tokens)  # Reports success: rank 0 stores them.
    assert one.prefetch(tokens)[1] == 0
    stored = one.fill(4, seed=9)
    assert one.backup(stored, tokens) == 4 * PAGE_TOKENS
    found, num_tokens = other.prefetch(tokens)

    assert num_tokens == 4 * PAGE_TOKENS
    for expected, got in zip(one.flat_pages(stored), other.flat_pages(found), strict=True):
        assert torch.equal(expected, got)
    with pytest.raises(UnsupportedError, match="MLA"):
        start_engine(layout, is_latent=True, profile="k=exact,v=int4")


def test_a_quantized_profile_comes_back_close(start_engine: Callable[..., Engine]) -> None:
    tokens = list(range(2 * PAGE_TOKENS))
    profile = "k=pair:r4t4:g64,v=int4"
    for pack in ("service", "worker"):
        one = start_engine(profile=profile, salt=pack, pack=pack)
        stored = one.fill(2, seed=4)
        one.backup(stored, tokens)
        found, num_tokens = one.prefetch(tokens)
        assert num_tokens == 2 * PAGE_TOKENS
        for a, b in zip(one.flat_pages(stored), one.flat_pages(found), strict=True):
            assert 0 < float((a - b).float().norm() / a.float().norm()) < 0.2


def test_metrics_are_of_the_form_that_sglang_reads(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine()
    tokens = list(range(3 * PAGE_TOKENS))
    engine.backup(engine.fill(3, seed=5), tokens)
    engine.prefetch(tokens)
    stats = engine.controller.storage_backend.get_stats()
    assert (stats.prefetch_pgs, stats.backup_pgs) == ([3], [3])
    assert stats.prefetch_bandwidth[0] > 0
    assert engine.controller.storage_backend.get_stats().prefetch_pgs == []


def test_clearing_empties_the_store(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine()
    tokens = list(range(2 * PAGE_TOKENS))
    engine.backup(engine.fill(2, seed=6), tokens)
    engine.controller.storage_backend.clear()
    assert engine.prefetch(tokens)[1] == 0


def test_without_a_store_the_engine_starts_and_misses_until_it_comes(
    start_engine: Callable[..., Engine], start_service: Callable[..., Any], until: Any
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = start_engine(endpoint=f"grpc://127.0.0.1:{port}", retry_ms=50)
    tokens = list(range(2 * PAGE_TOKENS))
    stored = engine.fill(2, seed=7)

    began_s = time.monotonic()
    assert engine.backup(stored, tokens) == 0
    assert engine.prefetch(tokens)[1] == 0
    assert time.monotonic() - began_s < 5

    service = start_service("--redis", "off", "--port", str(port))
    until(lambda: engine.backup(stored, tokens) == 2 * PAGE_TOKENS)
    assert engine.prefetch(tokens)[1] == 2 * PAGE_TOKENS
    service.kill()
    assert engine.prefetch(tokens)[1] == 0
    service.start()
    until(lambda: engine.backup(stored, tokens) == 2 * PAGE_TOKENS)
    assert engine.prefetch(tokens)[1] == 2 * PAGE_TOKENS


def test_what_cannot_be_stored_is_refused_when_the_engine_starts(
    start_engine: Callable[..., Engine],
) -> None:
    with pytest.raises(InvalidRequestError, match="endpont"):
        start_engine(endpont="grpc://127.0.0.1:1")
    with pytest.raises(InvalidRequestError, match="profile"):
        start_engine(profile="k=zip,v=int4")
    engine = start_engine()
    backend = engine.controller.storage_backend
    backend.register_mem_host_pool_v2(engine.host, PoolName.KV)
    with pytest.raises(UnsupportedError, match="mamba"):
        backend.register_mem_host_pool_v2(engine.host, PoolName.MAMBA)
