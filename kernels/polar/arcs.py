"""Pair codec on arcs: every phase is a whole number of 65536ths of a turn, bits differ by pair.

Ours, from arXiv 2502.00527. Math: README.md, section 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from polarcache.kernels.layout import BlockShape
from polarcache.kernels.options import ArcPair
from polarcache.kernels.polar.pair import (
    FP16_MAX,
    arc_middle,
    pair_halves,
    replace_angles_of_zero_radius,
)

START_BITS = 12
MAX_ARC_EXPONENT = 8
PHASE_BITS = 16
_TAU = 2 * math.pi


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of N slices.

    Attributes:
        order: uint8 [N, Hkv, P], pairs by falling weight; None where all pairs are of one class.
        radius: for each class uint8 [N, T, Hkv, pairs of the class].
        angle: likewise.
        arcs: uint8 [N, G, 2, Hkv, P]: start of the arc in 4096ths of a turn << 4 | exponent of
            its width, high byte and low byte.
        radii: fp16 [N, G, 2, Hkv, P]: radius min and radius scale, times the gain. Not finite
            where a key is NaN, infinite or of a radius that fp16 cannot carry.
    """

    order: Tensor | None
    radius: tuple[Tensor, ...]
    angle: tuple[Tensor, ...]
    arcs: Tensor
    radii: Tensor


def encode(x: Tensor, codec: ArcPair, shape: BlockShape, query: Tensor | None = None) -> Codes:
    """Codes keys.

    Args:
        x: fp16, bf16 or fp32 [N, T, Hkv, D], last dim contiguous.
        codec: bits and group.
        shape: pairing and rotary_dim; its sizes are those of `x`.
        query: energy of queries by pair, fp32 [N, Hkv, P]; None for equal energies.

    Precision: fp32; parameters are rounded before codes are taken from them.
    """
    first, second = pair_halves(x, shape)
    radius = torch.mul(first, first).addcmul_(second, second).sqrt_()
    angle = torch.atan2(second, first, out=first)
    radius = torch.unflatten(radius, 1, (-1, codec.group_tokens))
    angle = torch.unflatten(angle, 1, (-1, codec.group_tokens))
    radius_min, radius_max = radius.amin(2), radius.amax(2)
    replace_angles_of_zero_radius(angle, radius)
    middle = arc_middle(angle)
    angle.sub_(middle.unsqueeze(2))
    angle.sub_(torch.mul(angle, 1 / _TAU).round_(), alpha=_TAU)
    angle_min, angle_max = angle.amin(2), angle.amax(2)
    # frexp: the range is less than 2**exponent turns and at least half of that.
    turns = ((angle_max - angle_min) / _TAU).clamp_(min=2.0**-20)
    exponent = (-torch.frexp(turns).exponent).clamp_(0, MAX_ARC_EXPONENT)
    width = torch.ldexp(torch.full_like(turns, _TAU), -exponent)
    centre = (angle_min + angle_max) / 2
    start = torch.round((middle + centre - width / 2) * ((1 << START_BITS) / _TAU))
    # Relative to the middle, so that the angles' whole turns do not matter.
    angle.sub_((start * (_TAU / (1 << START_BITS)) - middle).unsqueeze(2))

    weight = (radius_max - radius_min).square_() + ((radius_max + radius_min) * width / 8).square_()
    order = None
    if codec.tiers:
        weight = weight.sum(1) if query is None else weight.sum(1) * query
        order = torch.sort(weight, dim=-1, descending=True, stable=True).indices
    radius_bits, angle_bits = _bits_by_pair(codec, order, shape.pairs, x.device)
    step = torch.ldexp(width, -angle_bits)
    gain = (step / 2) / torch.sin(step / 2)
    radius_scale = torch.ldexp((radius_max - radius_min) * gain, -radius_bits)
    radius_scale.masked_fill_(radius_max > FP16_MAX, math.inf)
    radii = torch.stack((radius_min * gain, radius_scale), 2).half()
    zero, scale = radii.float().unbind(2)
    _codes_(radius.mul_(gain.unsqueeze(2)).sub_(zero.unsqueeze(2)), scale, radius_bits)
    _codes_(angle, step, angle_bits)
    arcs = (start.to(torch.int32) << 4) | exponent
    return Codes(
        order=None if order is None else order.to(torch.uint8),
        radius=_by_class(radius, codec, order, shape.pairs),
        angle=_by_class(angle, codec, order, shape.pairs),
        arcs=torch.stack((arcs >> 8, arcs), 2).bitwise_and_(255).to(torch.uint8),
        radii=radii,
    )


