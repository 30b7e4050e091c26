"""Connections to a service on the same host (`polarcache.proto.local`).

The service tells the socket's path over gRPC. Where it is not there, belongs to another service,
or refuses, payloads travel over gRPC as if it were not there.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from polarcache.client._retrieve_call import RetrieveCall
from polarcache.client._store_call import StoreCall
from polarcache.client._types import StoreResult
from polarcache.proto.errors import DeadlineError, ServiceUnavailableError
from polarcache.proto.local import (
    BOOT_ID_BYTES,
    ERROR,
    RETRIEVE,
    SIZE,
    STORE,
    error_of,
    receive_body,
    receive_exactly,
    send_body,
)
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["LocalConnection", "LocalPool", "Slot"]

_log = logging.getLogger(__name__)
_ATTACH_TIMEOUT_S = 2.0
_MAX_CONNECTIONS = 4
_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of shared memory that holds one payload at a time.

    Attributes:
        where: Its place.
        view: Its bytes, writable.
    """

    where: pb.RegionRange
    view: memoryview


class LocalConnection:
    """One connection and its shared memory: one call at a time.

    Args:
        path: The service's socket.
        boot_id: The service's boot id.
        num_bytes: Memory to share.

    Raises:
        OSError: The service is not there, is another one, or refuses.
    """

    def __init__(self, path: str, boot_id: str, num_bytes: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_ATTACH_TIMEOUT_S)
            self._socket.connect(path)
            view = memoryview(_shared_memory(self._socket, num_bytes))
            if receive_exactly(self._socket, BOOT_ID_BYTES) != boot_id.encode():
                raise ConnectionRefusedError(f"another service listens at {path}")
        except OSError:
            self._socket.close()
            raise
        self.memory = view
        self.slot_bytes = num_bytes // _SLOTS
        self.slots = [
            Slot(
                pb.RegionRange(offset=start, length=self.slot_bytes),
                view[start : start + self.slot_bytes],
            )
            for start in range(0, self.slot_bytes * _SLOTS, self.slot_bytes)
        ]

    def store(self, call: StoreCall, timeout_s: float) -> StoreResult:
        """Runs a store.

        Raises:
            PolarCacheError: The call failed; the connection is of no more use.
        """
        try:
            self._socket.settimeout(timeout_s)
            send_body(self._socket, STORE, call.begin())
            call.on_answer(self._answer())
            while (frame := call.next_frame()) is not None:
                send_body(self._socket, b"", frame)
                while not call.free_slots:
                    call.on_answer(self._answer())
            send_body(self._socket, b"", call.commit())
            while call.result is None:
                call.on_answer(self._answer())
        except OSError as error:
            raise self._failure(error) from error
        return call.finished()

    def retrieve(self, call: RetrieveCall, timeout_s: float) -> Iterator[None]:
        """Runs a retrieve; yields after the header and after each frame.

        Raises:
            PolarCacheError: The call failed; the connection is of no more use.
        """
        try:
            self._socket.settimeout(timeout_s)
            send_body(self._socket, RETRIEVE, call.begin())
            call.on_header(self._answer())
            yield
            while not call.is_complete:
                reply = call.on_answer(self._answer())
                if reply is not None:
                    send_body(self._socket, b"", reply)
                yield
        except OSError as error:
            raise self._failure(error) from error

    def is_alive(self) -> bool:
        """Whether the service still holds the other end, between calls."""
        try:
            self._socket.setblocking(False)
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Closes; the memory goes with its last view."""
        self._socket.close()

    def _answer(self) -> bytes:
        body = receive_body(self._socket)
        if body[:1] == ERROR:
            raise error_of(body[1:])
        return body[1:]

    def _failure(self, error: OSError) -> Exception:
        """Why the connection broke: the service's word if it left one."""
        if isinstance(error, TimeoutError):
            return DeadlineError("the service did not answer in time")
        try:
            while True:
                self._answer()
        except OSError:
            return ServiceUnavailableError(f"the connection to the service broke: {error}")
        except Exception as told:
            return told


class LocalPool:
    """Connections to one service on the same host, lent to calls. Thread-safe.

    Args:
        service: What the service told of itself.
        num_bytes: Memory to share, over all connections.
    """

    def __init__(self, service: pb.DescribeResponse, num_bytes: int) -> None:
        self._path = service.local_socket
        self._boot_id = service.boot_id
        self._connection_bytes = num_bytes // _MAX_CONNECTIONS
        self.slot_bytes = self._connection_bytes // _SLOTS
        self._lock = threading.Lock()
        self._idle: list[LocalConnection] = []
        self._is_here = bool(num_bytes and self._path and os.path.exists(self._path))
        self._num_left = _MAX_CONNECTIONS if self._is_here else 0

    def address(self) -> tuple[str, str] | None:
        """The service's socket and boot id, for a connection of one's own; None if not here."""
        return (self._path, self._boot_id) if self._is_here else None

    def borrow(self) -> LocalConnection | None:
        """A connection for one call; None when there is none to be had."""
        with self._lock:
            while self._idle:
                connection = self._idle.pop()
                if connection.is_alive():
                    return connection
                connection.close()
            if not self._num_left:
                return None
            self._num_left -= 1
        try:
            return LocalConnection(self._path, self._boot_id, self._connection_bytes)
        except OSError as error:
            _log.info("no shared memory with the service: %s", error)
            return None

    def give_back(self, connection: LocalConnection) -> None:
        """Returns a connection whose call ended in order."""
        with self._lock:
            self._idle.append(connection)

    def drop(self, connection: LocalConnection) -> None:
        """Closes a connection whose call failed; another may take its place."""
        connection.close()
        with self._lock:
            self._num_left += 1

    def close(self) -> None:
        """Closes all idle connections and opens no more."""
        with self._lock:
            idle, self._idle, self._num_left = self._idle, [], 0
        for connection in idle:
            connection.close()


def _shared_memory(connection: socket.socket, num_bytes: int) -> mmap.mmap:
    """Memory of a sealed size, handed over a connection."""
    fd = os.memfd_create("polarcache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        # Mapped and faulted in once: a first touch runs at a tenth of the speed.
        mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        socket.send_fds(connection, [SIZE.pack(num_bytes)], [fd])
        return mapping
    finally:
        os.close(fd)
