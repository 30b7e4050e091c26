"""The fused launch of pair keys and integer values: constants and launches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from polarcache.kernels.gpu.arc import MINMAX, SMALLEST, WHOLE
from polarcache.kernels.gpu.side_plan import row_strides
from polarcache.kernels.gpu.sides import decode_kernel, encode_kernel
from polarcache.kernels.layout import TILE_TOKENS, BlockShape, Field, PackedLayout
from polarcache.kernels.profile import ArcPair, Integer, Pair, Profile

# 32 pairs a thread, whose radii and angles still fit its registers, or 64 values.
_PAIRS_PER_WARP = 1024
_VALUES_PER_WARP = 2048
_MAX_WARPS = 16
# Steps of 8 pairs of a program, a quarter of a warp's columns each, and registers of its threads:
# best of 1 to 8 steps and 80 to 168 registers (H200, 2026-11-24, pair r4t4 + int4, D 128).
_STEPS = 4
_ENCODE_REGISTERS = 96
# Likewise of the decoder where a code lies in two words; else no limit is better.
_DECODE_REGISTERS = 80


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """Constants of the kernels for one profile and shape.

    Attributes:
        sides: sides that the kernels code: `key`, `value` or both.
        constants: constexpr arguments of both kernels.
        num_warps: warps of a program.
    """

    sides: tuple[str, ...]
    constants: Mapping[str, Any]
    num_warps: int

    @classmethod
    def of(
        cls,
        profile: Profile,
        shape: BlockShape,
        layout: PackedLayout,
        steps: int = _STEPS,
        pairs_per_warp: int = _PAIRS_PER_WARP,
    ) -> Self | None:
        """Returns the plan, or None where no side has a kernel.

        Kernels code pair keys and integer values in tensor-core order, values in groups of whole
        heads or of 16 times a power of two channels, in one fused launch.

        Args:
            profile: how keys and values are coded.
            shape: shape of one layer of one block.
            layout: where the bytes of a packed slice lie.
            steps: steps of 8 pairs that a program codes, where they fill words.
            pairs_per_warp: pairs of a program's tokens that a warp codes.
        """
        fields = {field.name: field for field in layout.fields}
        key = _key_constants(profile, shape, fields, steps)
        warps = 1
        if key is not None:
            tokens, steps = key[7:9]
            warps = _warps(tokens * 8 * steps, pairs_per_warp)
        value = _value_constants(profile, shape, fields, warps)
        if key is None and value is None:
            return None
        key_parts = value_parts = 0
        if key is not None:
            key_parts = shape.kv_heads * (shape.tokens // tokens) * (shape.head_dim // 16 // steps)
        if value is not None:
            value_parts = shape.kv_heads * (shape.tokens // value[-1])
        constants = {
            "KEY": key,
            "VALUE": value,
            "T": shape.tokens,
            "D": shape.head_dim,
            "DV": shape.v_head_dim,
            "ROTARY": shape.rotary_dim,
            "INTERLEAVED": shape.pairing == "interleaved",
            "KEY_PARTS": key_parts,
            "VALUE_PARTS": value_parts,
        }
        coded = [side for side, of_side in (("key", key), ("value", value)) if of_side is not None]
        return cls(tuple(coded), constants, warps)

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
        grid = (num_slices * (self.constants["KEY_PARTS"] + self.constants["VALUE_PARTS"]),)
        options = {"maxnreg": _ENCODE_REGISTERS} if self.num_warps == _STEPS else {}
        encode_kernel[grid](
            keys, values, slots, out, flags, num_slices,
            *row_strides(keys), *row_strides(values), out.stride(0),
            **self.constants, num_warps=self.num_warps, **options,
        )  # fmt: skip

    def decode(self, packed: Tensor, slots: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Launches the decoder, without waiting for it; arguments as `encode`."""
        num_slices = packed.shape[0]
        if num_slices == 0:
            return
        grid = (num_slices * (self.constants["KEY_PARTS"] + self.constants["VALUE_PARTS"]),)
        key = self.constants["KEY"]
        limited = self.num_warps == _STEPS and key is not None and key[0] + key[1] < 8
        options = {"maxnreg": _DECODE_REGISTERS} if limited else {}
        decode_kernel[grid](
            packed, keys, values, slots, num_slices, packed.stride(0),
            *row_strides(keys), *row_strides(values),
            **self.constants, num_warps=self.num_warps, **options,
        )  # fmt: skip


def _tiles(field: Field, tile_codes: int) -> int | None:
    """Returns the tiles of a unit of codes, None in plain order."""
    order = field.order
    return None if order.streams == 1 else order.stream_codes * order.streams * 32 // tile_codes


def _warps(numbers: int, per_warp: int) -> int:
    """Returns warps, a power of two, for so many numbers of a program."""
    warps = 1
    while warps < _MAX_WARPS and warps * per_warp < numbers:
        warps *= 2
    return warps


def _key_constants(
    profile: Profile, shape: BlockShape, fields: Mapping[str, Field], steps: int
) -> tuple[Any, ...] | None:
    """Returns radius and angle bits, kind of arc, group, tiles, offsets of codes and parameters.

    Then a program's tokens and steps, and the offset of arcs.
    """
    codec = profile.key
    if isinstance(codec, Pair):
        bits, names = codec.bits, ("parameters", "parameters")
        arc = MINMAX if codec.angle_range == "minmax" else SMALLEST
    elif isinstance(codec, ArcPair) and not codec.tiers:
        bits, names = codec.radius_bits + codec.angle_bits, ("radii", "arcs")
        arc = WHOLE
    else:
        return None
    codes = fields["key_codes"]
    tiles = _tiles(codes, TILE_TOKENS * shape.pairs)
    if tiles is None:
        return None
    all_steps = shape.pairs // 8
    # Fewer than 8 bits fill words with the steps of whole units, or with 4 or 8 of one tile.
    filling = 1 if bits == 8 else 8 if bits % 2 else 4
    steps = max(steps, filling)
    while all_steps % steps and steps > filling:
        steps //= 2
    if all_steps % steps or (filling > 1 and tiles > 1):
        steps = all_steps
    return (
        codec.radius_bits,
        codec.angle_bits,
        arc.value,
        codec.group_tokens,
        tiles,
        codes.offset,
        fields[f"key_{names[0]}"].offset,
        max(codec.group_tokens, TILE_TOKENS * tiles),
        steps,
        fields[f"key_{names[1]}"].offset,
    )


def _value_constants(
    profile: Profile, shape: BlockShape, fields: Mapping[str, Field], warps: int
) -> tuple[Any, ...] | None:
    """Returns bits, channels of a group, tiles, two offsets, a program's tokens."""
    codec = profile.value
    if type(codec) is not Integer:
        return None
    codes = fields["value_codes"]
    tiles = _tiles(codes, TILE_TOKENS * shape.v_head_dim)
    channels = codec.channels_per_group(shape.v_head_dim)
    blocks = channels // 16
    if tiles is None or (channels != shape.v_head_dim and (channels % 16 or blocks & (blocks - 1))):
        return None
    tokens = TILE_TOKENS * tiles
    while (
        shape.tokens % (2 * tokens) == 0
        and 2 * tokens * shape.v_head_dim <= warps * _VALUES_PER_WARP
    ):
        tokens *= 2
    offset = fields["value_parameters"].offset
    return codec.bits, channels, tiles, codes.offset, offset, tokens
