"""Shared memory of workers on the same host.

A worker connects to the service's unix socket and hands over a memfd whose size is sealed, so
that it cannot shrink under the service's mapping. The socket's file mode admits the service's
own user; the region is unmapped once the worker closes the connection and no call uses it.

    worker -> service   8 bytes: region size, little-endian, with the memfd as ancillary data
    service -> worker   8 bytes: region id, 0 when refused; then the boot id, 32 bytes of hex
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
from pathlib import Path

from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["LocalSocket", "SharedRegion"]

_log = logging.getLogger(__name__)
_PEER_CREDENTIALS = struct.Struct("3i")
_SIZE = struct.Struct("<Q")
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_HANDSHAKE_TIMEOUT_S = 5.0


class SharedRegion:
    """A worker's memory, mapped here.

    Args:
        fd: The worker's memfd; not closed here.
        num_bytes: Its size.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._map = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.num_bytes = num_bytes

    def view(self, where: pb.RegionRange) -> memoryview:
        """A writable view of a range.

        Raises:
            InvalidRequestError: The range is not inside the region.
        """
        if where.offset + where.length > self.num_bytes:
            raise InvalidRequestError(
                f"bytes {where.offset} to {where.offset + where.length} are outside of the shared "
                f"region of {self.num_bytes} bytes"
            )
        return memoryview(self._map)[where.offset : where.offset + where.length]


class LocalSocket:
    """Accepts shared-memory regions.

    Args:
        path: Where to listen. Sockets of crashed services beside it are removed.
        boot_id: Told to workers, so that they notice another service's socket.
        limit_bytes: Most bytes of all regions together.
    """

    def __init__(self, path: Path, boot_id: str, limit_bytes: int) -> None:
        self.path = path
        self._boot_id = boot_id
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._regions: dict[int, SharedRegion] = {}
        self._used_bytes = 0
        _remove_stale(path.parent)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(previous)
        self._listener.listen()
        threading.Thread(target=self._accept, name="local-socket", daemon=True).start()

    def region(self, region_id: int) -> SharedRegion:
        """A region that a worker handed over and still holds.

        Raises:
            InvalidRequestError: There is none of that id.
        """
        region = self._regions.get(region_id)
        if region is None:
            raise InvalidRequestError(f"shared region {region_id} is not attached")
        return region

    def gauges(self) -> dict[str, int]:
        """Present values by name."""
        with self._lock:
            return {"shared_regions": len(self._regions), "shared_bytes": self._used_bytes}

    def close(self) -> None:
        """Stops listening and removes the socket."""
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            region_id = 0
            try:
                connection.settimeout(_HANDSHAKE_TIMEOUT_S)
                region_id = self._attach(connection)
                connection.sendall(_SIZE.pack(region_id) + self._boot_id.encode())
                connection.settimeout(None)
                while connection.recv(1):
                    pass
            except (OSError, ValueError) as error:
                _log.warning("shared memory refused: %s", error)
            finally:
                self._detach(region_id)

    def _attach(self, connection: socket.socket) -> int:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, uid, _ = _PEER_CREDENTIALS.unpack(raw)
        message, fds, _, _ = socket.recv_fds(connection, _SIZE.size, 1)
        try:
            if uid not in (os.getuid(), 0) or len(fds) != 1 or len(message) != _SIZE.size:
                raise ValueError(f"user {uid} sent {len(fds)} descriptors")
            (num_bytes,) = _SIZE.unpack(message)
            seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
            if seals & _SEALED != _SEALED or os.fstat(fds[0]).st_size != num_bytes:
                raise ValueError(f"a sealed memfd of {num_bytes} bytes was expected")
            with self._lock:
                if self._used_bytes + num_bytes > self._limit_bytes:
                    _log.warning("shared memory refused: limit of %d bytes", self._limit_bytes)
                    return 0
                self._used_bytes += num_bytes
                region_id = secrets.randbits(63) | 1
            try:
                self._regions[region_id] = SharedRegion(fds[0], num_bytes)
            except (OSError, ValueError):
                with self._lock:
                    self._used_bytes -= num_bytes
                raise
            return region_id
        finally:
            for fd in fds:
                os.close(fd)

    def _detach(self, region_id: int) -> None:
        # The mapping goes when the last view of it does.
        with self._lock:
            region = self._regions.pop(region_id, None)
            if region is not None:
                self._used_bytes -= region.num_bytes


def _remove_stale(directory: Path) -> None:
    for path in directory.glob("local-*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink(missing_ok=True)
