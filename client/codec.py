"""Packing and unpacking in the worker, so that packed bytes travel. Needs torch.

Bit for bit what the service does on the same kind of device: both call `polarcache.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polarcache.client._slices import empty_layers
from polarcache.client._types import LayerTensors, Namespace
from polarcache.kernels.calibration import Calibration
from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import NonFiniteError as KernelNonFiniteError
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.profile import Exact, Profile
from polarcache.proto.errors import LayoutMismatchError, NonFiniteError
from polarcache.proto.frames import Buffer
from polarcache.proto.tensors import bytes_tensor, tensor_bytes

__all__ = ["empty_unrounded", "pack_blocks", "unpack_blocks"]


def pack_blocks(namespace: Namespace, layers: Sequence[LayerTensors]) -> list[Buffer]:
    """Packed blocks of consecutive tokens.

    Args:
        namespace: Namespace, which names the profile and the layout.
        layers: For each layer K [T, Hkv, D] and V [T, Hkv, Dv] in the namespace's dtype, T a
            multiple of its block_tokens.

    Returns:
        One buffer of `namespace.packed_block_bytes` bytes a block.

    Raises:
        LayoutMismatchError: The tensors do not fit the namespace.
        NonFiniteError: Keys or values hold NaN, infinity, or what the codec cannot carry.
    """
    layout = namespace.spec.layout
    num_blocks = _num_blocks(namespace, layers)
    codec = _codec(namespace)
    packed = torch.empty(
        num_blocks, layout.num_layers, namespace.packed_slice_bytes, dtype=torch.uint8
    )
    for i, (keys, values) in enumerate(layers):
        try:
            codec.encode(
                keys.detach().cpu().unflatten(0, (num_blocks, layout.block_tokens)),
                values.detach().cpu().unflatten(0, (num_blocks, layout.block_tokens)),
                packed[:, i],
                [i] * num_blocks,
            )
        except KernelNonFiniteError as error:
            raise NonFiniteError(f"layer {i}: {error}") from error
        except ValueError as error:
            raise LayoutMismatchError(f"layer {i}: {error}") from error
    return [tensor_bytes(block) for block in packed]


def unpack_blocks(
    namespace: Namespace,
    blocks: Sequence[Buffer],
    out: Sequence[LayerTensors] | None = None,
) -> list[LayerTensors]:
    """Keys and values of packed blocks.

    Args:
        namespace: Namespace of the blocks.
        blocks: One buffer of `namespace.packed_block_bytes` bytes a block.
        out: For each layer where to write K and V of at least these tokens, in the namespace's
            dtype, or fp32 where the codec of that side is not exact; None to allocate.

    Returns:
        For each layer K [T, Hkv, D] and V [T, Hkv, Dv], on the CPU; in the namespace's dtype where
        `out` does not say otherwise.

    Raises:
        LayoutMismatchError: A buffer is of another length.
    """
    layout = namespace.spec.layout
    for i, block in enumerate(blocks):
        if len(block) != namespace.packed_block_bytes:
            raise LayoutMismatchError(
                f"packed block {i} is {len(block)} bytes; expected {namespace.packed_block_bytes}"
            )
    tokens = len(blocks) * layout.block_tokens
    layers = (
        [(keys[:tokens], values[:tokens]) for keys, values in out]
        if out
        else empty_layers(layout, len(blocks))
    )
    if not blocks:
        return layers
    codec = _codec(namespace)
    slices = [bytes_tensor(block).view(layout.num_layers, -1) for block in blocks]
    for i, (keys, values) in enumerate(layers):
        codec.decode(
            torch.stack([block[i] for block in slices]),
            keys.unflatten(0, (len(blocks), layout.block_tokens)),
            values.unflatten(0, (len(blocks), layout.block_tokens)),
        )
    return layers


def empty_unrounded(namespace: Namespace, num_blocks: int) -> list[LayerTensors]:
    """Tensors for `unpack_blocks` to write what the codec decodes, not rounded to fp16 or bf16.

    The service attends to these numbers; those that it sends are in the namespace's dtype.

    Args:
        namespace: Namespace of the blocks.
        num_blocks: How many blocks.

    Returns:
        For each layer K [T, Hkv, D] and V [T, Hkv, Dv]: fp32, but in the namespace's dtype where
        the codec of that side is exact.
    """
    layout = namespace.spec.layout
    profile = Profile.parse(namespace.spec.profile)
    tokens = num_blocks * layout.block_tokens
    sides = []
    for codec, channels in ((profile.key, layout.head_dim), (profile.value, layout.v_head_dim)):
        dtype = getattr(torch, layout.dtype) if isinstance(codec, Exact) else torch.float32
        sides.append(((tokens, layout.num_kv_heads, channels), dtype))
    (k_shape, k_dtype), (v_shape, v_dtype) = sides
    return [
        (torch.empty(k_shape, dtype=k_dtype), torch.empty(v_shape, dtype=v_dtype))
        for _ in range(layout.num_layers)
    ]


def _codec(namespace: Namespace) -> Codec:
    layout = namespace.spec.layout
    shape = BlockShape(
        tokens=layout.block_tokens,
        kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        v_head_dim=layout.v_head_dim,
        pairing=layout.rope_pairing,
        rotary_dim=layout.rotary_dim,
    )
    text = namespace.spec.calibration
    codec = Codec(
        Profile.parse(namespace.spec.profile),
        shape,
        getattr(torch, layout.dtype),
        Calibration.parse(text) if text else None,
    )
    if codec.layout.slice_bytes != namespace.packed_slice_bytes:
        raise LayoutMismatchError(
            f"the service packs a slice into {namespace.packed_slice_bytes} bytes, this client "
            f"into {codec.layout.slice_bytes}: their versions differ"
        )
    return codec


def _num_blocks(namespace: Namespace, layers: Sequence[LayerTensors]) -> int:
    layout = namespace.spec.layout
    tokens = {tensor.shape[0] for pair in layers for tensor in pair}
    if len(layers) != layout.num_layers or len(tokens) != 1 or min(tokens) % layout.block_tokens:
        raise LayoutMismatchError(
            f"expected {layout.num_layers} layers of equally many tokens, a multiple of "
            f"{layout.block_tokens}; got {len(layers)} layers of {sorted(tokens)} tokens"
        )
    return int(min(tokens)) // layout.block_tokens
