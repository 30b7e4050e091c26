"""What a profile costs and saves on given tensors: bits, errors, bytes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import ShapeError
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.profile import Profile


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one profile on one layer's keys and values.

    Errors and bytes cover the coded tokens only: a store keeps whole blocks, so the tail below
    one block is never coded and stays exact in `keys` and `values`.

    Attributes:
        profile: canonical profile text.
        key_bits: stored bits per key element, parameters included.
        value_bits: the same per value element.
        bits: the same over both.
        key_relative_l2: ||decoded - keys|| / ||keys||; 0 for all-zero keys that decode to zero.
        value_relative_l2: the same for values.
        key_max_error: largest absolute error of a key element.
        value_max_error: the same for values.
        raw_bytes: bytes of the coded tokens as given.
        packed_bytes: bytes of their packed slices, padding included.
        ratio: raw_bytes / packed_bytes.
        num_tokens: tokens given.
        num_tokens_coded: tokens in whole blocks.
        keys: decoded keys [T, Hkv, D] in the dtype given.
        values: decoded values [T, Hkv, Dv] in the dtype given.
    """

    profile: str
    key_bits: float
    value_bits: float
    bits: float
    key_relative_l2: float
    value_relative_l2: float
    key_max_error: float
    value_max_error: float
    raw_bytes: int
    packed_bytes: int
    ratio: float
    num_tokens: int
    num_tokens_coded: int
    keys: Tensor
    values: Tensor


def codec_report(
    profile: Profile,
    keys: Tensor,
    values: Tensor,
    *,
    pairing: Literal["half", "interleaved"],
    rotary_dim: int,
    block_tokens: int,
) -> Report:
    """Codes and decodes one layer's keys and values and measures the difference.

    Args:
        profile: codec of each side.
        keys: fp16, bf16 or fp32 [T, Hkv, D], last dim contiguous.
        values: [T, Hkv, Dv] of the same dtype and device, last dim contiguous.
        pairing: which channels RoPE turns together.
        rotary_dim: channels that RoPE turns.
        block_tokens: tokens of a block.

    Raises:
        ShapeError: the tensors do not fit each other or hold less than one block.
        NonFiniteError: NaN, infinity, or a magnitude beyond fp16 parameters.
    """
    _check(keys, values)
    heads, head_dim, v_head_dim = keys.shape[1], keys.shape[2], values.shape[2]
    shape = BlockShape(block_tokens, heads, head_dim, v_head_dim, pairing, rotary_dim)
    codec = Codec(profile, shape, keys.dtype)
    coded = keys.shape[0] // block_tokens * block_tokens
    keys_out, values_out, packed_bytes = _round_trip(codec, keys, values)
    raw_bytes = coded * (keys[0].nbytes + values[0].nbytes)
    key_errors = _errors(keys[:coded], keys_out[:coded])
    value_errors = _errors(values[:coded], values_out[:coded])
    return Report(
        profile=str(profile),
        key_bits=codec.layout.key_bits,
        value_bits=codec.layout.value_bits,
        bits=codec.layout.bits,
        key_relative_l2=key_errors[0],
        key_max_error=key_errors[1],
        value_relative_l2=value_errors[0],
        value_max_error=value_errors[1],
        raw_bytes=raw_bytes,
        packed_bytes=packed_bytes,
        ratio=raw_bytes / packed_bytes,
        num_tokens=keys.shape[0],
        num_tokens_coded=coded,
        keys=keys_out,
        values=values_out,
    )


def _check(keys: Tensor, values: Tensor) -> None:
    """Raises ShapeError unless keys and values are of one layer."""
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
        raise ShapeError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)}: expected "
            "[tokens, kv_heads, head_dim] with equal tokens and kv_heads"
        )
    if keys.dtype != values.dtype:
        raise ShapeError(f"keys {keys.dtype}, values {values.dtype}: expected one dtype")


def _round_trip(codec: Codec, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Returns copies whose whole blocks went through the codec, and the packed bytes.

    Raises:
        ShapeError: there is no whole block, or a tensor does not fit the codec.
        NonFiniteError: NaN, infinity, or a magnitude beyond fp16 parameters.
    """
    decoded_keys, decoded_values = keys.clone(), values.clone()
    block_tokens = codec.shape.tokens
    num_blocks = keys.shape[0] // block_tokens
    if not num_blocks:
        raise ShapeError(f"{keys.shape[0]} tokens: expected at least one block of {block_tokens}")
    key_blocks, value_blocks, key_out, value_out = (
        torch.unflatten(tensor[: num_blocks * block_tokens], 0, (num_blocks, block_tokens))
        for tensor in (keys, values, decoded_keys, decoded_values)
    )
    packed = keys.new_empty((num_blocks, codec.layout.slice_bytes), dtype=torch.uint8)
    codec.encode(key_blocks, value_blocks, packed)
    codec.decode(packed, key_out, value_out)
    return decoded_keys, decoded_values, packed.numel()


def _errors(original: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Returns relative L2 and largest absolute error, computed in fp64."""
    # An exact side passes infinity through, and infinity minus itself is no error.
    error = torch.where(original == decoded, 0.0, decoded.double() - original.double())
    norm = float(original.double().norm())
    error_norm = float(error.norm())
    relative = error_norm / norm if norm else error_norm
    return relative, float(error.abs().max())
