"""LMCache's second cache level: an L2 adapter for its multi-process server.

    lmcache server --chunk-size 256 --l2-adapter '{"type": "plugin",
        "module_path": "polarcache.client.lmcache", "class_name": "PolarCacheL2Adapter",
        "adapter_params": {"endpoint": "grpc://127.0.0.1:50061", "num_kv_heads": 8,
                           "head_dim": 128, "profile": "k=pair:r4t4,v=int4"}}'

Only `adapter` imports LMCache, and only when the class is asked for: the rest of the package can
be used and tested without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polarcache.client.lmcache.adapter import PolarCacheL2Adapter

__all__ = ["PolarCacheL2Adapter"]


def __getattr__(name: str) -> Any:
    if name == "PolarCacheL2Adapter":
        from polarcache.client.lmcache.adapter import PolarCacheL2Adapter

        return PolarCacheL2Adapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
