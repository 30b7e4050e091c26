"""Codec profiles: the text that says how keys and values are coded.

    profile   = "exact" | "k=" key ",v=" value
    key       = exact | pair | recursive
    value     = exact | "int4" [":g" channels] | "int2" [":g" channels] | recursive
    exact     = "exact"                       ("fp16" and "bf16" are read as "exact")
    pair      = "pair" [":r" bits "t" bits] [":minmax" | ":arc"] [":g" tokens]
    recursive = "recursive" [":kmeans"] [":seed" number]

`str` of a profile is canonical: options in the order above, defaults left out, except that the
bits of a pair codec are always spelled, because they are what people look for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from polarcache.kernels.errors import ProfileError

PAIR_GROUP_TOKENS = (32, 64, 128, 256)
MAX_PAIR_BITS = 8
MIN_PAIR_BITS = 3
MAX_SEED = 2**32 - 1
INT2_GROUP_CHANNELS = 32
MAX_GROUP_CHANNELS = 256

_ALLOWED = {
    "k": "exact, pair[:r<r>t<t>][:minmax|:arc][:g32|g64|g128|g256], recursive[:kmeans][:seed<N>]",
    "v": "exact, int4[:g<channels>], int2[:g<channels>], recursive[:kmeans][:seed<N>]",
}
KEY_CODECS = ("exact", "pair", "recursive")
VALUE_CODECS = ("exact", "int4", "int2", "recursive")
_EXACT_NAMES = ("exact", "fp16", "bf16")
_NUMBER = r"(0|[1-9][0-9]{0,9})"


@dataclass(frozen=True, slots=True)
class Exact:
    """Elements pass through bit for bit in the namespace dtype."""

    def __str__(self) -> str:
        """Returns the canonical text."""
        return "exact"


@dataclass(frozen=True, slots=True)
class Pair:
    """Polar codes of RoPE pairs, with ranges per group of tokens (arXiv 2502.00527).

    Attributes:
        radius_bits: bits of a radius code, at least 1.
        angle_bits: bits of an angle code, at least 1; together 3 to 8.
        angle_range: `arc` measures angles in the smallest arc that holds a group's angles;
            `minmax` is the published minimum and maximum on [0, 2 pi).
        group_tokens: consecutive tokens that share parameters: 32, 64, 128 or 256.

    Raises:
        ProfileError: a value outside these ranges.
    """

    radius_bits: int = 4
    angle_bits: int = 4
    angle_range: Literal["arc", "minmax"] = "arc"
    group_tokens: int = 128

    def __post_init__(self) -> None:
        """Checks every attribute."""
        bits = self.radius_bits + self.angle_bits
        if min(self.radius_bits, self.angle_bits) < 1 or not MIN_PAIR_BITS <= bits <= MAX_PAIR_BITS:
            raise ProfileError(
                f"pair:r{self.radius_bits}t{self.angle_bits}: expected r >= 1, t >= 1 and "
                f"{MIN_PAIR_BITS} <= r + t <= {MAX_PAIR_BITS}"
            )
        if self.angle_range not in ("arc", "minmax"):
            raise ProfileError(f"angle range {self.angle_range!r}: expected arc or minmax")
        if self.group_tokens not in PAIR_GROUP_TOKENS:
            raise ProfileError(
                f"pair group g{self.group_tokens}: expected one of g32, g64, g128, g256"
            )

    @property
    def bits(self) -> int:
        """Bits of the packed code of one pair."""
        return self.radius_bits + self.angle_bits

    def __str__(self) -> str:
        """Returns the canonical text."""
        parts = [f"pair:r{self.radius_bits}t{self.angle_bits}"]
        if self.angle_range != "arc":
            parts.append(self.angle_range)
        if self.group_tokens != 128:
            parts.append(f"g{self.group_tokens}")
        return ":".join(parts)


@dataclass(frozen=True, slots=True)
class Integer:
    """Asymmetric integers per token, with ranges per group of channels (arXiv 2402.02750).

    Attributes:
        bits: 4 or 2.
        group_channels: consecutive channels that share a scale and zero; None is the default:
            the whole head for 4 bits, 32 for 2 bits.

    Raises:
        ProfileError: a value outside these ranges.
    """

    bits: int = 4
    group_channels: int | None = None

    def __post_init__(self) -> None:
        """Checks every attribute."""
        if self.bits not in (2, 4):
            raise ProfileError(f"int{self.bits}: expected int4 or int2")
        if self.group_channels is None:
            return
        if not 1 <= self.group_channels <= MAX_GROUP_CHANNELS:
            raise ProfileError(
                f"value group g{self.group_channels}: expected 1 to {MAX_GROUP_CHANNELS} channels"
            )
        if self.bits == 2 and self.group_channels == INT2_GROUP_CHANNELS:
            # The spelled default and the omitted one are the same profile.
            object.__setattr__(self, "group_channels", None)

    def channels_per_group(self, head_dim: int) -> int:
        """Returns the channels of one group for heads of `head_dim` channels."""
        if self.group_channels is not None:
            return self.group_channels
        return head_dim if self.bits == 4 else INT2_GROUP_CHANNELS

    def __str__(self) -> str:
        """Returns the canonical text."""
        group = "" if self.group_channels is None else f":g{self.group_channels}"
        return f"int{self.bits}{group}"


@dataclass(frozen=True, slots=True)
class Recursive:
    """Rotated vectors as a tree of angles over 16 channels, bits 4-2-2-2 (arXiv 2502.02617).

    Attributes:
        codebook: `analytic` uses the optimum for the known density of the angles; `kmeans` fits
            one codebook per slice and side and stores it.
        seed: names the rotation. Equal seeds and head sizes share it between keys and values.

    Raises:
        ProfileError: a value outside these ranges.
    """

    codebook: Literal["analytic", "kmeans"] = "analytic"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every attribute."""
        if self.codebook not in ("analytic", "kmeans"):
            raise ProfileError(f"codebook {self.codebook!r}: expected analytic or kmeans")
        if not 0 <= self.seed <= MAX_SEED:
            raise ProfileError(f"seed{self.seed}: expected 0 to {MAX_SEED}")

    def __str__(self) -> str:
        """Returns the canonical text."""
        kmeans = ":kmeans" if self.codebook == "kmeans" else ""
        seed = f":seed{self.seed}" if self.seed else ""
        return f"recursive{kmeans}{seed}"


