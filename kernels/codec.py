"""Codec: whole slices to packed bytes and back, on the CPU or a CUDA device.

The only module that checks tensors and that knows which algorithm a profile names. The Triton
kernels code what `polarcache.kernels.gpu.launch.Plan` covers when the packed slices are on a CUDA
device at multiples of 16 bytes; everything else is plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polarcache.kernels import values
from polarcache.kernels.bits import copy_bytes, pack_field, unpack_field
from polarcache.kernels.calibration import Calibration
from polarcache.kernels.errors import CalibrationError, NonFiniteError, ShapeError
from polarcache.kernels.layout import BlockShape, Field, PackedLayout
from polarcache.kernels.polar import pair, sides
from polarcache.kernels.profile import Exact, Integer, KeyCodec, Pair, Profile, ValueCodec

if TYPE_CHECKING:
    from polarcache.kernels.gpu.launch import Plan

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Slices of so many numbers a side share the per-call overhead and still fit a core's caches
# (measured on one EPYC core, 2026-11-24: four slices of T128 H8 D128, sixteen of H2); a GPU takes
# what fits 64 MiB of fp32.
_CPU_CHUNK_NUMBERS = 1 << 19
_GPU_CHUNK_BYTES = 64 << 20

_Numbers = dict[str, Tensor]


class Codec:
    """Encodes and decodes slices of one profile, shape and dtype; holds no buffers, thread-safe.

    Attributes:
        profile: how keys and values are coded.
        shape: shape of one layer of one block.
        dtype: the namespace dtype: fp16, bf16 or fp32.
        layout: where the bytes of a packed slice lie.
    """

    def __init__(
        self,
        profile: Profile,
        shape: BlockShape,
        dtype: torch.dtype,
        calibration: Calibration | None = None,
    ) -> None:
        """Lays out the packed slice.

        Args:
            profile: how keys and values are coded.
            shape: shape of one layer of one block.
            dtype: fp16, bf16 or fp32.
            calibration: what `profile.calibration` names. Only `encode` needs it.

        Raises:
            ShapeError: the dtype is none of the three, or a group or the calibration does not
                fit the shape.
            CalibrationError: the calibration is not the one that the profile names.
        """
        if dtype not in _DTYPES:
            raise ShapeError(f"dtype {dtype}: expected float16, bfloat16 or float32")
        self.profile = profile
        self.shape = shape
        self.dtype = dtype
        self.layout = PackedLayout.of(profile, shape, dtype.itemsize)
        if calibration is not None:
            calibration.check(profile, shape)
        self._calibration = calibration
        self._plan: Plan | None = None

    def encode(
        self,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        layers: Sequence[int] | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """Packs slices. Exact sides are copied unseen; other sides must be finite.

        Args:
            keys: [N, T, Hkv, D] of the codec's dtype, or fp32 where the key codec is not exact;
                any strides but a contiguous last dim. With `slots`, [rows, Hkv, D].
            values: [N, T, Hkv, Dv], likewise.
            out: uint8 [N, slice_bytes], last dim contiguous; every byte is written once.
            layers: layer of each of the N slices; read only where the profile names a calibration.
            slots: int64 [N, T] contiguous: the row of every token, as engines number the slots of
                their paged caches. Not checked against the number of rows.

        Raises:
            ShapeError: a tensor differs from the above, or the devices differ.
            CalibrationError: the profile names a calibration, and it or `layers` is missing.
            NonFiniteError: NaN, infinity, or a magnitude beyond fp16 parameters; `out` is then
                undefined.
        """
        refused = torch.zeros((2, out.shape[0]), dtype=torch.int32, device=out.device)
        self.encode_unchecked(keys, values, out, refused, layers, slots)
        check_refused(refused)

    def encode_unchecked(
        self,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        refused: Tensor,
        layers: Sequence[int] | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """Packs slices as `encode` does, but leaves the check to `check_refused`.

        On a CUDA device, sides that are exact or that the kernels code never wait for the device:
        the call can be captured in a CUDA graph, after a first one that loads kernels and tables.

        Args:
            keys: as for `encode`.
            values: as for `encode`.
            out: as for `encode`.
            refused: int32 [2, N] contiguous; set to 1 where keys (row 0) or values (row 1) of a
                slice are refused, else left alone.
            layers: as for `encode`.
            slots: as for `encode`.
        """
        self._check(keys, values, out, slots)
        energies = self._energies(layers, out)
        plan = self._plan_of(out)
        if plan is not None:
            plan.encode(keys, values, slots, out, refused, energies)
        for chunk in self._chunks(out):
            for side, codec, x in self._sides(keys, values):
                if plan is not None and side in plan.sides:
                    continue
                numbers = _encode_side(
                    codec,
                    side,
                    self.shape,
                    x[chunk] if slots is None else x[slots[chunk]],
                    None if energies is None else energies[chunk],
                )
                for name, tensor in numbers.items():
                    if name != sides.PEAKS:
                        pack_field(self._field(side, name), tensor, out[chunk])
                peak = _peak(numbers)
                if peak is not None:
                    refused[int(side == "value"), chunk] |= ~torch.isfinite(peak)
        for pad in self.layout.pads():
            out[:, pad].zero_()

    def decode(
        self, packed: Tensor, keys_out: Tensor, values_out: Tensor, slots: Tensor | None = None
    ) -> None:
        """Unpacks slices into given tensors.

        Args:
            packed: uint8 [N, slice_bytes], last dim contiguous.
            keys_out: [N, T, Hkv, D] of the codec's dtype, or fp32 where the key codec is not
                exact; any strides but a contiguous last dim; every element is written once. With
                `slots`, [rows, Hkv, D], of which the named rows are written.
            values_out: [N, T, Hkv, Dv], likewise.
            slots: int64 [N, T] contiguous, as for `encode`; no row twice.

        Raises:
            ShapeError: a tensor differs from the above, or the devices differ.
        """
        self._check(keys_out, values_out, packed, slots)
        plan = self._plan_of(packed)
        if plan is not None:
            plan.decode(packed, slots, keys_out, values_out)
        for chunk in self._chunks(packed):
            for side, codec, out in self._sides(keys_out, values_out):
                if plan is not None and side in plan.sides:
                    continue
                numbers = {
                    field.name.removeprefix(f"{side}_"): unpack_field(field, packed[chunk])
                    for field in self.layout.fields
                    if field.name.startswith(f"{side}_")
                }
                if slots is None:
                    _decode_side(codec, side, self.shape, numbers, out[chunk])
                else:
                    rows = out.new_empty((*slots[chunk].shape, *out.shape[1:]))
                    _decode_side(codec, side, self.shape, numbers, rows)
                    out[slots[chunk]] = rows

    def _plan_of(self, packed: Tensor) -> Plan | None:
        """Returns the kernels' plan, None where plain torch codes both sides."""
        if not packed.is_cuda or packed.data_ptr() % 16 or packed.stride(0) % 16:
            return None
        if self._plan is None:
            # Imported here, so that the CPU path needs no Triton.
            from polarcache.kernels.gpu.launch import Plan

            device = torch.cuda.get_device_properties(packed.device)
            # torch's stubs lack this one.
            shared_bytes = int(getattr(device, "shared_memory_per_block_optin", 0))
            self._plan = Plan.of(self.profile, self.shape, self.layout, shared_bytes)
        return self._plan

    def _exact_or_kernels(self, packed: Tensor) -> bool:
        """Whether no side needs temporaries: each is copied or has a kernel."""
        plan = self._plan_of(packed)
        covered = () if plan is None else plan.sides
        return all(
            side in covered or isinstance(codec, Exact)
            for side, codec in (("key", self.profile.key), ("value", self.profile.value))
        )

    def _sides(
        self, keys: Tensor, values: Tensor
    ) -> tuple[tuple[str, KeyCodec, Tensor], tuple[str, ValueCodec, Tensor]]:
        return ("key", self.profile.key, keys), ("value", self.profile.value, values)

    def _energies(self, layers: Sequence[int] | None, out: Tensor) -> Tensor | None:
        """Returns energies of queries [N, Hkv, P] for slices of the profile's calibration."""
        if not self.profile.calibration:
            return None
        if self._calibration is None or layers is None or len(layers) != out.shape[0]:
            raise CalibrationError(
                f"profile {self.profile}: expected its calibration and the layer of each slice"
            )
        return self._calibration.energies(layers, out.device)

    def _field(self, side: str, name: str) -> Field:
        return next(field for field in self.layout.fields if field.name == f"{side}_{name}")

    def _chunks(self, packed: Tensor) -> Iterator[slice]:
        """Yields slice ranges small enough for temporaries to stay in cache or memory."""
        shape = self.shape
        numbers = shape.tokens * shape.kv_heads * max(shape.head_dim, shape.v_head_dim)
        step = max(1, _CPU_CHUNK_NUMBERS // numbers)
        if packed.device.type != "cpu" and self._exact_or_kernels(packed):
            step = max(1, packed.shape[0])
        elif packed.device.type != "cpu":
            step = max(1, _GPU_CHUNK_BYTES // (4 * numbers))
        for start in range(0, packed.shape[0], step):
            yield slice(start, start + step)

    def _check(self, keys: Tensor, values: Tensor, packed: Tensor, slots: Tensor | None) -> None:
        """Raises ShapeError unless all tensors fit this codec and each other."""
        shape = self.shape
        if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.stride(1) != 1:
            raise ShapeError(
                f"packed {packed.dtype} {tuple(packed.shape)}: expected uint8 "
                f"[N, {self.layout.slice_bytes}] with a contiguous last dim"
            )
        if packed.shape[1] != self.layout.slice_bytes:
            raise ShapeError(
                f"packed slices of {packed.shape[1]} bytes: expected {self.layout.slice_bytes}"
            )
        if slots is not None and (
            slots.dtype != torch.int64
            or tuple(slots.shape) != (packed.shape[0], shape.tokens)
            or not slots.is_contiguous()
            or slots.device != packed.device
        ):
            raise ShapeError(
                f"slots {slots.dtype} {tuple(slots.shape)}: expected contiguous int64 "
                f"[{packed.shape[0]}, {shape.tokens}] on {packed.device}"
            )
        for name, codec, tensor, head_dim in (
            ("keys", self.profile.key, keys, shape.head_dim),
            ("values", self.profile.value, values, shape.v_head_dim),
        ):
            rows = (packed.shape[0], shape.tokens) if slots is None else (tensor.shape[0],)
            expected = (*rows, shape.kv_heads, head_dim)
            if tuple(tensor.shape) != expected:
                raise ShapeError(f"{name} {tuple(tensor.shape)}: expected {expected}")
            if tensor.stride(-1) != 1:
                raise ShapeError(f"{name}: expected a contiguous last dim")
            if tensor.device != packed.device:
                raise ShapeError(f"{name} on {tensor.device}: expected {packed.device}")
            if tensor.dtype == self.dtype:
                continue
            if isinstance(codec, Exact) or tensor.dtype != torch.float32:
                also = "" if isinstance(codec, Exact) else " or torch.float32"
                raise ShapeError(f"{name} {tensor.dtype}: expected {self.dtype}{also}")


def _encode_side(
    codec: KeyCodec | ValueCodec, side: str, shape: BlockShape, x: Tensor, query: Tensor | None
) -> _Numbers:
    """Returns the numbers of every field of one side, named as in the layout."""
    if isinstance(codec, Exact):
        return {"elements": x}
    if isinstance(codec, Pair):
        codes, parameters = pair.encode(x, codec, shape)
        return {"codes": codes, "parameters": parameters}
    if isinstance(codec, Integer):
        codes, scales, zeros = values.encode(x, codec.bits, codec.channels_per_group(x.shape[-1]))
        return {"codes": codes, "parameters": torch.stack((scales, zeros), 1)}
    return sides.encode(codec, side, shape, x, query)


def _decode_side(
    codec: KeyCodec | ValueCodec, side: str, shape: BlockShape, numbers: _Numbers, out: Tensor
) -> None:
    """Decodes one side from the numbers of its fields."""
    if isinstance(codec, Exact):
        copy_bytes(numbers["elements"].view(out.view(torch.uint8).shape), out.view(torch.uint8))
    elif isinstance(codec, Pair):
        pair.decode(numbers["codes"], numbers["parameters"], codec, shape, out)
    elif isinstance(codec, Integer):
        scales, zeros = numbers["parameters"].unbind(1)
        values.decode(numbers["codes"], scales, zeros, out)
    else:
        sides.decode(codec, side, shape, numbers, out)


def _peak(numbers: _Numbers) -> Tensor | None:
    """Returns the largest fp16 parameter of each slice, [N]; NaN and infinity survive."""
    peaks = [
        tensor.flatten(1).float().abs_().amax(1)
        for name, tensor in numbers.items()
        if name != "elements" and tensor.dtype == torch.float16
    ]
    if not peaks:
        return None
    return torch.stack(peaks).amax(0)


def check_refused(refused: Tensor) -> None:
    """Raises NonFiniteError for the first refused slice; waits for the device once.

    Args:
        refused: int32 [2, N] as `Codec.encode_unchecked` leaves it.
    """
    found = torch.nonzero(refused)
    if len(found):
        side, index = found[0].tolist()
        raise NonFiniteError(
            f"{('keys', 'values')[side]} of slice {index}: expected finite numbers whose pair "
            "radius, value range or block norm fits fp16 (65504)"
        )
