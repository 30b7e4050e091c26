"""What the backend does, without SGLang: it duck-types the engine's configuration and pools."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polarcache.client._engine_store import BlockTensors, EngineStore
from polarcache.client.sglang.config import HiCacheConfig
from polarcache.client.sglang.pages import PagePool
from polarcache.proto.errors import InvalidRequestError, PolarCacheError, UnsupportedError
from polarcache.proto.layout import KvLayout, NamespaceSpec

__all__ = ["HiCacheBackend", "Transfers", "block_key", "namespace_spec"]

_log = logging.getLogger(__name__)


@dataclass
class Transfers:
    """What was moved since it was last asked for, one entry a call.

    Attributes:
        pages: Pages moved.
        gb_per_s: Bytes of keys and values moved a second, in 10**9.
    """

    pages: list[int] = field(default_factory=list)
    gb_per_s: list[float] = field(default_factory=list)


class HiCacheBackend:
    """Pages of one rank in a PolarCache store.

    Reading stops at the first page that is not there: what follows counts as missing too, as the
    engine can use prefixes alone.

    Args:
        storage_config: SGLang's `HiCacheStorageConfig`.
        kwargs: Unused; part of what SGLang calls dynamic backends with.

    Raises:
        InvalidRequestError: An option is unknown or out of range.
        UnsupportedError: The model or its parallelism cannot be stored.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        self._config = HiCacheConfig.from_extra_config(storage_config.extra_config)
        _refuse_unsupported(storage_config, self._config)
        self._storage_config = storage_config
        self._store = EngineStore(self._config.endpoint, self._config.limits())
        self._pool: PagePool | None = None
        self._spec: NamespaceSpec | None = None
        self._stats_lock = threading.Lock()
        self._loads = Transfers()
        self._saves = Transfers()

    # -- pools ------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Takes the host pool whose pages are stored, and opens their namespace.

        Args:
            mem_pool_host: SGLang's host pool.

        Raises:
            PolarCacheError: The pool cannot be stored, or the service refuses the namespace.
        """
        self.mem_pool_host = mem_pool_host
        self._pool = PagePool.of(mem_pool_host)
        self._spec = namespace_spec(self._storage_config, self._config, self._pool)
        if not self._spec.revision:
            _log.warning(
                "PolarCache: the option revision is empty, so engines with other weights under the "
                "name %s would share pages with this one",
                self._spec.model,
            )
        self._store.check(self._spec)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Takes a further pool: the keys and values once more, and nothing else.

        Raises:
            UnsupportedError: The model keeps more than keys and values, such as Mamba states.
        """
        if str(host_pool_name) != "kv":
            raise UnsupportedError(
                f"the model keeps a {host_pool_name} pool ({type(host_pool).__name__}) beside its "
                "keys and values; PolarCache stores models with full attention alone"
            )

    # -- pages in the pool (interface_v1) -----------------------------------------------------

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Reads pages into the pool; for each whether it came."""
        pool, _ = self._registered()
        num_loaded = self._load(keys, pool.pages(host_indices, len(keys)))
        return [i < num_loaded for i in range(len(keys))]

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        """Stores pages of the pool; for each whether the store has it."""
        pool, _ = self._registered()
        num_saved = self._save(keys, pool.pages(host_indices, len(keys)))
        return [i < num_saved for i in range(len(keys))]

    # -- flat pages ---------------------------------------------------------------------------

    def get(
        self,
        key: str,
        target_location: torch.Tensor | None = None,
        target_sizes: Any = None,
    ) -> torch.Tensor | None:
        """Reads a flat page, into `target_location` if given; None if it is not there."""
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any = None,
    ) -> list[torch.Tensor | None]:
        """Reads flat pages; None for those that are not there."""
        pool, _ = self._registered()
        targets = target_locations or [pool.empty_flat_page() for _ in keys]
        num_loaded = self._load(keys, pool.flat_pages(targets))
        return [targets[i] if i < num_loaded else None for i in range(len(keys))]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Stores a flat page; whether the store has it."""
        return self.batch_set([key], None if value is None else [value])

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Stores flat pages; whether the store has all of them."""
        pool, _ = self._registered()
        if values is None or len(values) != len(keys):
            raise InvalidRequestError(
                f"{len(keys)} keys need as many pages, got {len(values or [])}"
            )
        blocks = pool.flat_pages([value.contiguous() for value in values])
        return self._save(keys, blocks) == len(keys)

    # -- the store ----------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page is there."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages are there."""
        _, spec = self._registered()
        return self._store.count(spec, [block_key(key) for key in keys])

    def clear(self) -> None:
        """Removes this rank's pages from every tier of the store.

        Raises:
            PolarCacheError: The store did not do it.
        """
        _, spec = self._registered()
        if not self._store.clear(spec):
            raise PolarCacheError(f"the store at {self._config.endpoint} did not clear its pages")

    def close(self) -> None:
        """Closes the connection; calls under way are misses."""
        self._store.close()

    def take_transfers(self) -> tuple[Transfers, Transfers]:
        """Loads and stores since the last call."""
        with self._stats_lock:
            taken = (self._loads, self._saves)
            self._loads, self._saves = Transfers(), Transfers()
        return taken

    # -- inside -------------------------------------------------------------------------------

    def _registered(self) -> tuple[PagePool, NamespaceSpec]:
        if self._pool is None or self._spec is None:
            raise InvalidRequestError("register_mem_pool_host must be called first")
        return self._pool, self._spec

    def _load(self, keys: list[str], blocks: list[BlockTensors]) -> int:
        _, spec = self._registered()
        began_s = time.monotonic()
        num_loaded = self._store.load(spec, [block_key(key) for key in keys], blocks)
        self._note(num_loaded, began_s, is_load=True)
        return num_loaded

    def _save(self, keys: list[str], blocks: list[BlockTensors]) -> int:
        _, spec = self._registered()
        if not self._storage_config.is_storage_writer:
            return len(keys)  # Another rank has the same latent vectors and stores them.
        began_s = time.monotonic()
        num_saved = self._store.save(spec, [block_key(key) for key in keys], blocks)
        self._note(num_saved, began_s, is_load=False)
        return num_saved

    def _note(self, num_pages: int, began_s: float, *, is_load: bool) -> None:
        if not (num_pages and self._storage_config.enable_storage_metrics):
            return
        _, spec = self._registered()
        seconds = max(time.monotonic() - began_s, 1e-9)
        with self._stats_lock:
            transfers = self._loads if is_load else self._saves
            transfers.pages.append(num_pages)
            transfers.gb_per_s.append(num_pages * spec.layout.raw_block_bytes / seconds / 1e9)