KeyCodec = Exact | Pair | Recursive
ValueCodec = Exact | Integer | Recursive


@dataclass(frozen=True, slots=True)
class Profile:
    """How the two sides of a block are coded.

    Attributes:
        key: codec of the keys.
        value: codec of the values.
    """

    key: KeyCodec
    value: ValueCodec

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a profile such as `k=pair:r4t4,v=int4`; the grammar heads this module.

        Raises:
            ProfileError: the text does not follow the grammar.
        """
        if text in _EXACT_NAMES:
            return cls(Exact(), Exact())
        match = re.fullmatch(r"k=([^,]*),v=([^,]*)", text)
        if match is None:
            raise ProfileError(
                f"profile {text!r}: expected 'exact' or "
                "'k=<codec>[:option...],v=<codec>[:option...]'"
            )
        return cls(_parse_key(match[1]), _parse_value(match[2]))

    def __str__(self) -> str:
        """Returns the canonical text, which parses back to an equal profile."""
        if isinstance(self.key, Exact) and isinstance(self.value, Exact):
            return "exact"
        return f"k={self.key},v={self.value}"


def _parse_key(text: str) -> KeyCodec:
    name, *options = text.split(":")
    if name in _EXACT_NAMES:
        _match_options("k", text, options, [])
        return Exact()
    if name == "pair":
        bits, angle_range, group = _match_options(
            "k", text, options, [rf"r{_NUMBER}t{_NUMBER}", r"(minmax|arc)", rf"g{_NUMBER}"]
        )
        return Pair(
            radius_bits=int(bits[1]) if bits else 4,
            angle_bits=int(bits[2]) if bits else 4,
            angle_range="minmax" if angle_range and angle_range[1] == "minmax" else "arc",
            group_tokens=int(group[1]) if group else 128,
        )
    if name == "recursive":
        return _parse_recursive("k", text, options)
    raise _refusal("k", text)


def _parse_value(text: str) -> ValueCodec:
    name, *options = text.split(":")
    if name in _EXACT_NAMES:
        _match_options("v", text, options, [])
        return Exact()
    if name in ("int4", "int2"):
        (group,) = _match_options("v", text, options, [rf"g{_NUMBER}"])
        return Integer(int(name[3:]), int(group[1]) if group else None)
    if name == "recursive":
        return _parse_recursive("v", text, options)
    raise _refusal("v", text)


def _parse_recursive(side: str, text: str, options: Sequence[str]) -> Recursive:
    kmeans, seed = _match_options(side, text, options, [r"kmeans", rf"seed{_NUMBER}"])
    return Recursive("kmeans" if kmeans else "analytic", int(seed[1]) if seed else 0)


def _match_options(
    side: str, text: str, options: Sequence[str], patterns: Sequence[str]
) -> list[re.Match[str] | None]:
    """Matches each option against one pattern, in any order, each pattern at most once."""
    found: list[re.Match[str] | None] = [None] * len(patterns)
    for option in options:
        for index, pattern in enumerate(patterns):
            match = re.fullmatch(pattern, option)
            if match is not None and found[index] is None:
                found[index] = match
                break
        else:
            raise _refusal(side, text)
    return found


def _refusal(side: str, text: str) -> ProfileError:
    what = "keys" if side == "k" else "values"
    return ProfileError(f"{side}={text}: expected for {what} one of {_ALLOWED[side]}")
