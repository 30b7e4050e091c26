"""Binds handlers to the methods of the schema, and their exceptions to status.

The only place that catches broadly: whatever a handler raises ends the call with a typed status,
and what it did not foresee is logged under a request id that the worker is told.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from polarcache.proto.errors import InternalError, PolarCacheError
from polarcache.proto.status import status_of

__all__ = ["as_typed", "method_handlers"]

_log = logging.getLogger(__name__)

# Their handlers see serialized messages.
_RAW_STREAMS = {"Store", "Retrieve", "Attend"}


def method_handlers(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """Handlers of all methods of a service.

    Args:
        service: Descriptor of the service.
        servicer: Has a coroutine, or an async generator, named like each method.
    """
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name)) for method in service.methods
    }
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _handler(method: MethodDescriptor, behavior: Callable[..., Any]) -> grpc.RpcMethodHandler:
    if method.name in _RAW_STREAMS:
        return grpc.stream_stream_rpc_method_handler(_guard(behavior))
    request_class = GetMessageClass(method.input_type)
    response_class = GetMessageClass(method.output_type)
    make = grpc.unary_unary_rpc_method_handler
    if method.client_streaming and method.server_streaming:
        make = grpc.stream_stream_rpc_method_handler
    return make(
        _guard(behavior),
        request_deserializer=request_class.FromString,
        response_serializer=response_class.SerializeToString,
    )


def _guard(behavior: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behavior):

        async def generator(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                async for response in behavior(request, context):
                    yield response
            except Exception as error:
                await _abort(context, error, behavior.__name__)

        return generator

    async def coroutine(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:
            await _abort(context, error, behavior.__name__)

    return coroutine


def as_typed(error: Exception, call: str) -> PolarCacheError:
    """The error to tell the worker; what was not foreseen is logged under a request id.

    Args:
        error: What a handler raised.
        call: Name of the call, for the log.
    """
    if isinstance(error, PolarCacheError):
        _log.debug("%s refused: %s", call, error)
        return error
    request_id = secrets.token_hex(6)
    _log.error("%s failed, request %s", call, request_id, exc_info=error)
    return InternalError(f"unforeseen failure; the service's log has it as {request_id}")


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.InternalError):
        _log.debug("%s: the worker is gone: %s", method, error)
        return
    code, message, metadata = status_of(as_typed(error, method))
    await context.abort(code, message, metadata)