def block_key(key: str) -> bytes:
    """The block key of an SGLang page key: the bytes of its SHA-256.

    Args:
        key: 64 hexadecimal digits; any other text is hashed.
    """
    if len(key) == 64:
        try:
            return bytes.fromhex(key)
        except ValueError:
            pass
    return hashlib.sha256(key.encode()).digest()


def namespace_spec(storage_config: Any, config: HiCacheConfig, pool: PagePool) -> NamespaceSpec:
    """Everything that two engines must have in common to share pages.

    Attention data parallelism is no part of it: ranks of different `dp_rank` hold the same heads.
    Nor is tensor parallelism where a token has one latent vector: all ranks hold the same ones, and
    engines of any number of ranks share them.

    Args:
        storage_config: SGLang's `HiCacheStorageConfig`.
        config: The options.
        pool: The host pool.

    Raises:
        InvalidRequestError: Something is out of range, the page size for instance.
    """
    model = config.model or storage_config.model_name or ""
    if not model:
        raise InvalidRequestError(
            "SGLang told no model name; name one with the option model in "
            "hicache-storage-backend-extra-config"
        )
    tokens = pool.page_tokens
    if tokens % 8 or not 8 <= tokens <= 1024:
        raise InvalidRequestError(
            f"--page-size must be a multiple of 8 from 8 to 1024, got {tokens}: a page is a block "
            "of the store, and 128 suits every codec"
        )
    is_latent = pool.is_latent
    layout = KvLayout(
        num_layers=pool.num_layers,
        num_kv_heads=pool.num_heads,
        head_dim=pool.head_dim,
        v_head_dim=pool.v_head_dim,
        dtype=pool.dtype,
        block_tokens=tokens,
        rope_pairing=config.rope_pairing,
        # Heads of latent vectors are no heads that RoPE knows.
        rotary_dim=0 if is_latent else config.rotary_dim,
    )
    return NamespaceSpec(
        model=model,
        layout=layout,
        profile=config.profile,
        revision=config.revision,
        tenant=config.tenant,
        salt=config.salt,
        tp_rank=0 if is_latent else storage_config.tp_rank,
        tp_size=1 if is_latent else storage_config.tp_size,
        pp_rank=storage_config.pp_rank,
        pp_size=storage_config.pp_size,
        calibration=config.calibration(),
    )


def _refuse_unsupported(storage_config: Any, config: HiCacheConfig) -> None:
    if storage_config.is_mla_model and config.profile != "exact":
        raise UnsupportedError(
            f"the profile must be exact for models with multi-head latent attention (MLA), got "
            f"{config.profile}: the codecs are made for keys and values of heads"
        )
    if storage_config.dcp_size > 1:
        raise UnsupportedError(
            f"PolarCache does not store caches that decode context parallelism splits, got "
            f"dcp_size {storage_config.dcp_size}; expected 1"
        )
    if storage_config.attn_cp_size > 1:
        raise UnsupportedError(
            f"PolarCache does not store caches that context parallelism splits, got attn_cp_size "
            f"{storage_config.attn_cp_size}; expected 1"
        )
    if storage_config.should_split_heads:
        raise UnsupportedError(
            "PolarCache does not split heads for engines of another tensor-parallel size: leave "
            "tp_lcm_size out"
        )
