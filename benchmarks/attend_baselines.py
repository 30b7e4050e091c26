"""What remote attention is measured against: bare round trips of the same bytes.

Each baseline is a process of its own that answers requests of `QUERY_BYTES` with `ANSWER_BYTES`:

    python benchmarks/attend_baselines.py grpc|tcp|unix    prints its address, serves until killed
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc

# One token of 32 query heads of 128 channels: fp16 queries, fp32 out and lse.
HEADS, HEAD_DIM = 32, 128
QUERY_BYTES = HEADS * HEAD_DIM * 2
ANSWER_BYTES = HEADS * (HEAD_DIM + 1) * 4
_METHOD = "/echo.Echo/Echo"
_OPTIONS = [("grpc.max_receive_message_length", 1 << 26), ("grpc.so_reuseport", 0)]


class Server:
    """A baseline's process.

    Args:
        kind: "grpc", "tcp" or "unix".
    """

    def __init__(self, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(10)


class Echo:
    """The client side of a bare gRPC stream, written as the attention client's is."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = self._channel.stream_stream(_METHOD)
        self._answers = method(iter(self._requests.get, None))
        self._payload = os.urandom(QUERY_BYTES)

    def ask(self) -> None:
        """One round trip."""
        self._requests.put(self._payload)
        answer = next(self._answers)
        assert len(answer) == ANSWER_BYTES

    def close(self) -> None:
        """Ends the stream."""
        self._requests.put(None)
        self._channel.close()


class PingPong:
    """The client side of a bare socket."""

    def __init__(self, address: str) -> None:
        if address.startswith("/"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._payload = os.urandom(QUERY_BYTES)
        self._target = memoryview(bytearray(ANSWER_BYTES))

    def ask(self) -> None:
        """One round trip."""
        self._socket.sendall(self._payload)
        _fill(self._socket, self._target)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


def _fill(connection: socket.socket, target: memoryview) -> bool:
    done = 0
    while done < len(target):
        count = connection.recv_into(target[done:])
        if not count:
            return False
        done += count
    return True


async def _serve_grpc() -> None:
    answer = os.urandom(ANSWER_BYTES)

    async def echo(_: object, context: grpc.aio.ServicerContext) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(answer)

    server = grpc.aio.server(options=_OPTIONS)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def _serve_socket(listener: socket.socket, address: str) -> None:
    print(address, flush=True)
    connection, _ = listener.accept()
    if listener.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    question = memoryview(bytearray(QUERY_BYTES))
    answer = os.urandom(ANSWER_BYTES)
    while _fill(connection, question):
        connection.sendall(answer)


def main() -> None:
    """Serves one baseline."""
    kind = sys.argv[1]
    if kind == "grpc":
        asyncio.run(_serve_grpc())
    elif kind == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        _serve_socket(listener, f"127.0.0.1:{listener.getsockname()[1]}")
    else:
        path = str(Path(tempfile.mkdtemp(prefix="pc-bench-")) / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        _serve_socket(listener, path)


if __name__ == "__main__":
    main()
