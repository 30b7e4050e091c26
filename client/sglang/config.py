"""The backend's options: what SGLang leaves in its hicache-storage-backend-extra-config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from polarcache.client._engine_config import EngineConfig

__all__ = ["HiCacheConfig"]

# Read by SGLang itself, and left in.
_SGLANG_KEYS = frozenset(
    {"backend_name", "module_path", "class_name", "interface_v1", "file_storage_path"}
)


class HiCacheConfig(EngineConfig):
    """Options of one engine; a block is a page of SGLang."""

    model: str = Field("", description="Model name in the store; empty for the served name.")

    @classmethod
    def from_extra_config(cls, extra_config: Mapping[str, Any] | None) -> HiCacheConfig:
        """Reads the options.

        Args:
            extra_config: What SGLang hands over; its own keys are passed over.

        Raises:
            InvalidRequestError: A key is unknown or a value is out of range.
        """
        options = {k: v for k, v in (extra_config or {}).items() if k not in _SGLANG_KEYS}
        return cls.parse("hicache-storage-backend-extra-config", options)
