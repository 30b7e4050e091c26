"""What remote attention is measured against: bare round trips of the same bytes.

Each baseline is a process of its own that answers requests of `QUERY_BYTES` with `ANSWER_BYTES`:

    python benchmarks/attend_baselines.py grpc|tcp|unix [DEVICE]

It prints its address and serves until killed. With a device it computes, between a request and its
answer, what the service computes, so that what is left after subtracting the kernel's time is
comparable: a process that slept meanwhile wakes later, and its caches are cold.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import torch

from polarcache.kernels.attention.batch import PrefixBatch
from polarcache.kernels.attention.prefix import PrefixAttention
from polarcache.kernels.codec import Codec
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.profile import Profile

# One token of 32 query heads of 128 channels: fp16 queries, fp32 out and lse.
HEADS, HEAD_DIM = 32, 128
QUERY_BYTES = HEADS * HEAD_DIM * 2
ANSWER_BYTES = HEADS * (HEAD_DIM + 1) * 4
KV_HEADS = 8
# Short prefixes of what the device computes well: profile, and tokens of their one block.
SHORT_PROFILES = {"cpu": ("exact", 16), "cuda": ("k=pair:r4t4,v=int4", 128)}
_TIME_BYTES = 8
_METHOD = "/echo.Echo/Echo"
_OPTIONS = [("grpc.max_receive_message_length", 1 << 26), ("grpc.so_reuseport", 0)]


class Server:
    """A baseline's process.

    Args:
        kind: "grpc", "tcp" or "unix".
        device: Where to compute before each answer, "" for not at all.
    """

    def __init__(self, kind: str, device: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, *([device] if device else [])],
            stdout=subprocess.PIPE,
            text=True,
        )

    def address(self) -> str:
        """Where it listens, once it does."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

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

    def ask(self) -> float:
        """One round trip; the kernel's time in it, microseconds."""
        self._requests.put(self._payload)
        answer = next(self._answers)
        assert len(answer) == ANSWER_BYTES
        return _kernel_us(answer)

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

    def ask(self) -> float:
        """One round trip; the kernel's time in it, microseconds."""
        self._socket.sendall(self._payload)
        _fill(self._socket, self._target)
        return _kernel_us(self._target)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()


def _kernel_us(answer: bytes | memoryview) -> float:
    return int.from_bytes(answer[-_TIME_BYTES:], "little") / 1e3


def kernel(device: str) -> Callable[[], int]:
    """What the service computes for one token and one block: a call's nanoseconds."""
    if not device:
        return lambda: 0
    torch.set_num_threads(1)
    where = torch.device(device)
    profile, tokens = SHORT_PROFILES[where.type]
    shape = BlockShape(
        tokens=tokens, kv_heads=KV_HEADS, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM,
        pairing="half", rotary_dim=HEAD_DIM,
    )  # fmt: skip
    codec = Codec(Profile.parse(profile), shape, torch.float16)
    attention = PrefixAttention(codec, HEADS)
    memory = torch.zeros(codec.layout.slice_bytes, dtype=torch.uint8, device=where)
    words = [[[0]], [tokens], [0, 1]]
    table, lengths, starts = (torch.tensor(one, dtype=torch.int32, device=where) for one in words)
    batch = PrefixBatch(memory, table, 0, lengths, starts, 1)
    query = torch.ones(1, HEADS, HEAD_DIM, dtype=torch.float16, device=where)
    out = torch.empty(1, HEADS, HEAD_DIM, device=where)
    lse = torch.empty(1, HEADS, device=where)
    num_bytes = attention.workspace_bytes(1, 1, 1)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=where) if num_bytes else None

    def compute() -> int:
        start_ns = time.monotonic_ns()
        attention(query, batch, out, lse, workspace)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.monotonic_ns() - start_ns

    return compute


def _fill(connection: socket.socket, target: memoryview) -> bool:
    done = 0
    while done < len(target):
        count = connection.recv_into(target[done:])
        if not count:
            return False
        done += count
    return True


async def _serve_grpc(compute: Callable[[], int]) -> None:
    rest = os.urandom(ANSWER_BYTES - _TIME_BYTES)

    async def echo(_: object, context: grpc.aio.ServicerContext) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(rest + compute().to_bytes(_TIME_BYTES, "little"))

    server = grpc.aio.server(options=_OPTIONS)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def _serve_socket(listener: socket.socket, address: str, compute: Callable[[], int]) -> None:
    print(address, flush=True)
    connection, _ = listener.accept()
    if listener.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    question = memoryview(bytearray(QUERY_BYTES))
    rest = os.urandom(ANSWER_BYTES - _TIME_BYTES)
    while _fill(connection, question):
        connection.sendall(rest + compute().to_bytes(_TIME_BYTES, "little"))


def main() -> None:
    """Serves one baseline."""
    kind = sys.argv[1]
    compute = kernel(sys.argv[2] if len(sys.argv) > 2 else "")
    if kind == "grpc":
        asyncio.run(_serve_grpc(compute))
    elif kind == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        _serve_socket(listener, f"127.0.0.1:{listener.getsockname()[1]}", compute)
    else:
        path = str(Path(tempfile.mkdtemp(prefix="pc-bench-")) / "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        _serve_socket(listener, path, compute)


if __name__ == "__main__":
    main()
