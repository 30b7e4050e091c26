"""Every error that PolarCache raises.

    PolarCacheError
    ├── InvalidRequestError        the call is wrong: fix it
    │   ├── ChecksumMismatchError  the payload was damaged on its way: send it again
    │   └── NonFiniteError         keys or values hold NaN or infinity
    ├── LayoutMismatchError        the namespace was opened with another geometry
    ├── NamespaceUnknownError      the service restarted: open the namespace again
    ├── BlockNotFoundError         the block is gone: recompute it
    ├── LeaseExpiredError          look the prefix up again
    ├── CapacityError              no room now: back off
    ├── TierUnavailableError       Redis does not answer: retry later
    ├── ServiceUnavailableError    the service cannot be reached: go on without it
    ├── DeadlineError              the service did not answer in time: go on without it
    ├── BlockCorruptError          the stored bytes are not what was stored: recompute
    ├── UnsupportedError           this service cannot do that
    └── InternalError              a bug of ours; the message holds the request id

The class name travels as the *reason* of a failed call (`polarcache.proto.status`).
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BlockCorruptError",
    "BlockNotFoundError",
    "CapacityError",
    "ChecksumMismatchError",
    "DeadlineError",
    "InternalError",
    "InvalidRequestError",
    "LayoutMismatchError",
    "LeaseExpiredError",
    "NamespaceUnknownError",
    "NonFiniteError",
    "PolarCacheError",
    "ServiceUnavailableError",
    "TierUnavailableError",
    "UnsupportedError",
]


class PolarCacheError(Exception):
    """Base of all errors of PolarCache.

    Attributes:
        code_name: Name of the gRPC status code that carries the error.
        retryable: Whether the same call may succeed later without a change.
    """

    code_name: ClassVar[str] = "UNKNOWN"
    retryable: ClassVar[bool] = False


class InvalidRequestError(PolarCacheError):
    """The request is malformed; the message says what was expected."""

    code_name = "INVALID_ARGUMENT"


class ChecksumMismatchError(InvalidRequestError):
    """A payload's bytes do not match the checksum sent with them."""

    retryable = True


class NonFiniteError(InvalidRequestError):
    """Keys or values hold NaN, infinity, or magnitudes that the codec cannot carry."""


class LayoutMismatchError(PolarCacheError):
    """The model was opened with another geometry, or the tensors do not fit the namespace."""

    code_name = "FAILED_PRECONDITION"


class NamespaceUnknownError(PolarCacheError):
    """The namespace was not opened since the service started."""

    code_name = "NOT_FOUND"
    retryable = True


class BlockNotFoundError(PolarCacheError):
    """A block that was asked for by name is in no tier."""

    code_name = "NOT_FOUND"


class LeaseExpiredError(PolarCacheError):
    """The lease ended or was never given."""

    code_name = "ABORTED"
    retryable = True


class CapacityError(PolarCacheError):
    """There is no room, or too much is under way."""

    code_name = "RESOURCE_EXHAUSTED"
    retryable = True


class TierUnavailableError(PolarCacheError):
    """A tier that the call needs does not answer."""

    code_name = "UNAVAILABLE"
    retryable = True


class ServiceUnavailableError(PolarCacheError):
    """The service cannot be reached or is shutting down."""

    code_name = "UNAVAILABLE"
    retryable = True


class DeadlineError(PolarCacheError):
    """The call did not end within its deadline."""

    code_name = "DEADLINE_EXCEEDED"
    retryable = True


class BlockCorruptError(PolarCacheError):
    """Stored or received bytes fail their checksum."""

    code_name = "DATA_LOSS"


class UnsupportedError(PolarCacheError):
    """This service, or this version of it, cannot do what was asked."""

    code_name = "UNIMPLEMENTED"


class InternalError(PolarCacheError):
    """The service failed in a way it did not foresee."""

    code_name = "INTERNAL"
