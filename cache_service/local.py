"""Stores and retrieves of workers on the same host (`polarcache.proto.local`).

The socket's file mode admits the service's own user. A worker's memory cannot shrink under the
service's mapping, since its size is sealed, and is unmapped when the worker closes the connection.
Each connection is served in a thread of its own, which copies; codecs run in others.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import socket
import struct
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from polarcache.cache_service.attend_local import LocalAttendStream
from polarcache.cache_service.attention import Attention
from polarcache.cache_service.rpc import as_typed
from polarcache.cache_service.transfers import StoreTransfer, Transfers
from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.frames import split_frame
from polarcache.proto.local import (
    ATTEND,
    ERROR,
    FRAME,
    RETRIEVE,
    SIZE,
    STORE,
    error_body,
    receive_body,
    send_body,
)
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["LocalSocket"]

_log = logging.getLogger(__name__)
_PEER_CREDENTIALS = struct.Struct("3i")
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_REGIONS_PER_CALL = 64


class LocalSocket:
    """Serves workers on the same host.

    Args:
        path: Where to listen. Sockets of crashed services beside it are removed.
        boot_id: Told to workers, so that they notice another service's socket.
        transfers: Begins transfers.
        attention: Opens prefixes to attend to.
        limit_bytes: Most shared memory of all workers together.
        threads: Threads for codecs and copies.
        idle_timeout_s: A worker that is silent for so long within a call is cut off.
    """

    def __init__(
        self,
        path: Path,
        boot_id: str,
        transfers: Transfers,
        attention: Attention,
        *,
        limit_bytes: int,
        threads: int,
        idle_timeout_s: float,
    ) -> None:
        self.path = path
        self._boot_id = boot_id
        self._transfers = transfers
        self._attention = attention
        self._limit_bytes = limit_bytes
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._used_bytes = 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="local-codec")
        _remove_stale(path.parent)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(previous)
        self._listener.listen()
        threading.Thread(target=self._accept, name="local-socket", daemon=True).start()

    def gauges(self) -> dict[str, int]:
        """Present values by name."""
        with self._lock:
            return {"local_workers": len(self._connections), "shared_bytes": self._used_bytes}

    def close(self) -> None:
        """Stops listening and cuts the workers off."""
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _shut_down(connection)
        self._threads.shutdown()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        num_bytes = 0
        with connection:
            try:
                connection.settimeout(_HANDSHAKE_TIMEOUT_S)
                memory = self._attach(connection)
                num_bytes = len(memory)
                with self._lock:
                    self._connections.add(connection)
                connection.sendall(self._boot_id.encode())
                while True:
                    connection.settimeout(None)
                    body = receive_body(connection)
                    connection.settimeout(self._idle_timeout_s)
                    if body[:1] == ATTEND:
                        self._attend(connection, memory, body[1:])
                    else:
                        _Call(connection, memory, self._transfers, self._threads).run(body)
            except (OSError, ValueError) as error:
                _log.debug("local worker left: %s", error)
            finally:
                with self._lock:
                    self._connections.discard(connection)
                    self._used_bytes -= num_bytes

    def _attend(self, connection: socket.socket, memory: memoryview, frame: bytes) -> None:
        stream = LocalAttendStream(connection, memory, self._attention, self._idle_timeout_s)
        stream.run(frame)

    def _attach(self, connection: socket.socket) -> memoryview:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, uid, _ = _PEER_CREDENTIALS.unpack(raw)
        message, fds, _, _ = socket.recv_fds(connection, SIZE.size, 1)
        try:
            if uid not in (os.getuid(), 0) or len(fds) != 1 or len(message) != SIZE.size:
                raise ValueError(f"user {uid} sent {len(fds)} descriptors")
            (num_bytes,) = SIZE.unpack(message)
            seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
            if seals & _SEALED != _SEALED or os.fstat(fds[0]).st_size != num_bytes:
                raise ValueError(f"a sealed memfd of {num_bytes} bytes was expected")
            with self._lock:
                if self._used_bytes + num_bytes > self._limit_bytes:
                    raise ValueError(f"shared memory is limited to {self._limit_bytes} bytes")
                self._used_bytes += num_bytes
            try:
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                return memoryview(mmap.mmap(fds[0], num_bytes, flags=flags))
            except (OSError, ValueError):
                with self._lock:
                    self._used_bytes -= num_bytes
                raise
        finally:
            for fd in fds:
                os.close(fd)


class _Call:
    """One call of a local worker."""

    def __init__(
        self,
        connection: socket.socket,
        memory: memoryview,
        transfers: Transfers,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._connection = connection
        self._memory = memory
        self._transfers = transfers
        self._threads = threads
        self._sending = threading.Lock()

    def run(self, body: bytes) -> None:
        """Serves the call.

        Raises:
            OSError: The connection is of no more use.
        """
        kind, frame = body[:1], body[1:]
        try:
            if kind == STORE:
                self._store(frame)
            elif kind == RETRIEVE:
                self._retrieve(frame)
            else:
                raise InvalidRequestError(f"a call must begin with A, R or S, got {kind!r}")
        except OSError:
            raise
        except Exception as error:
            self._refuse(error)
            raise ConnectionAbortedError(str(error)) from error

    def _store(self, first: bytes) -> None:
        transfer = self._transfers.begin_store(first)
        try:
            self._send(transfer.ready)
            taking: deque[Future[None]] = deque()
            while True:
                frame = receive_body(self._connection)
                while taking and taking[0].done():
                    taking.popleft().result()
                request, _ = split_frame(pb.StoreRequest, frame)
                if request.commit:
                    for future in taking:
                        future.result()
                    self._send(transfer.commit())
                    return
                if transfer.is_quick(request.spans):
                    self._write(transfer, request)
                else:
                    taking.append(self._threads.submit(self._take, transfer, request))
        finally:
            transfer.close()

    def _write(self, transfer: StoreTransfer, request: pb.StoreRequest) -> None:
        """Writes one message's spans and tells the worker."""
        transfer.take(request.spans, self._view(request.region), has_checksums=False)
        self._send(pb.StoreResponse(released=request.region).SerializeToString())

    def _take(self, transfer: StoreTransfer, request: pb.StoreRequest) -> None:
        """In a thread: writes, or cuts the worker off."""
        try:
            self._write(transfer, request)
        except Exception as error:
            self._refuse(error)
            raise

    def _retrieve(self, first: bytes) -> None:
        begin = split_frame(pb.RetrieveRequest, first)[0].begin
        transfer = self._transfers.begin_retrieve(first)
        complete = False
        filling: Future[bytes] | None = None
        try:
            free = self._places(begin, transfer.slice_bytes)
            views = {where.offset: self._view(where) for where in free}
            frame_bytes = min(where.length for where in free)
            self._send(transfer.header)
            for frame in transfer.frames(frame_bytes):
                if not free:
                    if filling is not None:
                        self._send(filling.result())
                        filling = None
                    free.append(self._released(views))
                where = free.pop()
                if transfer.is_quick:
                    self._send(transfer.into_region(frame, where, views[where.offset]))
                    continue
                upcoming = self._threads.submit(
                    transfer.into_region, frame, where, views[where.offset]
                )
                if filling is not None:
                    self._send(filling.result())
                filling = upcoming
            if filling is not None:
                self._send(filling.result())
            complete = True
        finally:
            if filling is not None:
                filling.exception()
            transfer.close(complete=complete)

    def _places(self, begin: pb.RetrieveBegin, slice_bytes: int) -> list[pb.RegionRange]:
        lengths = [where.length for where in begin.regions]
        if not 1 <= len(lengths) <= _MAX_REGIONS_PER_CALL or min(lengths) < slice_bytes:
            raise InvalidRequestError(
                f"expected 1 to {_MAX_REGIONS_PER_CALL} places of at least one slice, "
                f"{slice_bytes} bytes; got {len(lengths)}, of {lengths[:4]} bytes"
            )
        return list(begin.regions)

    def _released(self, views: dict[int, memoryview]) -> pb.RegionRange:
        request, _ = split_frame(pb.RetrieveRequest, receive_body(self._connection))
        if request.released.offset not in views:
            raise InvalidRequestError("a place was released that was not offered")
        return request.released

    def _view(self, where: pb.RegionRange) -> memoryview:
        end = where.offset + where.length
        if end > len(self._memory):
            raise InvalidRequestError(
                f"bytes {where.offset} to {end} are outside of the shared memory of "
                f"{len(self._memory)} bytes"
            )
        return self._memory[where.offset : end]

    def _send(self, frame: bytes) -> None:
        with self._sending:
            send_body(self._connection, FRAME, frame)

    def _refuse(self, error: Exception) -> None:
        """Tells the worker why its call ends, and lets it send no more."""
        try:
            with self._sending:
                send_body(self._connection, ERROR, error_body(as_typed(error, "local call")))
        except OSError as gone:
            _log.debug("the worker is gone: %s", gone)
        _shut_down(self._connection)


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        _log.debug("already closed: %s", error)


def _remove_stale(directory: Path) -> None:
    for path in directory.glob("local-*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
