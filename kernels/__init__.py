"""Codecs for key/value blocks: what a profile means, where its bytes lie, how to code them.

This package exports only names that need no torch. The tensor functions are one import away:
`polarcache.kernels.codec.Codec` and `polarcache.kernels.report.codec_report`.
"""

from polarcache.kernels.errors import (
    CalibrationError,
    CodecError,
    NonFiniteError,
    ProfileError,
    ShapeError,
)
from polarcache.kernels.layout import LAYOUT_VERSION, BlockShape, Field, PackedLayout
from polarcache.kernels.profile import (
    ArcPair,
    Exact,
    Integer,
    Pair,
    Polar,
    Profile,
    Recursive,
)

__all__ = [
    "LAYOUT_VERSION",
    "ArcPair",
    "BlockShape",
    "CalibrationError",
    "CodecError",
    "Exact",
    "Field",
    "Integer",
    "NonFiniteError",
    "PackedLayout",
    "Pair",
    "Polar",
    "Profile",
    "ProfileError",
    "Recursive",
    "ShapeError",
]
