"""The backend without SGLang, in front of a real service."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from polarcache.client.sglang.backend import HiCacheBackend


@pytest.fixture
def start_backend(service: Any, spec: Any) -> Iterator[Callable[..., HiCacheBackend]]:
    started: list[HiCacheBackend] = []

    def start(pool: Any = None, facts: Any = None, **options: Any) -> HiCacheBackend:
        extra_config = {
            "backend_name": "polarcache", "module_path": "m", "class_name": "c",
            "interface_v1": 1, "endpoint": service.endpoint, "lookup_timeout_ms": 5000,
        } | options  # fmt: skip
        storage_config = SimpleNamespace(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_size=1, dcp_size=1,
            is_mla_model=False, is_storage_writer=True, should_split_heads=False,
            enable_storage_metrics=True, model_name=spec.model, extra_config=extra_config,
        )  # fmt: skip
        vars(storage_config).update(facts or {})
        started.append(HiCacheBackend(storage_config, {}))
        if pool is not None:
            started[-1].register_mem_pool_host(pool)
        return started[-1]

    yield start
    for backend in started:
        backend.close()
