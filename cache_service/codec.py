"""Blocks between their wire form and their packed form: the only caller of the codec kernels.

Payload bytes in, packed bytes into a page; packed bytes out of pages, payload bytes out. A
namespace's spans all have one shape, so any number of slices is one kernel call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polarcache.kernels.calibration import Calibration
from polarcache.kernels.checks import check_packed
from polarcache.kernels.codec import Codec
from polarcache.kernels.errors import NonFiniteError as KernelNonFiniteError
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.profile import Exact, Profile
from polarcache.proto.errors import NonFiniteError
from polarcache.proto.frames import Buffer
from polarcache.proto.layout import KvLayout
from polarcache.proto.tensors import bytes_tensor, tensor_bytes

__all__ = ["BlockCodec", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Consecutive layers of one block in its page.

    Attributes:
        page: The page's bytes, uint8 [packed_block_bytes].
        layers: The layers.
    """

    page: torch.Tensor
    layers: range


class BlockCodec:
    """The codec of one namespace, on the memory tier's device.

    Args:
        profile: Codec profile.
        layout: Shape of the namespace's blocks.
        device: Where pages are.
        calibration: What the profile names, None if it names none.

    Raises:
        polarcache.kernels.errors.CodecError: The profile does not fit the layout.
    """

    def __init__(
        self,
        profile: Profile,
        layout: KvLayout,
        device: torch.device,
        calibration: Calibration | None = None,
    ) -> None:
        self._layout = layout
        self._device = device
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        shape = BlockShape(
            tokens=layout.block_tokens,
            kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            v_head_dim=layout.v_head_dim,
            pairing=layout.rope_pairing,
            rotary_dim=layout.rotary_dim,
        )
        self._codec = Codec(profile, shape, self._dtype, calibration)
        self.packed = self._codec.layout
        # An exact slice's packed bytes are its raw bytes: both are K then V, unpadded.
        self._raw_is_packed = isinstance(profile.key, Exact) and isinstance(profile.value, Exact)

    @property
    def kernel_codec(self) -> Codec:
        """What attention over packed pages needs to read them."""
        return self._codec

    @property
    def packed_block_bytes(self) -> int:
        """Bytes of one packed block: the size of its page."""
        return self.packed.slice_bytes * self._layout.num_layers

    def is_verbatim(self, *, packed: bool) -> bool:
        """Whether wire bytes are page bytes, so that no codec runs."""
        return packed or self._raw_is_packed

    def only_copies(self, *, packed: bool) -> bool:
        """Whether wire bytes are page bytes in host memory, so that no codec and no GPU runs."""
        return self.is_verbatim(packed=packed) and self._device.type == "cpu"

    def slice_bytes(self, *, packed: bool) -> int:
        """Bytes of one slice on the wire."""
        return self.packed.slice_bytes if packed else self._layout.raw_slice_bytes

    def write(self, places: Sequence[Place], payload: memoryview, *, packed: bool) -> None:
        """Puts slices into their pages.

        Args:
            places: Where they go.
            payload: Their bytes, one after the other.
            packed: Whether the payload is in packed form.

        Raises:
            NonFiniteError: Keys or values hold NaN, infinity, or what the codec cannot carry.
        """
        wire = bytes_tensor(payload).to(self._device, non_blocking=True)
        slices = wire.view(-1, self.slice_bytes(packed=packed))
        outs = [self._slices(place) for place in places]
        ends = list(itertools.accumulate(len(place.layers) for place in places))
        try:
            if self.is_verbatim(packed=packed):
                check_packed(self.packed, self._dtype, slices)
                for out, end in zip(outs, ends, strict=True):
                    _copy(out, slices[end - len(out) : end])
            else:
                for place, out, end in zip(places, outs, ends, strict=True):
                    keys, values = self._split(slices[end - len(out) : end])
                    self._codec.encode(keys, values, out, place.layers)
        except KernelNonFiniteError as error:
            raise NonFiniteError(str(error)) from error
        if wire.is_cuda:
            torch.cuda.current_stream().synchronize()

    def read(self, places: Sequence[Place], *, packed: bool) -> list[Buffer]:
        """Wire bytes of slices.

        Args:
            places: Where they are.
            packed: Whether to return packed form.

        Returns:
            One buffer a place. Where no codec runs on the CPU they are views of the pages.
        """
        slices = [self._slices(place) for place in places]
        if self.only_copies(packed=packed):
            return [tensor_bytes(one) for one in slices]
        num_slices = sum(len(one) for one in slices)
        rows = torch.empty(num_slices, self.slice_bytes(packed=packed), dtype=torch.uint8)
        self._fill(rows, slices, packed=packed)
        return [tensor_bytes(one) for one in rows.split([len(one) for one in slices])]

    def read_into(self, places: Sequence[Place], target: memoryview, *, packed: bool) -> int:
        """Writes the wire bytes of slices to memory, one after the other.

        Args:
            places: Where they are.
            target: Where they go; longer than them, or as long.
            packed: Whether to write packed form.

        Returns:
            Their bytes.
        """
        slices = [self._slices(place) for place in places]
        size = self.slice_bytes(packed=packed)
        num_bytes = size * sum(len(one) for one in slices)
        self._fill(bytes_tensor(target[:num_bytes]).view(-1, size), slices, packed=packed)
        return num_bytes

    def _fill(self, rows: torch.Tensor, slices: Sequence[torch.Tensor], *, packed: bool) -> None:
        """Writes wire bytes of slices, uint8 [N, slice_bytes] on the CPU."""
        if self.only_copies(packed=packed):
            end = 0
            for one in slices:
                # Without the lock of the interpreter.
                np.copyto(rows[end : end + len(one)].numpy(), one.numpy())
                end += len(one)
            return
        stored = torch.cat(list(slices))
        if self.is_verbatim(packed=packed):
            rows.copy_(stored)
            return
        decoded = (
            rows if self._device.type == "cpu" else torch.empty_like(rows, device=self._device)
        )
        keys, values = self._split(decoded)
        self._codec.decode(stored, keys, values)
        if decoded is not rows:
            rows.copy_(decoded)

    def _slices(self, place: Place) -> torch.Tensor:
        """Packed slices at a place, uint8 [len(place.layers), packed.slice_bytes]."""
        size = self.packed.slice_bytes
        return place.page[place.layers.start * size : place.layers.stop * size].view(-1, size)

    def _split(self, wire: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [N, T, Hkv, D] and values [N, T, Hkv, Dv] over N raw slices."""
        layout = self._layout
        rows = wire.view(self._dtype)
        num_keys = layout.raw_key_bytes // layout.element_bytes
        tokens, heads = layout.block_tokens, layout.num_kv_heads
        keys = rows[:, :num_keys].unflatten(1, (tokens, heads, layout.head_dim))
        values = rows[:, num_keys:].unflatten(1, (tokens, heads, layout.v_head_dim))
        return keys, values


def _copy(out: torch.Tensor, slices: torch.Tensor) -> None:
    if out.is_cuda:
        out.copy_(slices)
    else:
        # NumPy's copy reads what the check has just brought into the cache.
        np.copyto(out.numpy(), slices.numpy())
