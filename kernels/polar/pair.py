"""Pair codec: the radius and angle of each RoPE pair, with ranges per group of tokens.

Source: arXiv 2502.00527, section 3; the smallest arc is ours. Math: README.md, section 1.
"""

import math

import torch
from torch import Tensor

from polarcache.kernels.layout import BlockShape
from polarcache.kernels.options import Pair

# 32 sectors of 11.25 degrees: a GPU rotates such a set in one instruction, and 60 sectors lowered
# the error of isotropic keys by 1 %, of keys with means by 0.1 %.
NUM_SECTORS = 32
FP16_MAX = 65504.0
_TAU = 2 * math.pi
_ALL_SECTORS = (1 << NUM_SECTORS) - 1


def encode(x: Tensor, codec: Pair, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """Codes keys.

    Args:
        x: fp16, bf16 or fp32 [N, T, Hkv, D], last dim contiguous.
        codec: bits, range and group.
        shape: pairing and rotary_dim; its sizes are those of `x`.

    Returns:
        codes: uint8 [N, T, Hkv, D/2], radius code << angle_bits | angle code.
        parameters: fp16 [N, G, 4, Hkv, D/2]: radius min, radius scale, angle zero, angle scale.
            Not finite where a key is NaN, infinite or in a pair of radius above 65504.

    Precision: fp32; parameters are rounded to fp16 before codes are taken from them.
    """
    first, second = pair_halves(x, shape)
    radius = torch.mul(first, first).addcmul_(second, second).sqrt_()
    # atan2(-y, -x) is the angle minus pi, without a branch; adding 0 makes -0 the angle 0.
    angle = torch.atan2(second.add_(0.0).neg_(), first.neg_(), out=first)
    radius = torch.unflatten(radius, 1, (-1, codec.group_tokens))
    angle = torch.unflatten(angle, 1, (-1, codec.group_tokens))

    radius_min, radius_max = radius.amin(2), radius.amax(2)
    radius_scale = (radius_max - radius_min) / (1 << codec.radius_bits)
    radius_scale.masked_fill_(radius_max > FP16_MAX, math.inf)
    middle = None
    if codec.angle_range == "arc":
        # The test costs a wait on other devices, so only the CPU skips the repair.
        if angle.device.type != "cpu" or not bool(radius_min.all()):
            replace_angles_of_zero_radius(angle, radius)
        middle = arc_middle(angle)
        angle.sub_(middle.unsqueeze(2))
        angle.sub_(torch.mul(angle, 1 / _TAU).round_(), alpha=_TAU)
    angle_min, angle_max = angle.amin(2), angle.amax(2)
    angle_scale = (angle_max - angle_min) / (1 << codec.angle_bits)
    # Angles so far are relative to `origin`; the stored zero is an angle of the pair itself.
    origin = math.pi if middle is None else middle + math.pi
    angle_zero = angle_min + origin
    if middle is not None:
        angle_zero = angle_zero - _TAU * torch.round(angle_zero / _TAU)

    parameters = torch.stack((radius_min, radius_scale, angle_zero, angle_scale), 2).half()
    rounded = parameters.float()
    # Only the rounding error moves the zero, so no angle can leave by the other end of the arc.
    relative_zero = angle_min + (rounded[:, :, 2] - angle_zero)
    _codes_(angle, relative_zero, rounded[:, :, 3], codec.angle_bits)
    _codes_(radius, rounded[:, :, 0], rounded[:, :, 1], codec.radius_bits)
    codes = angle.add_(radius, alpha=1 << codec.angle_bits).flatten(1, 2)
    return codes.to(torch.int32).to(torch.uint8), parameters


def decode(codes: Tensor, parameters: Tensor, codec: Pair, shape: BlockShape, out: Tensor) -> None:
    """Decodes keys at the centres of their bins.

    Args:
        codes: uint8 [N, T, Hkv, D/2].
        parameters: fp16 [N, G, 4, Hkv, D/2].
        codec: bits and group.
        shape: pairing and rotary_dim.
        out: fp16, bf16 or fp32 [N, T, Hkv, D]; every element is written once.

    Precision: fp32, rounded once to the dtype of `out`.
    """
    codes = torch.unflatten(codes, 1, (-1, codec.group_tokens))
    zero_r, scale_r, zero_t, scale_t = parameters.float().unsqueeze(3).unbind(2)
    radius = (codes >> codec.angle_bits).float()
    radius.mul_(scale_r).add_(zero_r + 0.5 * scale_r)
    angle = (codes & ((1 << codec.angle_bits) - 1)).float()
    angle.mul_(scale_t).add_(zero_t + 0.5 * scale_t)
    first = torch.cos(angle).mul_(radius).flatten(1, 2)
    second = angle.sin_().mul_(radius).flatten(1, 2)
    for pairs, first_channels, second_channels in shape.pair_channels():
        out[..., first_channels].copy_(first[..., pairs])
        out[..., second_channels].copy_(second[..., pairs])


def pair_halves(x: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """Returns the first and second channels of every pair, fp32 [N, T, Hkv, D/2] contiguous."""
    halves = x.new_empty((2, *x.shape[:-1], shape.pairs), dtype=torch.float32)
    for pairs, first_channels, second_channels in shape.pair_channels():
        halves[0, ..., pairs].copy_(x[..., first_channels])
        halves[1, ..., pairs].copy_(x[..., second_channels])
    return halves[0], halves[1]


def _codes_(numbers: Tensor, zero: Tensor, scale: Tensor, bits: int) -> None:
    """Turns [N, G, g, Hkv, P] numbers into codes, as whole fp32 numbers, in place."""
    # Dividing by infinity is code 0, which is what a group of one single number gets.
    divisor = torch.where(scale > 0, scale, math.inf).unsqueeze(2)
    numbers.sub_(zero.unsqueeze(2)).div_(divisor).clamp_(0, (1 << bits) - 1).floor_()


def replace_angles_of_zero_radius(angle: Tensor, radius: Tensor) -> None:
    """Gives zero-radius tokens the angle of their group's longest pair, in place."""
    longest = radius.argmax(2, keepdim=True)
    angle.copy_(torch.where(radius > 0, angle, angle.gather(2, longest)))


def arc_middle(angle: Tensor) -> Tensor:
    """Finds the middle of the smallest arc that holds all angles of a group.

    The arc is the smallest up to the width of two sectors, and never wider than the range between
    minimum and maximum on [-pi, pi): that cut is taken unless a run of empty sectors is longer.

    Args:
        angle: fp32 [N, G, g, Hkv, P] in [-pi, pi], g a power of two.

    Returns:
        fp32 [N, G, Hkv, P] in [-pi, 2 pi).
    """
    half_circle = angle.new_tensor(NUM_SECTORS / 2)
    sector = torch.add(half_circle, angle, alpha=NUM_SECTORS / _TAU).to(torch.int32)
    # NaN converts to any integer; the clamp keeps its shift defined until the keys are refused.
    occupied = torch.bitwise_left_shift(1, sector.clamp_(0, NUM_SECTORS - 1).to(torch.int64))
    while occupied.shape[2] > 1:
        half = occupied.shape[2] // 2
        occupied = occupied[:, :, :half] | occupied[:, :, half:]
    start, length = _longest_run(~occupied[:, :, 0] & _ALL_SECTORS)
    gap_at_cut = (_TAU - (angle.amax(2) - angle.amin(2))) * (NUM_SECTORS / _TAU)
    middle = (start + 0.5 * (length + NUM_SECTORS)) * (_TAU / NUM_SECTORS) - math.pi
    return middle.mul_(gap_at_cut < length)


def _longest_run(empty: Tensor) -> tuple[Tensor, Tensor]:
    """Finds a longest circular run of ones in sets of sectors.

    Args:
        empty: int64, any shape, a bit for each sector, not all ones.

    Returns:
        start, length: fp32, same shape; length 0 where no bit is set.
    """
    runs = [empty]  # bit i of runs[k]: the 2**k bits from i on are all ones
    for exponent in range(5):
        runs.append(runs[-1] & _rotate(runs[-1], 1 << exponent))
    begins = torch.full_like(empty, _ALL_SECTORS)
    length = torch.zeros_like(empty)
    for exponent in reversed(range(6)):
        longer = begins & _rotate(runs[exponent], length)
        found = longer != 0
        begins = torch.where(found, longer, begins)
        length += found * (1 << exponent)
    # A single set bit is a power of two, which frexp reads exactly.
    start = torch.frexp((begins & -begins).float()).exponent - 1
    return start.float(), length.float()


def _rotate(bits: Tensor, count: Tensor | int) -> Tensor:
    """Moves bit i + count to bit i, around the sectors; bits above them are left over."""
    return (bits >> count) | (bits << (NUM_SECTORS - count))
