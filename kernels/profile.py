"""Codec profiles: the text that says how keys and values are coded.

    profile   = "exact" | "k=" key ",v=" value
    key       = exact | pair | tiers | polar [cal] | recursive
    value     = exact | "int4" [":g" channels] | "int2" [":g" channels] | polar | recursive
    exact     = "exact"                       ("fp16" and "bf16" are read as "exact")
    pair      = "pair" [":r" bits "t" bits] [":minmax" | ":arc" | ":arc2"] [":g" tokens]
    tiers     = "pair:tiers" bits [":g" tokens] [cal]
    polar     = "polar" [":b" bits | ":r" bits "t" bits]
    recursive = "recursive" [":deep" | ":log8"] [":kmeans"] [":seed" number]
    cal       = ":cal" 8 hex digits           (first digits of a calibration's digest)

`str` of a profile is canonical: options in the order above, defaults left out, except that the
bits of a pair or polar codec are always spelled, because they are what people look for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from polarcache.kernels.errors import ProfileError
from polarcache.kernels.options import (
    ArcPair,
    Exact,
    Integer,
    KeyCodec,
    Pair,
    Polar,
    Recursive,
    ValueCodec,
)

__all__ = [
    "KEY_CODECS",
    "VALUE_CODECS",
    "ArcPair",
    "Exact",
    "Integer",
    "KeyCodec",
    "Pair",
    "Polar",
    "Profile",
    "Recursive",
    "ValueCodec",
]

_RECURSIVE = "recursive[:deep|:log8][:kmeans][:seed<N>]"
_ALLOWED = {
    "k": (
        "exact, pair[:r<r>t<t>][:minmax|:arc|:arc2][:g32|g64|g128|g256], "
        "pair:tiers<5-8>[:g32|g64|g128|g256][:cal<hex8>], polar[:b<3-8>|:r<r>t<t>][:cal<hex8>], "
        f"{_RECURSIVE}"
    ),
    "v": f"exact, int4[:g<channels>], int2[:g<channels>], polar[:b<3-8>|:r<r>t<t>], {_RECURSIVE}",
}
KEY_CODECS = ("exact", "pair", "polar", "recursive")
VALUE_CODECS = ("exact", "int4", "int2", "polar", "recursive")
_EXACT_NAMES = ("exact", "fp16", "bf16")
_NUMBER = r"(0|[1-9][0-9]{0,9})"
_BITS = rf"r{_NUMBER}t{_NUMBER}"
_CALIBRATION = r"cal([0-9a-f]{8})"


@dataclass(frozen=True, slots=True)
class Profile:
    """How the two sides of a block are coded.

    Attributes:
        key: codec of the keys.
        value: codec of the values.
    """

    key: KeyCodec
    value: ValueCodec

    def __post_init__(self) -> None:
        """Refuses a calibration of values: only keys meet queries."""
        if isinstance(self.value, Polar) and self.value.calibration:
            raise ProfileError(f"v={self.value}: expected a calibration on keys only")

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

    @property
    def calibration(self) -> str:
        """First 8 hex digits of the digest of the calibration that encoding needs, or empty."""
        return self.key.calibration if isinstance(self.key, (ArcPair, Polar)) else ""

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
        return _parse_pair(text, options)
    if name == "polar":
        return _parse_polar("k", text, options)
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
    if name == "polar":
        return _parse_polar("v", text, options)
    if name == "recursive":
        return _parse_recursive("v", text, options)
    raise _refusal("v", text)


def _parse_pair(text: str, options: Sequence[str]) -> Pair | ArcPair:
    bits, tiers, angles, group, calibration = _match_options(
        "k",
        text,
        options,
        [_BITS, r"tiers(\d)", r"(minmax|arc|arc2)", rf"g{_NUMBER}", _CALIBRATION],
    )
    group_tokens = int(group[1]) if group else 128
    digits = calibration[1] if calibration else ""
    if tiers is not None:
        if bits is not None or angles is not None or tiers[1] == "0":
            raise _refusal("k", text)
        return ArcPair(0, 0, int(tiers[1]), group_tokens, digits)
    radius_bits, angle_bits = (int(bits[1]), int(bits[2])) if bits else (4, 4)
    if angles is not None and angles[1] == "arc2":
        return ArcPair(radius_bits, angle_bits, 0, group_tokens, digits)
    if digits:
        raise _refusal("k", text)
    minmax = angles is not None and angles[1] == "minmax"
    return Pair(radius_bits, angle_bits, "minmax" if minmax else "arc", group_tokens)


def _parse_polar(side: str, text: str, options: Sequence[str]) -> Polar:
    # Only keys meet queries, so only they have a calibration.
    patterns = [rf"b{_NUMBER}", _BITS, *([_CALIBRATION] if side == "k" else [])]
    bits, split, *calibration = _match_options(side, text, options, patterns)
    digits = calibration[0][1] if calibration and calibration[0] else ""
    if split is None:
        return Polar(int(bits[1]) if bits else 8, 0, digits)
    if bits is not None or split[1] == "0":
        raise _refusal(side, text)
    return Polar(int(split[1]) + int(split[2]), int(split[1]), digits)


def _parse_recursive(side: str, text: str, options: Sequence[str]) -> Recursive:
    form, kmeans, seed = _match_options(
        side, text, options, [r"(deep|log8)", r"kmeans", rf"seed{_NUMBER}"]
    )
    return Recursive(
        codebook="kmeans" if kmeans else "analytic",
        seed=int(seed[1]) if seed else 0,
        form="published" if form is None else "deep" if form[1] == "deep" else "log8",
    )


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
