"""Real services and real Redis servers for the tests, each on its own port and directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from polarcache.cache_service.embedded_redis import redis_server_path
from polarcache.client import Client, KvLayout, NamespaceSpec

START_TIMEOUT_S = 60.0
# TEST_DEVICE=cuda runs the services of the tests on a GPU.
DEVICE = os.environ.get("TEST_DEVICE", "cpu")


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Polls until the condition is true; its value."""
    end_s = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {timeout_s} s: {condition}")
        time.sleep(0.02)
    return value


class ServiceProcess:
    """`polarcache serve` in a process of its own."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.directory = directory
        self._flags = flags
        self._port_file = directory / "port"
        self.log_path = directory / "service.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._port_file.unlink(missing_ok=True)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "polarcache.cli", "serve", "--device", DEVICE,
                    "--port", "0", "--port-file", str(self._port_file),
                    "--state-dir", str(self.directory / "state"), *self._flags,
                ],
                stderr=log,
                cwd=self.directory,
            )  # fmt: skip
        wait_until(self._is_up, START_TIMEOUT_S)
        self.endpoint = f"grpc://127.0.0.1:{self._port_file.read_text().strip()}"

    def _is_up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_path.read_text()
        return self._port_file.exists()

    def client(self, **options: Any) -> Client:
        return Client(self.endpoint, **options)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)

    def gauges(self) -> dict[str, int]:
        with self.client(shared_memory_bytes=0) as client:
            return dict(client.stats().gauges)

    def counters(self) -> dict[str, int]:
        with self.client(shared_memory_bytes=0) as client:
            return dict(client.stats().counters)


class RedisProcess:
    """A redis-server in a process of its own, on a fixed free port so that it can come back."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self._socket = Path(tempfile.mkdtemp(prefix="pc-redis-")) / "redis.sock"
        self._flags = flags
        self._directory = directory
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                redis_server_path(), "--port", "0", "--unixsocket", str(self._socket),
                "--save", "", "--dir", str(self._directory), *self._flags,
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(self._answers)

    def client(self) -> Any:
        import redis

        return redis.Redis.from_url(self.url)

    def _answers(self) -> bool:
        import redis

        try:
            return bool(self.client().ping())
        except redis.RedisError:
            return False

    def pause(self) -> None:
        """It stays connected and answers nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.resume()
            self.process.kill()
            self.process.wait(20)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with an embedded Redis, shared by tests that use their own models."""
    running = ServiceProcess(tmp_path_factory.mktemp("service"), "--memory", "128MiB")
    yield running
    assert running.stop() == 0, running.log_path.read_text()


@pytest.fixture(scope="session")
def start_store() -> type[ServiceProcess]:
    """Starts a service in a directory; whoever starts it stops it."""
    return ServiceProcess


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services of this test alone."""
    started: list[ServiceProcess] = []

    def start(*flags: str) -> ServiceProcess:
        directory = tmp_path / f"service{len(started)}"
        directory.mkdir()
        started.append(ServiceProcess(directory, *flags))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RedisProcess]]:
    """Starts Redis servers of this test alone."""
    started: list[RedisProcess] = []

    def start(*flags: str) -> RedisProcess:
        started.append(RedisProcess(tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def redis_server(start_redis: Callable[..., RedisProcess]) -> RedisProcess:
    """A Redis of this test alone."""
    return start_redis()


@pytest.fixture
def layout() -> KvLayout:
    """A small model's cache."""
    return KvLayout(num_layers=3, num_kv_heads=2, head_dim=64, block_tokens=128)


@pytest.fixture
def spec(request: pytest.FixtureRequest, layout: KvLayout) -> NamespaceSpec:
    """A namespace that no other test uses."""
    return NamespaceSpec(model=request.node.nodeid[-200:], layout=layout)


def random_layers(
    layout: KvLayout, num_blocks: int, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of consecutive tokens, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = num_blocks * layout.block_tokens
    dtype = getattr(torch, layout.dtype)
    return [
        (
            torch.randn(tokens, layout.num_kv_heads, layout.head_dim, generator=generator).to(
                dtype
            ),
            torch.randn(tokens, layout.num_kv_heads, layout.v_head_dim, generator=generator).to(
                dtype
            ),
        )
        for _ in range(layout.num_layers)
    ]


def same_layers(one: Any, other: Any) -> bool:
    """Whether two lists of layers are equal bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for pair, other_pair in zip(one, other, strict=True)
        for a, b in zip(pair, other_pair, strict=True)
    )


@pytest.fixture(scope="session")
def make_layers() -> Callable[..., list[tuple[torch.Tensor, torch.Tensor]]]:
    return random_layers


@pytest.fixture(scope="session")
def are_same() -> Callable[[Any, Any], bool]:
    return same_layers


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_until
