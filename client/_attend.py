"""Remote attention: a stream over which a worker attends to a prefix that it never downloads."""

from __future__ import annotations

import ctypes
import logging
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import grpc

from polarcache.client._attend_links import (
    Ask,
    AttendLink,
    GrpcAttendLink,
    LocalAttendLink,
    Refused,
)
from polarcache.client._transport import BlockTransport
from polarcache.client._types import Match
from polarcache.client._watchdog import Watchdog
from polarcache.proto.errors import InternalError, InvalidRequestError, PolarCacheError
from polarcache.proto.layout import DTYPE_BYTES
from polarcache.proto.v1 import polarcache_pb2 as pb

if TYPE_CHECKING:
    import torch

__all__ = ["AttendOpener", "AttendSpec", "AttendStream", "AttendTiming"]

_log = logging.getLogger(__name__)
_DTYPES = {
    "float16": pb.DTYPE_FLOAT16,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float32": pb.DTYPE_FLOAT32,
}
# Shared memory of a stream: so many query tokens at a time, within so many bytes.
_REGION_TOKENS = 64
_REGION_BYTES = 4 << 20
_PAGE_BYTES = 4096


class AttendTiming(NamedTuple):
    """Where the time of a request went in the service.

    Attributes:
        queue_ns: Waiting for its launch, nanoseconds.
        kernel_ns: The kernel of its launch, nanoseconds.
        batch_requests: Requests that the launch computed.
    """

    queue_ns: int
    kernel_ns: int
    batch_requests: int


@dataclass(frozen=True, slots=True)
class AttendSpec:
    """What to attend to and how; see `Client.attend`."""

    match: Match
    query_heads: int
    query_dtype: str
    prefix_tokens: int
    scale: float
    soft_cap: float
    window: int
    sink_tokens: int

    def begin(self) -> pb.AttendBegin:
        """The first message.

        Raises:
            InvalidRequestError: A value is out of range, or the match has no lease.
        """
        if not self.match.lease_id:
            raise InvalidRequestError("the lookup found nothing or took no lease")
        if self.dtype not in _DTYPES:
            raise InvalidRequestError(
                f"query_dtype must be one of {list(_DTYPES)}, got {self.query_dtype!r}"
            )
        try:
            return pb.AttendBegin(
                namespace_id=self.match.namespace.namespace_id,
                lease_id=self.match.lease_id,
                prefix_tokens=self.prefix_tokens,
                num_q_heads=self.query_heads,
                query_dtype=_DTYPES[self.dtype],
                scale=self.scale,
                logit_soft_cap=self.soft_cap,
                sliding_window=self.window,
                sink_tokens=self.sink_tokens,
            )
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"an argument is out of range: {error}") from error

    @property
    def dtype(self) -> str:
        """Element type of the queries."""
        return self.query_dtype or self.match.namespace.spec.layout.dtype

    @property
    def token_bytes(self) -> tuple[int, int, int]:
        """Bytes of one token's queries, out and lse."""
        layout = self.match.namespace.spec.layout
        return (
            self.query_heads * layout.head_dim * DTYPE_BYTES[self.dtype],
            self.query_heads * layout.v_head_dim * 4,
            self.query_heads * 4,
        )


