"""Peers' codecs as plain references: decoded tensors and bits per element, nothing packed.

| name | source |
|---|---|
| fp8 | e4m3 elements, no scale, as engines store them by default |
| kivi<b>[:g<n>] | arXiv 2402.02750: ranges over n tokens (keys) or channels (values) |
| int4 | asymmetric, one range per token and head |
| turbo<b> | arXiv 2504.19874: rotation, norm, Lloyd-Max of a Gaussian channel |
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Side = Literal["k", "v"]
DEFAULT_GROUP = 128
_LLOYD_ROUNDS = 3000


def is_baseline(text: str) -> bool:
    """Whether `text` names one of these codecs."""
    return re.fullmatch(r"fp8|int4|kivi[234](:g\d+)?|turbo[234]", text) is not None


def bits(text: str, side: Side, head_dim: int) -> float:
    """Stored bits per element, parameters included."""
    name, group = _parse(text)
    if name == "fp8":
        return 8.0
    if name == "int4":
        return 4 + 32 / head_dim
    if name.startswith("turbo"):
        return int(name[5:]) + 16 / head_dim
    return int(name[4:]) + 32 / (group if side == "k" else min(group, head_dim))


def decoded(text: str, side: Side, x: Tensor) -> Tensor:
    """What a reader sees of blocks fp32 [N, T, H, D]."""
    name, group = _parse(text)
    if name == "fp8":
        return x.to(torch.float8_e4m3fn).to(x.dtype)
    if name == "int4":
        return _integer(x, 4, -1)
    if name.startswith("turbo"):
        return _turbo(x, int(name[5:]))
    width = int(name[4:])
    if side == "v":
        grouped = x.unflatten(-1, (-1, min(group, x.shape[-1])))
        return _integer(grouped, width, -1).flatten(-2)
    grouped = x.unflatten(1, (-1, min(group, x.shape[1])))
    return _integer(grouped, width, 2).flatten(1, 2)


def _parse(text: str) -> tuple[str, int]:
    name, _, group = text.partition(":g")
    return name, int(group) if group else DEFAULT_GROUP


def _integer(x: Tensor, width: int, dim: int) -> Tensor:
    """Asymmetric integers with fp16 scale and zero over one dim."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / ((1 << width) - 1)).half().float()
    zero = low.half().float()
    codes = ((x - zero) / scale.clamp(min=1e-8)).round().clamp(0, (1 << width) - 1)
    return codes * scale + zero


def _turbo(x: Tensor, width: int) -> Tensor:
    rotation = _rotation(x.shape[-1]).to(x)
    norm = x.norm(dim=-1, keepdim=True).half().float()
    channels = x @ rotation.T / norm.clamp(min=1e-8) * math.sqrt(x.shape[-1])
    points = torch.tensor(gaussian_points(width), dtype=x.dtype, device=x.device)
    codes = torch.bucketize(channels, (points[1:] + points[:-1]) / 2)
    return points[codes] @ rotation * norm / math.sqrt(x.shape[-1])


@lru_cache(maxsize=8)
def _rotation(head_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].float()


@lru_cache(maxsize=8)
def gaussian_points(width: int) -> tuple[float, ...]:
    """Lloyd-Max centroids of the standard normal density."""
    points = torch.linspace(-2, 2, 1 << width, dtype=torch.float64)
    for _ in range(_LLOYD_ROUNDS):
        middle = (points[1:] + points[:-1]) / 2
        bounds = torch.cat((middle.new_tensor([-40.0]), middle, middle.new_tensor([40.0])))
        mass = torch.special.ndtr(bounds)
        density = torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi)
        points = -density.diff() / mass.diff()
    return tuple(points.tolist())
