"""Shared memory with a service on the same host.

The client makes a memfd, seals its size and hands it over the service's unix socket, whose path
the service tells over gRPC. Payloads then lie in slots of that memory; only their places travel.
Where anything of this does not work out, payloads travel in messages as if it were not there.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import socket
import struct
import threading
from dataclasses import dataclass

from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["SharedMemory", "Slot", "attach"]

_log = logging.getLogger(__name__)
_SIZE = struct.Struct("<Q")
_BOOT_ID_BYTES = 32
_ATTACH_TIMEOUT_S = 2.0
_SLOTS_PER_CALL = 4
_SLOT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of shared memory that holds one payload at a time.

    Attributes:
        where: Its place.
        view: Its bytes, writable.
    """

    where: pb.RegionRange
    view: memoryview


class SharedMemory:
    """Slots shared with one service, lent to calls. Thread-safe.

    Args:
        connection: Keeps the memory attached while it is open.
        mapping: The memory.
        region_id: The service's name for it.
    """

    def __init__(self, connection: socket.socket, mapping: mmap.mmap, region_id: int) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        view = memoryview(mapping)
        slot_bytes = min(_SLOT_BYTES, len(view))
        self.slot_bytes = slot_bytes
        self._free = [
            Slot(
                pb.RegionRange(region_id=region_id, offset=start, length=slot_bytes),
                view[start : start + slot_bytes],
            )
            for start in range(0, len(view) - slot_bytes + 1, slot_bytes)
        ]

    def borrow(self) -> list[Slot]:
        """Slots for one call; none when other calls have them all."""
        with self._lock:
            slots, self._free = self._free[:_SLOTS_PER_CALL], self._free[_SLOTS_PER_CALL:]
        return slots

    def give_back(self, slots: list[Slot]) -> None:
        """Returns slots that the service does not touch any more."""
        with self._lock:
            self._free.extend(slots)

    def close(self) -> None:
        """Detaches; the memory goes with its last view."""
        self._connection.close()


def attach(path: str, boot_id: str, num_bytes: int) -> SharedMemory | None:
    """Hands shared memory to the service that listens at a unix socket.

    Args:
        path: The socket, as the service told.
        boot_id: The service's boot id; another service at that path is left alone.
        num_bytes: Size of the memory.

    Returns:
        The memory, or None when the service is on another host or refuses.
    """
    if not path or not os.path.exists(path):
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ATTACH_TIMEOUT_S)
        connection.connect(path)
        fd = os.memfd_create("polarcache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            # Mapped and faulted in once: a first touch runs at a tenth of the speed.
            mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            socket.send_fds(connection, [_SIZE.pack(num_bytes)], [fd])
        finally:
            os.close(fd)
        reply = b""
        while len(reply) < _SIZE.size + _BOOT_ID_BYTES:
            chunk = connection.recv(_SIZE.size + _BOOT_ID_BYTES - len(reply))
            if not chunk:
                raise OSError("the service closed the connection")
            reply += chunk
        (region_id,) = _SIZE.unpack(reply[: _SIZE.size])
        if region_id == 0 or reply[_SIZE.size :] != boot_id.encode():
            raise OSError("the service refused, or it is another one")
        connection.settimeout(None)
        return SharedMemory(connection, mapping, region_id)
    except OSError as error:
        _log.info("no shared memory with the service: %s", error)
        connection.close()
        return None