class AttendStream:
    """Attends to one prefix, which the service holds in memory until the stream is closed.

    Made by `Client.attend`; use it in a `with` statement, and close it before the client.
    Thread-safe: one request at a time. Closing it ends a request under way with an error.

    Attributes:
        prefix_tokens: Stored tokens that every query attends to.
        is_local: Whether tensors travel in shared memory.
        timing: Of the last request, None before it.
    """

    def __init__(
        self, spec: AttendSpec, link: AttendLink, ready: pb.AttendReady, timeout_s: float
    ) -> None:
        import numpy
        import torch

        # What a request needs, looked up once.
        layout = spec.match.namespace.spec.layout
        self._numpy, self._torch = numpy, torch
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._shape = torch.Size((spec.query_heads, layout.head_dim))
        self._out_shape = (spec.query_heads, layout.v_head_dim)
        self._num_layers = layout.num_layers
        self.prefix_tokens = ready.prefix_tokens
        self.is_local = isinstance(link, LocalAttendLink)
        self.timing: AttendTiming | None = None
        self._link = link
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._failure: PolarCacheError | None = None
        self._last_id = 0
        self._token_bytes = query_bytes, out_bytes, lse_bytes = spec.token_bytes
        longest = link.max_tokens(max(query_bytes, out_bytes + lse_bytes))
        self._max_tokens = min(ready.max_request_tokens, longest)

    def __enter__(self) -> AttendStream:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream; the service lets go of the prefix."""
        if self._failure is None:
            self._failure = InvalidRequestError("the stream is closed")
        self._link.close()

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        position: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of some queries over one layer of the stored prefix.

        Every stored token precedes every query, so nothing is masked but by the window.

        Args:
            layer: Layer.
            queries: [T, Hq, D] in `query_dtype`, RoPE applied, on any device.
            position: Position of the first query in its sequence; needed with a window.
            timeout_s: Deadline, seconds; None for the stream's.

        Returns:
            (out fp32 [T, Hq, Dv], lse fp32 [T, Hq]) on the device of the queries: the natural
            logarithm of the sum of exp of the scores, -inf with out 0 where a query sees no
            token. `polarcache.kernels.attention.merge.merge_states` merges it with the rest.

        Raises:
            InvalidRequestError: The tensor, the layer or the position does not fit.
            CapacityError: Too many requests wait in the service; the stream goes on.
            DeadlineError: No answer in time.
            ServiceUnavailableError: The service is gone.
        """
        np, torch = self._numpy, self._torch
        shape = queries.shape
        if shape[1:] != self._shape or not shape[0]:
            raise InvalidRequestError(f"queries {tuple(shape)}: expected [tokens, *{self._shape}]")
        if queries.dtype is not self._dtype:
            raise InvalidRequestError(f"queries {queries.dtype}: expected {self._dtype}")
        if not 0 <= layer < self._num_layers or (position or 0) < 0:
            raise InvalidRequestError(
                f"layer {layer}, position {position}: expected a layer below "
                f"{self._num_layers} and no negative position"
            )
        source = _bytes_of(queries)
        timeout_s = timeout_s or self._timeout_s
        position = -1 if position is None else position
        first, num_tokens = 0, shape[0]
        with self._lock:
            ask = self._send(layer, source, first, num_tokens, position, timeout_s)
            # While the service computes.
            out = np.empty((num_tokens, *self._out_shape), np.float32)
            lse = np.empty((num_tokens, self._out_shape[0]), np.float32)
            answer = torch.from_numpy(out), torch.from_numpy(lse)
            out_view, lse_view = out.data.cast("B"), lse.data.cast("B")
            _, out_bytes, lse_bytes = self._token_bytes
            while True:
                self._receive(ask, out_view[first * out_bytes :], lse_view[first * lse_bytes :])
                first += ask.num_tokens
                if first == num_tokens:
                    break
                ask = self._send(layer, source, first, num_tokens, position, timeout_s)
        if queries.is_cpu:
            return answer
        return answer[0].to(queries.device), answer[1].to(queries.device)

    def _send(
        self,
        layer: int,
        queries: bytes,
        first: int,
        num_tokens: int,
        position: int,
        timeout_s: float,
    ) -> Ask:
        """Sends those of the tokens from `first` on that fit a request."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        query_bytes, out_bytes, lse_bytes = self._token_bytes
        end = min(first + self._max_tokens, num_tokens)
        self._last_id += 1
        ask = Ask(
            self._last_id,
            layer,
            end - first,
            position if position < 0 else position + first,
            queries[first * query_bytes : end * query_bytes],
            (end - first) * out_bytes,
            (end - first) * lse_bytes,
        )
        try:
            self._link.send(ask, timeout_s)
        except PolarCacheError as error:
            self._failure = error
            raise
        return ask

    def _receive(self, ask: Ask, out: memoryview, lse: memoryview) -> None:
        """Takes the answer to a request."""
        try:
            answer = self._link.receive()
            if (answer.request_id, len(answer.out), len(answer.lse)) != (
                ask.request_id,
                ask.out_bytes,
                ask.lse_bytes,
            ):
                raise InternalError(
                    f"the answer to request {answer.request_id}, of {len(answer.out)} and "
                    f"{len(answer.lse)} bytes, is not that to {ask.request_id}"
                )
        except Refused as refused:
            raise refused.error from None
        except PolarCacheError as error:
            self._failure = error
            raise
        except BaseException:
            # The answer is still to come: what follows would take it for its own.
            self._failure = InternalError("the stream was interrupted; open another")
            raise
        out[: ask.out_bytes] = answer.out
        lse[: ask.lse_bytes] = answer.lse
        self.timing = AttendTiming(answer.queue_ns, answer.kernel_ns, answer.batch_requests)


def _bytes_of(queries: torch.Tensor) -> bytes:
    """The bytes of a tensor on any device, of any dtype and strides."""
    if not (queries.is_cpu and queries.is_contiguous()):
        queries = queries.cpu().contiguous()
    # One copy in one call: a view through NumPy takes five calls, longer than a token's copy.
    return ctypes.string_at(queries.data_ptr(), queries.nbytes)


class AttendOpener:
    """Opens streams: in shared memory where there is a service on the same host, else over gRPC.

    Args:
        channel: The gRPC channel to the service.
        transport: Knows the local socket.
        open_timeout_s: Deadline of opening, which may bring blocks from Redis, seconds.
    """

    def __init__(
        self, channel: grpc.Channel, transport: BlockTransport, open_timeout_s: float
    ) -> None:
        self._method = channel.stream_stream("/polarcache.v1.KvCache/Attend")
        self._transport = transport
        self._open_timeout_s = open_timeout_s
        self._watchdog = Watchdog()

    def open(self, spec: AttendSpec, timeout_s: float) -> AttendStream:
        """Opens a stream.

        Args:
            spec: What to attend to and how.
            timeout_s: Deadline of its requests, seconds.

        Raises:
            PolarCacheError: The service refused, or did not answer.
        """
        begin = spec.begin()
        link: AttendLink = self._local_link(spec) or GrpcAttendLink(self._method, self._watchdog)
        try:
            ready = link.open(begin, self._open_timeout_s)
        except BaseException:
            link.close()
            raise
        return AttendStream(spec, link, ready, timeout_s)

    def _local_link(self, spec: AttendSpec) -> LocalAttendLink | None:
        address = self._transport.local_address()
        if address is None:
            return None
        query_bytes, out_bytes, lse_bytes = spec.token_bytes
        token_bytes = max(query_bytes, out_bytes + lse_bytes)
        num_bytes = max(token_bytes, min(token_bytes * _REGION_TOKENS, _REGION_BYTES))
        try:
            return LocalAttendLink(*address, -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES)
        except OSError as error:
            _log.info("attention goes over gRPC: %s", error)
            return None
