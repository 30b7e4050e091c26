"""vLLM's KV cache connector.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "PolarCacheConnector",
        "kv_connector_module_path": "polarcache.client.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"polarcache.endpoint": "grpc://127.0.0.1:50061"}}'

Only `connector` imports vLLM, and only when the class is asked for: the rest of the package can be
used and tested without the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polarcache.client.vllm.connector import PolarCacheConnector

__all__ = ["PolarCacheConnector"]


def __getattr__(name: str) -> Any:
    if name == "PolarCacheConnector":
        from polarcache.client.vllm.connector import PolarCacheConnector

        return PolarCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
