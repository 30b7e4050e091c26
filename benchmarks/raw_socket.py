"""The baseline of the wire: bytes over loopback TCP between two processes."""

from __future__ import annotations

import socket
import subprocess
import sys

RAW_SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
buffer = memoryview(bytearray(64 << 20))
while command := connection.recv(9, socket.MSG_WAITALL):
    size = int.from_bytes(command[1:], "little")
    if command[:1] == b"p":
        done = 0
        while done < size:
            done += connection.recv_into(buffer[done:size])
        connection.sendall(b"k")
    else:
        connection.sendall(buffer[:size])
"""


class RawSocket:
    """The baseline: bytes over loopback TCP between two processes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", RAW_SERVER], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._target = memoryview(bytearray(64 << 20))

    def put(self, source: list[memoryview]) -> None:
        """Sends the buffers and waits for the acknowledgement."""
        size = sum(len(part) for part in source)
        self._socket.sendall(b"p" + size.to_bytes(8, "little"))
        for part in source:
            self._socket.sendall(part)
        self._socket.recv(1)

    def get(self, size: int) -> None:
        """Asks for bytes and receives them into one buffer."""
        self._socket.sendall(b"g" + size.to_bytes(8, "little"))
        done = 0
        while done < size:
            done += self._socket.recv_into(self._target[done:size])

    def close(self) -> None:
        """Ends both sides."""
        self._socket.close()
        self._process.wait(10)
