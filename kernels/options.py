"""What each codec can be told: one frozen class a codec; `str` is its part of a profile text."""

import re
from dataclasses import dataclass
from typing import Literal

from polarcache.kernels.errors import ProfileError

PAIR_GROUP_TOKENS = (32, 64, 128, 256)
MAX_PAIR_BITS = 8
MIN_PAIR_BITS = 3
MAX_SEED = 2**32 - 1
INT2_GROUP_CHANNELS = 32
MAX_GROUP_CHANNELS = 256

MIN_TIER_BITS = 5
MAX_TIER_BITS = 8
# Eighths of a head's pairs, most sensitive first, and their bits relative to the mean.
TIER_STEPS = ((1, 2), (2, 1), (2, 0), (2, -1), (1, -2))
MAX_POLAR_RADIUS_BITS = 4
RECURSIVE_LEVEL_BITS = {
    "published": (4, 2, 2, 2),
    "log8": (4, 2, 2, 2),
    "deep": (4, 4, 3, 3, 3, 3),
}


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
class ArcPair:
    """Polar codes of RoPE pairs on arcs of 2 pi / 2**m, one phase table for all.

    Attributes:
        radius_bits: bits of a radius code; with `tiers` 0. At least 1 otherwise.
        angle_bits: likewise; together 3 to 8.
        tiers: mean bits of a pair's code, 5 to 8, where pairs differ in bits; 0 where all
            pairs have `radius_bits` and `angle_bits`.
        group_tokens: consecutive tokens that share parameters: 32, 64, 128 or 256.
        calibration: first 8 hex digits of the digest of the calibration that ranks pairs with
            the energy of queries; empty ranks by the block's keys alone. Only with `tiers`.

    Raises:
        ProfileError: a value outside these ranges.
    """

    radius_bits: int = 4
    angle_bits: int = 4
    tiers: int = 0
    group_tokens: int = 128
    calibration: str = ""

    def __post_init__(self) -> None:
        """Checks every attribute."""
        if self.tiers:
            if not MIN_TIER_BITS <= self.tiers <= MAX_TIER_BITS:
                raise ProfileError(
                    f"pair:tiers{self.tiers}: expected {MIN_TIER_BITS} to {MAX_TIER_BITS}"
                )
            if self.radius_bits or self.angle_bits:
                raise ProfileError("pair:tiers: expected radius_bits and angle_bits 0")
        else:
            Pair(self.radius_bits, self.angle_bits)
        Pair(group_tokens=self.group_tokens)
        _calibration_text(self.calibration)
        if self.calibration and not self.tiers:
            raise ProfileError("pair:arc2: expected no calibration without tiers")

    def classes(self, pairs: int) -> tuple[tuple[int, int, int], ...]:
        """Returns (pairs, radius bits, angle bits) of each class, most sensitive first."""
        if not self.tiers:
            return ((pairs, self.radius_bits, self.angle_bits),)
        widths = [(eighths * pairs // 8, self.tiers + step) for eighths, step in TIER_STEPS]
        return tuple((count, (bits - 1) // 2, bits - (bits - 1) // 2) for count, bits in widths)

    def __str__(self) -> str:
        """Returns the canonical text."""
        bits = f"tiers{self.tiers}" if self.tiers else f"r{self.radius_bits}t{self.angle_bits}:arc2"
        group = "" if self.group_tokens == 128 else f":g{self.group_tokens}"
        return f"pair:{bits}{group}{_calibration_text(self.calibration)}"


@dataclass(frozen=True, slots=True)
class Polar:
    """Mixed vectors as pairs of universal radii and phases, one gain a row.

    Attributes:
        bits: bits of the code of one pair, 3 to 8.
        radius_bits: 0 where the points are shared out among rings as the density asks for; 1 to 4,
            less than `bits`, where 2**radius_bits rings have equally many.
        calibration: keys only: as in `ArcPair`; its energies balance pairs before the mixing.

    Raises:
        ProfileError: a value outside these ranges.
    """

    bits: int = 8
    radius_bits: int = 0
    calibration: str = ""

    def __post_init__(self) -> None:
        """Checks every attribute."""
        if self.radius_bits:
            Pair(self.radius_bits, self.angle_bits)
        if not MIN_PAIR_BITS <= self.bits <= MAX_PAIR_BITS:
            raise ProfileError(
                f"polar:b{self.bits}: expected {MIN_PAIR_BITS} to {MAX_PAIR_BITS} bits"
            )
        if not 0 <= self.radius_bits <= MAX_POLAR_RADIUS_BITS:
            raise ProfileError(
                f"polar:r{self.radius_bits}t{self.angle_bits}: expected r <= "
                f"{MAX_POLAR_RADIUS_BITS}"
            )
        _calibration_text(self.calibration)

    @property
    def angle_bits(self) -> int:
        """Bits of a phase where all rings have equally many."""
        return self.bits - self.radius_bits

    def __str__(self) -> str:
        """Returns the canonical text."""
        bits = f"r{self.radius_bits}t{self.angle_bits}" if self.radius_bits else f"b{self.bits}"
        return f"polar:{bits}{_calibration_text(self.calibration)}"


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
    """Rotated vectors as a tree of angles (arXiv 2502.02617).

    Attributes:
        codebook: `analytic` uses the optimum for the known density of the angles; `kmeans` fits
            one codebook per slice and side and stores it; not with `deep`.
        seed: names the rotation. Equal seeds and head sizes share it between keys and values.
        form: `published` has 16 channels, bits 4-2-2-2 and an fp16 radius; `log8` the same with
            an 8-bit logarithmic radius; `deep` up to 64 channels, bits 4-4-3-3-3-3, an 8-bit
            logarithmic radius without bias, and on keys the mean of channels taken off.

    Raises:
        ProfileError: a value outside these ranges.
    """

    codebook: Literal["analytic", "kmeans"] = "analytic"
    seed: int = 0
    form: Literal["published", "log8", "deep"] = "published"

    def __post_init__(self) -> None:
        """Checks every attribute."""
        if self.codebook not in ("analytic", "kmeans"):
            raise ProfileError(f"codebook {self.codebook!r}: expected analytic or kmeans")
        if not 0 <= self.seed <= MAX_SEED:
            raise ProfileError(f"seed{self.seed}: expected 0 to {MAX_SEED}")
        if self.form not in ("published", "log8", "deep"):
            raise ProfileError(f"form {self.form!r}: expected published, log8 or deep")
        if self.form == "deep" and self.codebook == "kmeans":
            raise ProfileError("recursive:deep:kmeans: expected the analytic codebook with deep")

    def level_bits(self, head_dim: int) -> tuple[int, ...]:
        """Returns the bits of each level; `deep` halves the channels at most while they halve."""
        halvings = (head_dim & -head_dim).bit_length() - 1
        return RECURSIVE_LEVEL_BITS[self.form][:halvings]

    def __str__(self) -> str:
        """Returns the canonical text."""
        form = "" if self.form == "published" else f":{self.form}"
        kmeans = ":kmeans" if self.codebook == "kmeans" else ""
        seed = f":seed{self.seed}" if self.seed else ""
        return f"recursive{form}{kmeans}{seed}"


KeyCodec = Exact | Pair | ArcPair | Polar | Recursive
ValueCodec = Exact | Integer | Polar | Recursive


def _calibration_text(digits: str) -> str:
    """Returns the option of a profile text that names a calibration, empty for none.

    Raises:
        ProfileError: it is not named by 8 hex digits.
    """
    if not digits:
        return ""
    if re.fullmatch(r"[0-9a-f]{8}", digits) is None:
        raise ProfileError(f"calibration {digits!r}: expected 8 hex digits")
    return f":cal{digits}"
