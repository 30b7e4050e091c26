"""Which slices the Triton kernels code, with what constants, and their launches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from polarcache.kernels.gpu.sides import decode_kernel, encode_kernel
from polarcache.kernels.layout import TILE_TOKENS, BlockShape, Field, PackedLayout
from polarcache.kernels.profile import Integer, Pair, Profile

# Pairs of one warp's share of a program: 32 a thread, whose radii and angles still fit registers.
_PAIRS_PER_WARP = 1024
_MAX_WARPS = 16
_MAX_PROGRAM_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """Constants of the kernels for one profile and shape.

    Attributes:
        sides: sides that the kernels code: `key`, `value` or both.
        constants: constexpr arguments of both kernels.
        num_parts: programs of one side of one slice.
        num_warps: warps of a program.
    """

    sides: tuple[str, ...]
    constants: Mapping[str, Any]
    num_parts: int
    num_warps: int

    @classmethod
    def of(cls, profile: Profile, shape: BlockShape, layout: PackedLayout) -> Self | None:
        """Returns the plan, or None where no side has a kernel.

        Kernels code pair keys and integer values in tensor-core order, values in groups of whole
        heads or of 16 times a power of two channels, in one fused launch. Exact sides are copied
        beside it. What is left (recursive sides, blocks that do not fill units) is plain torch.
        """
        fields = {field.name: field for field in layout.fields}
        key = _key_constants(profile, shape, fields)
        value = _value_constants(profile, shape, fields)
        if key is None and value is None:
            return None
        tokens = _MAX_PROGRAM_TOKENS
        if key is not None:
            tokens = max(key[3], TILE_TOKENS * key[4])
        else:
            while shape.tokens % tokens:
                tokens //= 2
        widest = max(shape.head_dim, shape.v_head_dim) // 2
        warps = 1
        while warps < _MAX_WARPS and warps * _PAIRS_PER_WARP < tokens * widest:
            warps *= 2
        constants = {
            "KEY": key,
            "VALUE": value,
            "T": shape.tokens,
            "H": shape.kv_heads,
            "D": shape.head_dim,
            "DV": shape.v_head_dim,
            "ROTARY": shape.rotary_dim,
            "INTERLEAVED": shape.pairing == "interleaved",
            "TOKENS": tokens,
        }
        coded = [side for side, of_side in (("key", key), ("value", value)) if of_side is not None]
        return cls(tuple(coded), constants, shape.kv_heads * (shape.tokens // tokens), warps)

    def encode(
        self, keys: Tensor, values: Tensor, slots: Tensor | None, out: Tensor, flags: Tensor
    ) -> None:
        """Launches the encoder, without waiting for it.

        Args:
            keys: [N, T, Hkv, D], or [rows, Hkv, D] with slots; last dim contiguous.
            values: likewise.
            slots: int64 [N, T] contiguous, the row of every token, or None.
            out: uint8 [N, slice_bytes], rows at multiples of 16 bytes.
            flags: int32 [2, N]; set to 1 where keys or values of a slice are refused.
        """
        num_slices = out.shape[0]
        if num_slices == 0:
            return
        grid = (len(self.sides) * num_slices * self.num_parts,)
        encode_kernel[grid](
            keys, values, slots, out, flags, num_slices,
            *_strides(keys), *_strides(values), out.stride(0),
            **self.constants, num_warps=self.num_warps,
        )  # fmt: skip

    def decode(self, packed: Tensor, slots: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Launches the decoder, without waiting for it; arguments as `encode`."""
        num_slices = packed.shape[0]
        if num_slices == 0:
            return
        grid = (len(self.sides) * num_slices * self.num_parts,)
        decode_kernel[grid](
            packed, keys, values, slots, packed.stride(0),
            *_strides(keys), *_strides(values),
            **self.constants, num_warps=self.num_warps,
        )  # fmt: skip


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Returns strides of slices, tokens and heads; rows named by slots have none of slices."""
    strides = tensor.stride()
    return strides[0] if tensor.dim() == 4 else 0, strides[-3], strides[-2]


def _tiles(field: Field, tile_codes: int) -> int | None:
    """Returns the tiles of a unit of codes, None in plain order."""
    order = field.order
    return None if order.streams == 1 else order.stream_codes * order.streams * 32 // tile_codes


def _key_constants(
    profile: Profile, shape: BlockShape, fields: Mapping[str, Field]
) -> tuple[Any, ...] | None:
    """Returns radius bits, angle bits, arc, group, tiles, offsets of codes and parameters."""
    codec = profile.key
    if type(codec) is not Pair:
        return None
    codes = fields["key_codes"]
    tiles = _tiles(codes, TILE_TOKENS * shape.pairs)
    if tiles is None:
        return None
    return (
        codec.radius_bits,
        codec.angle_bits,
        codec.angle_range == "arc",
        codec.group_tokens,
        tiles,
        codes.offset,
        fields["key_parameters"].offset,
    )


def _value_constants(
    profile: Profile, shape: BlockShape, fields: Mapping[str, Field]
) -> tuple[Any, ...] | None:
    """Returns bits, channels of a group, tiles, offsets of codes and parameters."""
    codec = profile.value
    if type(codec) is not Integer:
        return None
    codes = fields["value_codes"]
    tiles = _tiles(codes, TILE_TOKENS * shape.v_head_dim)
    channels = codec.channels_per_group(shape.v_head_dim)
    blocks = channels // 16
    if tiles is None or (channels != shape.v_head_dim and (channels % 16 or blocks & (blocks - 1))):
        return None
    return codec.bits, channels, tiles, codes.offset, fields["value_parameters"].offset