def decode(codes: Codes, codec: ArcPair, shape: BlockShape, out: Tensor) -> None:
    """Decodes keys at the centres of their bins.

    Args:
        codes: as `encode` returns them; any bytes decode, an order that repeats pairs as some
            permutation.
        codec: bits and group.
        shape: pairing and rotary_dim.
        out: fp16, bf16 or fp32 [N, T, Hkv, D]; every element is written once.

    Precision: fp32, rounded once to the dtype of `out`.
    """
    order = None if codes.order is None else codes.order.long().argsort(dim=-1, stable=True)
    radius_bits, angle_bits = _bits_by_pair(codec, None, shape.pairs, out.device)
    radius, angle = torch.cat(codes.radius, -1), torch.cat(codes.angle, -1)
    if order is not None:
        # `order` here is the inverse: where each pair's codes are.
        radius_bits, angle_bits = (
            bits.expand(order.shape).gather(-1, order).unsqueeze(1)
            for bits in (radius_bits, angle_bits)
        )
        index = order.unsqueeze(1).expand(radius.shape)
        radius, angle = radius.gather(-1, index), angle.gather(-1, index)
    radius = torch.unflatten(radius, 1, (-1, codec.group_tokens)).float()
    angle = torch.unflatten(angle, 1, (-1, codec.group_tokens)).to(torch.int32)
    zero, scale = codes.radii.float().unsqueeze(3).unbind(2)
    radius.mul_(scale).add_(zero + 0.5 * scale)
    high, low = codes.arcs.to(torch.int32).unbind(2)
    arcs = (high << 8) | low
    start = (arcs >> 4) << (PHASE_BITS - START_BITS)
    shift = PHASE_BITS - 1 - angle_bits - (arcs & 15).clamp_(max=MAX_ARC_EXPONENT)
    phase = torch.bitwise_left_shift(2 * angle + 1, shift.unsqueeze(2)) + start.unsqueeze(2)
    phase = phase.float().mul_(_TAU / (1 << PHASE_BITS))
    first = torch.cos(phase).mul_(radius).flatten(1, 2)
    second = phase.sin_().mul_(radius).flatten(1, 2)
    for pairs, first_channels, second_channels in shape.pair_channels():
        out[..., first_channels].copy_(first[..., pairs])
        out[..., second_channels].copy_(second[..., pairs])


def _bits_by_pair(
    codec: ArcPair, order: Tensor | None, pairs: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns bits of radius and angle, int32: [N, 1, Hkv, P] by pair, or [P] by rank."""
    both = []
    for which in (1, 2):
        ranked = [bits[which] for bits in codec.classes(pairs) for _ in range(bits[0])]
        bits = torch.tensor(ranked, dtype=torch.int32, device=device)
        if order is not None:
            bits = torch.empty_like(order, dtype=torch.int32).scatter_(
                -1, order, bits.expand(order.shape)
            )
            bits = bits.unsqueeze(1)
        both.append(bits)
    return both[0], both[1]


def _codes_(numbers: Tensor, scale: Tensor, bits: Tensor) -> None:
    """Turns [N, G, g, Hkv, P] distances from zero into codes, as whole fp32 numbers, in place."""
    # Dividing by infinity is code 0, which is what a group of one single number gets.
    numbers.div_(torch.where(scale > 0, scale, math.inf).unsqueeze(2)).floor_().clamp_(min=0)
    largest = torch.ldexp(torch.ones_like(scale), bits) - 1
    torch.minimum(numbers, largest.unsqueeze(2), out=numbers)


def _by_class(
    numbers: Tensor, codec: ArcPair, order: Tensor | None, pairs: int
) -> tuple[Tensor, ...]:
    """Splits codes [N, G, g, Hkv, P] into classes, uint8 [N, T, Hkv, pairs of the class]."""
    codes = numbers.flatten(1, 2).to(torch.int32).to(torch.uint8)
    if order is not None:
        codes = codes.gather(-1, order.unsqueeze(1).expand(codes.shape))
    sizes = [count for count, _, _ in codec.classes(pairs)]
    return torch.split(codes, sizes, -1)
