"""What the adapter does, without LMCache: it duck-types LMCache's keys and objects."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polarcache.client._engine_store import BlockTensors, EngineStore
from polarcache.client.lmcache.objects import (
    L2Config,
    block_key,
    namespace_spec,
    object_block,
    object_layout,
)
from polarcache.proto.errors import PolarCacheError
from polarcache.proto.layout import NamespaceSpec

__all__ = ["ObjectStore"]

_log = logging.getLogger(__name__)


@dataclass
class _Batch:
    """Objects of one namespace, in the order of the call.

    Attributes:
        indices: Where they stand in the call.
        keys: Their block keys.
        blocks: Their keys and values; empty in a lookup.
    """

    indices: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    blocks: list[BlockTensors] = field(default_factory=list)


class ObjectStore:
    """Objects of any model and rank in a PolarCache store. Thread-safe; no call raises.

    Of the objects of one model, rank, group and salt in a call, those after the first that is
    missing count as missing too: a prefix is what an engine can use.

    Args:
        config: The options.

    Raises:
        InvalidRequestError: The endpoint is malformed or the calibration cannot be read.
    """

    def __init__(self, config: L2Config) -> None:
        self._config = config
        self._calibration = config.calibration()
        self._store = EngineStore(config.endpoint, config.limits())
        self._refused: set[str] = set()

    def store(self, keys: Sequence[Any], objects: Sequence[Any]) -> list[bool]:
        """Stores objects; for each whether the store has it.

        Args:
            keys: LMCache's `ObjectKey`s.
            objects: Its `MemoryObj`s.
        """
        stored = [False] * len(keys)
        for spec, batch in self._of_objects(keys, objects).items():
            num_saved = self._store.save(spec, batch.keys, batch.blocks)
            for index in batch.indices[:num_saved]:
                stored[index] = True
        return stored

    def lookup(self, keys: Sequence[Any], layouts: Mapping[int, Any]) -> list[bool]:
        """For each object whether it is there.

        Args:
            keys: LMCache's `ObjectKey`s.
            layouts: LMCache's `MemoryLayoutDesc` of each object group.
        """
        batches: dict[NamespaceSpec, _Batch] = {}
        for i, key in enumerate(keys):
            layout = layouts.get(key.object_group_id)
            spec = layout and self._spec(key, layout.shapes, layout.dtypes)
            if spec:
                batch = batches.setdefault(spec, _Batch())
                batch.indices.append(i)
                batch.keys.append(block_key(key))
        found = [False] * len(keys)
        for spec, batch in batches.items():
            for index in batch.indices[: self._store.count(spec, batch.keys)]:
                found[index] = True
        return found

    def load(self, keys: Sequence[Any], objects: Sequence[Any]) -> list[bool]:
        """Reads into objects; for each whether it came.

        Args:
            keys: LMCache's `ObjectKey`s.
            objects: Its `MemoryObj`s to write to.
        """
        loaded = [False] * len(keys)
        for spec, batch in self._of_objects(keys, objects).items():
            num_loaded = self._store.load(spec, batch.keys, batch.blocks)
            for index in batch.indices[:num_loaded]:
                loaded[index] = True
        return loaded

    @property
    def is_away(self) -> bool:
        """Whether the last call did not reach the store."""
        return self._store.is_away

    def close(self) -> None:
        """Closes the connection; calls under way and later ones are misses."""
        self._store.close()

    def _of_objects(
        self, keys: Sequence[Any], objects: Sequence[Any]
    ) -> dict[NamespaceSpec, _Batch]:
        batches: dict[NamespaceSpec, _Batch] = {}
        for i, (key, obj) in enumerate(zip(keys, objects, strict=True)):
            spec = self._spec(key, obj.get_shapes(), obj.get_dtypes())
            if spec:
                batch = batches.setdefault(spec, _Batch())
                batch.indices.append(i)
                batch.keys.append(block_key(key))
                batch.blocks.append(object_block(obj.get_tensor(0), spec.layout))
        return batches

    def _spec(self, key: Any, shapes: Sequence[Any], dtypes: Sequence[Any]) -> NamespaceSpec | None:
        """An object's namespace; None for objects that cannot be stored, which is said once."""
        try:
            layout = object_layout(shapes, dtypes, self._config)
            return namespace_spec(key, layout, self._config, self._calibration)
        except PolarCacheError as error:
            problem = f"{key.model_name}, group {key.object_group_id}: {error}"
            if problem not in self._refused:
                self._refused.add(problem)
                _log.error("PolarCache cannot store objects of %s", problem)
            return None
