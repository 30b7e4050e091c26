"""LMCache's objects as blocks, and its keys as namespaces and block keys.

An object is one chunk of T tokens of one rank. Its tensor has one of three shapes, C = Hkv * D:

| shape | what |
|---|---|
| [2, L, T, C] | keys, then values |
| [1, L, T, 2C] or [L, T, 2C] | each head's key and value after another, as vLLM packs them |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from polarcache.client._engine_config import EngineConfig
from polarcache.client._engine_store import BlockTensors
from polarcache.proto.errors import LayoutMismatchError
from polarcache.proto.layout import DTYPE_BYTES, KvLayout, NamespaceSpec

__all__ = ["L2Config", "block_key", "namespace_spec", "object_block", "object_layout"]

_MAX_KEY_BYTES = 64


class L2Config(EngineConfig):
    """Options of one LMCache server; LMCache's objects do not tell how their heads are cut."""

    num_kv_heads: int = Field(ge=1, le=1024, description="Key/value heads of one rank.")
    head_dim: int = Field(ge=16, le=256, description="Channels of a key.")
    v_head_dim: int = Field(0, ge=0, le=256, description="Channels of a value; 0 for head_dim.")
    threads: int = Field(4, ge=1, le=64, description="Stores, lookups and loads at a time.")


def object_layout(
    shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype], config: L2Config
) -> KvLayout:
    """The layout of the blocks that objects of a shape hold.

    Args:
        shapes: Shapes of the object's tensors.
        dtypes: Their element types.
        config: The options.

    Raises:
        LayoutMismatchError: The object is not one tensor of keys and values.
        InvalidRequestError: Its number of tokens or layers is out of range.
    """
    heads, head_dim = config.num_kv_heads, config.head_dim
    v_head_dim = config.v_head_dim or head_dim
    expected = (
        f"[2, L, T, {heads * head_dim}], [1, L, T, {heads * (head_dim + v_head_dim)}] or "
        f"[L, T, {heads * (head_dim + v_head_dim)}] of {', '.join(DTYPE_BYTES)}"
    )
    got = ", ".join(
        f"{list(shape)} of {str(dtype).removeprefix('torch.')}"
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else ""
    if len(shapes) != 1 or dtype not in DTYPE_BYTES:
        raise LayoutMismatchError(f"objects must be one tensor {expected}, got {got}")
    planes, layers, tokens, width = (1, *shapes[0])[-4:] if len(shapes[0]) in (3, 4) else (0,) * 4
    is_split = planes == 2 and width == heads * head_dim and v_head_dim == head_dim
    is_packed = planes == 1 and width == heads * (head_dim + v_head_dim)
    if not (is_split or is_packed):
        raise LayoutMismatchError(f"objects must be one tensor {expected}, got {got}")
    return KvLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=dtype,
        block_tokens=tokens,
        rope_pairing=config.rope_pairing,
        rotary_dim=config.rotary_dim,
    )


def object_block(tensor: torch.Tensor, layout: KvLayout) -> BlockTensors:
    """Views of an object's keys and values.

    Args:
        tensor: An object's tensor, of a shape that `object_layout` takes.
        layout: Its layout.

    Returns:
        K [L, T, Hkv, D] and V [L, T, Hkv, Dv].
    """
    if tensor.shape[0] == 2 and tensor.dim() == 4:
        heads = (layout.num_kv_heads, layout.head_dim)
        return tensor[0].unflatten(-1, heads), tensor[1].unflatten(-1, heads)
    plane = tensor.view(tensor.shape[-3:])
    packed = plane.unflatten(-1, (layout.num_kv_heads, layout.head_dim + layout.v_head_dim))
    return packed[..., : layout.head_dim], packed[..., layout.head_dim :]


def namespace_spec(key: Any, layout: KvLayout, config: L2Config, calibration: str) -> NamespaceSpec:
    """The namespace of an object.

    Args:
        key: LMCache's `ObjectKey`.
        layout: The object's layout.
        config: The options.
        calibration: Text of the calibration that the profile names.

    Raises:
        InvalidRequestError: A field of the key is out of range.
    """
    # LMCache packs the parallel setup into a number: world size and rank are its upper bytes.
    world_size, rank = key.kv_rank >> 24 & 0xFF, key.kv_rank >> 16 & 0xFF
    return NamespaceSpec(
        model=key.model_name,
        layout=layout,
        profile=config.profile,
        revision=config.revision,
        tenant=config.tenant,
        # Groups of one model differ in their layers; LMCache's salts hold no slash.
        salt=f"{config.salt}/{key.cache_salt}/{key.object_group_id}",
        tp_rank=rank,
        tp_size=max(1, world_size),
        calibration=calibration,
    )


def block_key(key: Any) -> bytes:
    """The block key of an object: its chunk hash."""
    chunk_hash: bytes = key.chunk_hash
    if 0 < len(chunk_hash) <= _MAX_KEY_BYTES:
        return chunk_hash
    return hashlib.sha256(chunk_hash).digest()
