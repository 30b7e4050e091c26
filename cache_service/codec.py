"""Blocks between their wire form and their packed form: the only caller of the codec kernels.

Payload bytes in, packed bytes into a page; packed bytes out of pages, payload bytes out. A
namespace's spans all have one shape, so any number of slices is one kernel call.
"""

from __future__ import annotations

from collections.abc import Sequence

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

__all__ = ["BlockCodec"]


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
    def packed_block_bytes(self) -> int:
        """Bytes of one packed block: the size of its page."""
        return self.packed.slice_bytes * self._layout.num_layers

    def slice_bytes(self, *, packed: bool) -> int:
        """Bytes of one slice on the wire."""
        return self.packed.slice_bytes if packed else self._layout.raw_slice_bytes

    def write(
        self, page: torch.Tensor, first_layer: int, payload: memoryview, *, packed: bool
    ) -> None:
        """Puts consecutive layers of a block into its page.

        Args:
            page: The page's bytes, uint8 [packed_block_bytes].
            first_layer: First layer.
            payload: Whole slices, layer after layer.
            packed: Whether the payload is in packed form.

        Raises:
            NonFiniteError: Keys or values hold NaN, infinity, or what the codec cannot carry.
        """
        num_layers = len(payload) // self.slice_bytes(packed=packed)
        out = page.view(-1, self.packed.slice_bytes)[first_layer : first_layer + num_layers]
        wire = bytes_tensor(payload).to(self._device, non_blocking=True)
        if not packed and not self._raw_is_packed:
            keys, values = self._split(wire)
            try:
                layers = range(first_layer, first_layer + num_layers)
                self._codec.encode(keys, values, out, layers)
            except KernelNonFiniteError as error:
                raise NonFiniteError(f"layer {first_layer} and following: {error}") from error
        else:
            slices = wire.view(num_layers, self.packed.slice_bytes)
            try:
                check_packed(self.packed, self._dtype, slices)
            except KernelNonFiniteError as error:
                raise NonFiniteError(f"layer {first_layer} and following: {error}") from error
            if out.is_cuda:
                out.copy_(slices)
            else:
                # NumPy's copy reads what the check has just brought into the cache.
                np.copyto(out.numpy(), slices.numpy())
        if out.is_cuda:
            torch.cuda.current_stream().synchronize()

    def read(
        self, pages: Sequence[torch.Tensor], layers: Sequence[int], *, packed: bool
    ) -> list[Buffer]:
        """Wire bytes of slices.

        Args:
            pages: For each slice the page it is in.
            layers: For each slice its layer.
            packed: Whether to return packed form.

        Returns:
            One buffer a slice. Where no codec runs on the CPU they are views of the pages.
        """
        size = self.packed.slice_bytes
        slices = [
            page[layer * size : (layer + 1) * size]
            for page, layer in zip(pages, layers, strict=True)
        ]
        if packed or self._raw_is_packed:
            if self._device.type == "cpu":
                return [tensor_bytes(one) for one in slices]
            return _rows(torch.stack(slices).cpu())
        raw = torch.empty(
            len(slices), self._layout.raw_slice_bytes, dtype=torch.uint8, device=self._device
        )
        keys, values = self._split(raw)
        self._codec.decode(torch.stack(slices), keys, values)
        return _rows(raw.cpu())

    def _split(self, wire: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [N, T, Hkv, D] and values [N, T, Hkv, Dv] over the memory of N raw slices."""
        layout = self._layout
        rows = wire.view(-1, layout.raw_slice_bytes).view(self._dtype)
        num_keys = layout.raw_key_bytes // layout.element_bytes
        tokens, heads = layout.block_tokens, layout.num_kv_heads
        keys = rows[:, :num_keys].unflatten(1, (tokens, heads, layout.head_dim))
        values = rows[:, num_keys:].unflatten(1, (tokens, heads, layout.v_head_dim))
        return keys, values


def _rows(slices: torch.Tensor) -> list[Buffer]:
    return [tensor_bytes(row) for row in slices]
