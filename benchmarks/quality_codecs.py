"""Profiles as coders: our codecs through their packed bytes, peers through their references.

A profile text is `exact` or `k=<codec>,v=<codec>`; a codec is one of `polarcache.kernels.profile`
or a name of `quality_baselines`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from quality_baselines import Side, bits, decoded, is_baseline
from quality_model import Model
from torch import Tensor

from polarcache.kernels import BlockShape, Profile
from polarcache.kernels.calibration import Calibration
from polarcache.kernels.codec import Codec

PUBLISHED_AND_PEERS = {
    "keys": [
        "k=fp8,v=exact",
        "k=kivi4,v=exact",
        "k=kivi2,v=exact",
        "k=kivi2:g32,v=exact",
        "k=int4,v=exact",
        "k=turbo4,v=exact",
        "k=turbo3,v=exact",
        "k=pair:r4t4:minmax,v=exact",
        "k=pair:r3t3:minmax,v=exact",
        "k=recursive,v=exact",
    ],
    "values": [
        "k=exact,v=fp8",
        "k=exact,v=kivi4",
        "k=exact,v=kivi2:g32",
        "k=exact,v=turbo4",
        "k=exact,v=turbo3",
        "k=exact,v=recursive",
    ],
    "both": [
        "k=fp8,v=fp8",
        "k=kivi4,v=kivi4",
        "k=kivi2,v=kivi2",
        "k=turbo4,v=turbo4",
        "k=pair:r4t4:minmax,v=int4",
        "k=pair:r3t3:minmax,v=int2",
        "k=recursive,v=recursive",
    ],
}
OURS = {
    "keys": [
        "k=pair:r4t4,v=exact",
        "k=pair:r4t4:arc2,v=exact",
        "k=pair:tiers8,v=exact",
        "k=polar,v=exact",
        "k=polar:r3t5,v=exact",
        "k=recursive:deep,v=exact",
        "k=pair:r2t4:arc2,v=exact",
        "k=pair:tiers6,v=exact",
        "k=polar:b6,v=exact",
        "k=polar:r2t4,v=exact",
    ],
    "values": [
        "k=exact,v=int4",
        "k=exact,v=int2",
        "k=exact,v=polar",
        "k=exact,v=polar:b6",
        "k=exact,v=polar:b4",
        "k=exact,v=recursive:deep",
    ],
    "both": [
        "k=pair:r4t4,v=int4",
        "k=pair:tiers8,v=polar",
        "k=polar,v=polar",
        "k=polar,v=polar:b6",
        "k=recursive:deep,v=recursive:deep",
        "k=pair:tiers6,v=polar:b6",
        "k=polar:b6,v=polar:b6",
    ],
}
CALIBRATED = {
    "keys": [
        "k=pair:tiers8:cal,v=exact",
        "k=polar:cal,v=exact",
        "k=pair:tiers6:cal,v=exact",
        "k=polar:b6:cal,v=exact",
    ],
    "values": [],
    "both": ["k=polar:cal,v=polar", "k=polar:b6:cal,v=polar:b6"],
}


@dataclass(frozen=True, slots=True)
class ProfileCoder:
    """A profile on one model's heads.

    Attributes:
        text: the profile.
        key_bits: stored bits per key element, parameters included; 16 where exact.
        value_bits: likewise.
        sinks: first tokens of a document that stay exact.
    """

    text: str
    key_bits: float
    value_bits: float
    _key: str
    _value: str
    _codecs: dict[str, Codec]
    _sinks: int = 0

    @property
    def bits(self) -> float:
        """Bits per element over keys and values."""
        return (self.key_bits + self.value_bits) / 2

    def keys(self, layer: int, blocks: Tensor) -> Tensor:
        """Decoded keys; see `quality_model.Coder`."""
        return self._through("k", self._key, layer, blocks)

    def values(self, layer: int, blocks: Tensor) -> Tensor:
        """Decoded values; see `quality_model.Coder`."""
        return self._through("v", self._value, layer, blocks)

    def _through(self, side: Side, text: str, layer: int, blocks: Tensor) -> Tensor:
        if text == "exact":
            return blocks
        if is_baseline(text):
            out = decoded(text, side, blocks.half().float())
        else:
            out = _round_trip(self._codecs[side], side, layer, blocks)
        if self._sinks:
            out[0, : self._sinks] = blocks[0, : self._sinks]
        return out


def _round_trip(codec: Codec, side: Side, layer: int, blocks: Tensor) -> Tensor:
    """Packs and unpacks one side; the codec's other side is exact and gets an empty head."""
    x = blocks.half()
    other = x.new_zeros((*x.shape[:3], 16))
    keys, values = (x, other) if side == "k" else (other, x)
    packed = torch.empty((x.shape[0], codec.layout.slice_bytes), dtype=torch.uint8, device=x.device)
    keys_out, values_out = torch.empty_like(keys), torch.empty_like(values)
    codec.encode(keys, values, packed, [layer] * x.shape[0])
    codec.decode(packed, keys_out, values_out)
    return (keys_out if side == "k" else values_out).float()


def coder(
    text: str, model: Model, sinks: int = 0, calibration: Calibration | None = None
) -> ProfileCoder:
    """Returns the coder of a profile for a model's shape; `:cal` names the calibration given.

    Raises:
        ValueError: the profile follows neither grammar.
    """
    key, value = ("exact", "exact") if text == "exact" else _sides(text)
    codecs: dict[str, Codec] = {}
    found: dict[str, float] = {}
    for side, name in (("k", key), ("v", value)):
        if name == "exact":
            found[side] = 16.0
        elif is_baseline(name):
            found[side] = bits(name, side, model.head_dim)
        else:
            codecs[side] = _codec(side, name, model, calibration)
            layout: Any = codecs[side].layout
            found[side] = layout.key_bits if side == "k" else layout.value_bits
    return ProfileCoder(text, found["k"], found["v"], key, value, codecs, sinks)


def _sides(text: str) -> tuple[str, str]:
    key, comma, value = text.partition(",v=")
    if not comma or not key.startswith("k="):
        raise ValueError(f"profile {text!r}: expected exact or k=<codec>,v=<codec>")
    return key[2:], value


def _codec(side: str, name: str, model: Model, calibration: Calibration | None) -> Codec:
    """Returns a codec with `name` on one side and exact 16-channel heads on the other."""
    if name.endswith(":cal"):
        if calibration is None:
            raise ValueError(f"{name}: expected --calibration")
        name += calibration.name
    profile = Profile.parse(f"k={name},v=exact" if side == "k" else f"k=exact,v={name}")
    dims = (model.head_dim, 16) if side == "k" else (16, model.head_dim)
    shape = BlockShape(model.block_tokens, model.kv_heads, *dims, "half", dims[0])
    return Codec(profile, shape, torch.float16, calibration if profile.calibration else None)
