"""One side of a slice in the polar codecs: tensors to named fields and back."""

import torch
from torch import Tensor

from polarcache.kernels.layout import BlockShape
from polarcache.kernels.options import ArcPair, Polar, Recursive
from polarcache.kernels.polar import arcs, centre, recursive, universal
from polarcache.kernels.values import store

# Checked for finiteness, never stored: the largest radius of a slice with logarithmic radii.
PEAKS = "peaks"


def encode(
    codec: ArcPair | Polar | Recursive,
    side: str,
    shape: BlockShape,
    x: Tensor,
    query: Tensor | None,
) -> dict[str, Tensor]:
    """Returns the numbers of every field of one side, named as in the layout, and `PEAKS`.

    Args:
        codec: how the side is coded.
        side: `key` or `value`; only keys are centred.
        shape: shape of the slice.
        x: fp16, bf16 or fp32 [N, T, Hkv, D].
        query: energy of queries by pair, fp32 [N, Hkv, P]; None for equal energies.
    """
    numbers: dict[str, Tensor] = {}
    if isinstance(codec, ArcPair):
        coded = arcs.encode(x, codec, shape, query)
        if coded.order is None:
            numbers["codes"] = (coded.radius[0] << codec.angle_bits) | coded.angle[0]
        else:
            numbers["order"] = coded.order
            for index, (radius, angle) in enumerate(zip(coded.radius, coded.angle, strict=True)):
                numbers[f"radius{index}"], numbers[f"angle{index}"] = radius, angle
        numbers["arcs"], numbers["radii"] = coded.arcs, coded.radii
        return numbers
    scales: list[Tensor] = []
    if is_centred(codec, side):
        x, numbers["means"], mean_scales = centre.encode_means(x)
        scales.append(mean_scales)
    if isinstance(codec, Polar):
        if side == "value":
            numbers["codes"], gains = universal.encode(x, codec)
            numbers["gains"] = gains.half()
            return numbers
        x, numbers["balance"] = centre.encode_balance(x, shape, query)
        numbers["codes"], gains = universal.encode(x, codec)
        numbers["gains"], largest = centre.encode_gains(gains)
        numbers["scales"] = torch.stack((*scales, largest), -1)
        return numbers
    if scales:
        numbers["scales"] = torch.stack(scales, -1)
    tree = recursive.encode(x, codec)
    for level, codes in enumerate(tree.levels, start=1):
        numbers[f"level{level}"] = codes
    numbers["radii"] = tree.radii
    if tree.codebook is not None:
        numbers["codebook"] = tree.codebook
    if tree.peaks is not None:
        numbers[PEAKS] = tree.peaks
    return numbers


def decode(
    codec: ArcPair | Polar | Recursive,
    side: str,
    shape: BlockShape,
    numbers: dict[str, Tensor],
    out: Tensor,
) -> None:
    """Decodes one side from the numbers of its fields into fp16, bf16 or fp32 [N, T, Hkv, D]."""
    if isinstance(codec, ArcPair):
        if codec.tiers:
            classes = range(len(codec.classes(shape.pairs)))
            radius = tuple(numbers[f"radius{index}"] for index in classes)
            angle = tuple(numbers[f"angle{index}"] for index in classes)
        else:
            codes = numbers["codes"]
            radius = (codes >> codec.angle_bits,)
            angle = (codes & ((1 << codec.angle_bits) - 1),)
        coded = arcs.Codes(
            order=numbers.get("order"),
            radius=radius,
            angle=angle,
            arcs=numbers["arcs"],
            radii=numbers["radii"],
        )
        arcs.decode(coded, codec, shape, out)
        return
    if not is_centred(codec, side):
        _decode_rows(codec, numbers, numbers.get("gains"), out)
        return
    target = torch.empty_like(out, dtype=torch.float32)
    scales = numbers["scales"]
    if isinstance(codec, Polar):
        gains = centre.decode_gains(numbers["gains"], scales[..., 1])
        _decode_rows(codec, numbers, gains, target)
        target.div_(centre.decode_balance(numbers["balance"], shape).unsqueeze(1))
    else:
        _decode_rows(codec, numbers, None, target)
    target.add_(centre.decode_means(numbers["means"], scales[..., 0]).unsqueeze(1))
    store(target, out)


def _decode_rows(
    codec: Polar | Recursive, numbers: dict[str, Tensor], gains: Tensor | None, out: Tensor
) -> None:
    """Decodes rows as they were given to the rotation."""
    if isinstance(codec, Polar):
        if gains is None:
            raise ValueError("polar codes without gains")
        universal.decode(numbers["codes"], gains, codec, out)
        return
    levels = range(1, 1 + len(codec.level_bits(out.shape[-1])))
    tree = recursive.Codes(
        tuple(numbers[f"level{level}"] for level in levels),
        numbers["radii"],
        numbers.get("codebook"),
    )
    recursive.decode(tree, codec, out)


def is_centred(codec: Polar | Recursive, side: str) -> bool:
    """Whether a side's channel means are taken off before the rotation."""
    return side == "key" and (isinstance(codec, Polar) or codec.form == "deep")
