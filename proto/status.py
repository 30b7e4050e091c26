"""Errors to gRPC status and back: the only place where the two meet."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from polarcache.proto import errors

__all__ = ["REASON_KEY", "error_from_rpc", "status_of"]

REASON_KEY = "polarcache-reason"

_BY_REASON: dict[str, type[errors.PolarCacheError]] = {
    name: getattr(errors, name) for name in errors.__all__
}
# A status without our reason comes from gRPC itself or from a proxy.
_BY_CODE: dict[str, type[errors.PolarCacheError]] = {
    "UNAVAILABLE": errors.ServiceUnavailableError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "CANCELLED": errors.ServiceUnavailableError,
    "UNIMPLEMENTED": errors.UnsupportedError,
    "INVALID_ARGUMENT": errors.InvalidRequestError,
    "RESOURCE_EXHAUSTED": errors.CapacityError,
}


def status_of(error: errors.PolarCacheError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str]]]:
    """Status code, message and trailing metadata that carry an error to the worker."""
    code = grpc.StatusCode[error.code_name]
    return code, str(error), ((REASON_KEY, type(error).__name__),)


def error_from_rpc(rpc_error: grpc.RpcError) -> errors.PolarCacheError:
    """The typed error that a failed call stands for.

    Args:
        rpc_error: As raised by a `grpc` or `grpc.aio` call.
    """
    code: grpc.StatusCode = rpc_error.code()
    reason = _reason(rpc_error.trailing_metadata())
    error_class = _BY_REASON.get(reason) or _BY_CODE.get(code.name, errors.InternalError)
    return error_class(rpc_error.details() or code.name)


def _reason(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    for key, value in metadata or ():
        if key == REASON_KEY:
            return value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return ""
