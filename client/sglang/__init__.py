"""SGLang's HiCache storage backend.

    python -m sglang.launch_server --model-path MODEL --page-size 128 --enable-hierarchical-cache
        --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
            "backend_name": "polarcache", "module_path": "polarcache.client.sglang",
            "class_name": "PolarCacheHiCache", "interface_v1": 1,
            "endpoint": "grpc://127.0.0.1:50061"}'

Only `hicache` imports SGLang, and only when the class is asked for: the rest of the package can be
used and tested without the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polarcache.client.sglang.hicache import PolarCacheHiCache

__all__ = ["PolarCacheHiCache"]


def __getattr__(name: str) -> Any:
    if name == "PolarCacheHiCache":
        from polarcache.client.sglang.hicache import PolarCacheHiCache

        return PolarCacheHiCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
