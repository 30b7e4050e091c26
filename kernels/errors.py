"""Errors of the codecs.

CodecError (a ValueError)
├── ProfileError    a profile string or combination that the grammar does not allow
├── CalibrationError  a calibration that is missing, damaged or not the one a profile names
├── ShapeError      a block shape, tensor shape, dtype, stride or device that does not fit
└── NonFiniteError  NaN, infinity or a magnitude beyond the stored parameters' range
"""


class CodecError(ValueError):
    """Base of every error that the kernels raise on purpose."""


class ProfileError(CodecError):
    """A profile does not follow the grammar; the message lists what is allowed."""


class CalibrationError(CodecError):
    """A calibration is missing, damaged, or not the one that a profile names."""


class ShapeError(CodecError):
    """A shape, dtype, stride or device does not fit; the message says what was expected."""


class NonFiniteError(CodecError):
    """Keys or values hold NaN, infinity or numbers that fp16 parameters cannot describe."""
