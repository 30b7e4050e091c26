"""The engines and stores that `vllm_hit.py` compares."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polarcache.client import Client

sys.path.append(str(Path(__file__).parents[1] / "tests" / "client" / "vllm"))
from engine_server import EngineServer, polarcache_transfer

__all__ = ["BLOCK_TOKENS", "LMCACHE", "NO_STORE", "Bench", "System"]

BLOCK_TOKENS = 128
LMCACHE = "LMCache"
NO_STORE = "no store"
_SETTLE_S = 60.0


@dataclass
class System:
    """One engine and its store.

    Attributes:
        name: For the report.
        engine: The engine.
        stored: Bytes that the store holds, and bytes that it takes for a block; None without one.
    """

    name: str
    engine: EngineServer
    stored: Callable[[], tuple[int, int]] | None = None

    def stored_bytes(self) -> int:
        """Bytes that the store holds."""
        return self.stored()[0] if self.stored is not None else 0

    def wait_for_blocks(self, before_bytes: int, num_blocks: int) -> int:
        """Bytes stored, once so many blocks came and nothing changed for half a second."""
        if self.stored is None:
            return 0
        end_s, last, since_s = time.monotonic() + _SETTLE_S, -1, time.monotonic()
        while time.monotonic() < end_s:
            now, block_bytes = self.stored()
            if now != last:
                last, since_s = now, time.monotonic()
            elif now >= before_bytes + num_blocks * block_bytes and (
                time.monotonic() - since_s > 0.5
            ):
                return now
            time.sleep(0.05)
        raise TimeoutError(f"{self.name} holds {last} bytes, expected {num_blocks} blocks more")


class Bench:
    """Starts systems and ends them.

    Args:
        directory: For logs and state.
        model: Folder of the model.
        service_python: Interpreter that runs PolarCache's service.
    """

    def __init__(self, directory: Path, model: Path, service_python: str) -> None:
        self._directory = directory
        self._model = model
        self._service_python = service_python
        self._engines: list[EngineServer] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def close(self) -> None:
        """Ends all of them."""
        for engine in self._engines:
            engine.stop()
        for process in self._processes:
            process.terminate()
            process.wait(30)

    def start(self, profiles: list[str], lmcache: str | None) -> list[System]:
        """An engine without a store, one for each profile, one with LMCache; all serving.

        Args:
            profiles: Codec profiles of PolarCache.
            lmcache: LMCache's program; None to do without.
        """
        systems = [System(NO_STORE, self._engine(None))]
        endpoint = self._start_polarcache()
        for profile in profiles:
            # No gate: the sweep is to show where loading pays.
            transfer = polarcache_transfer(endpoint=endpoint, min_load_tokens=1, profile=profile)
            systems.append(
                System(
                    f"PolarCache `{profile}`",
                    self._engine(transfer),
                    lambda profile=profile: _polarcache_bytes(endpoint, profile),  # type: ignore[misc]
                )
            )
        if lmcache is not None:
            port, http_port = self._start_lmcache(lmcache)
            time.sleep(10)
            systems.append(
                System(
                    LMCACHE,
                    self._engine(_lmcache_transfer(port)),
                    # It keeps what the engine has.
                    lambda: (_lmcache_bytes(http_port), _polarcache_bytes(endpoint, "exact")[1]),
                )
            )
        for engine in self._engines:
            engine.wait()
        return systems

    def _engine(self, transfer: dict[str, Any] | None) -> EngineServer:
        self._engines.append(EngineServer(self._directory, self._model, transfer))
        return self._engines[-1]

    def _start_polarcache(self) -> str:
        """A service without Redis; its endpoint."""
        port = _free_port()
        with (self._directory / "polarcache.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    self._service_python, "-m", "polarcache.cli", "serve", "--device", "cpu",
                    "--redis", "off", "--memory", "1GiB", "--port", str(port),
                    "--state-dir", str(self._directory / "state"),
                ],
                cwd=self._directory,
                stderr=log,
            )  # fmt: skip
        self._processes.append(process)
        return f"grpc://127.0.0.1:{port}"

    def _start_lmcache(self, program: str) -> tuple[int, int]:
        """LMCache's server with one GiB of memory; its port and HTTP port."""
        port, http_port = _free_port(), _free_port()
        with (self._directory / "lmcache.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    program, "server", "--port", str(port), "--http-port", str(http_port),
                    "--supported-transfer-mode", "engine_driven", "--l1-size-gb", "1",
                    "--chunk-size", str(BLOCK_TOKENS), "--eviction-policy", "LRU",
                    "--prometheus-port", str(_free_port()),
                ],
                cwd=self._directory,
                stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._processes.append(process)
        return port, http_port


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _lmcache_transfer(port: int) -> dict[str, Any]:
    """The --kv-transfer-config of LMCache's connector."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmcache.mp.port": port},
    }


def _lmcache_bytes(http_port: int) -> int:
    """Bytes in use of LMCache's memory."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/status", timeout=30) as answer:
        status = json.load(answer)
    found = list(_values(status, "memory_used_bytes"))
    if not found:
        raise KeyError(f"no memory_used_bytes in LMCache's status: {status}")
    return int(found[0])


def _values(tree: Any, name: str) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from _values(value, name)


def _polarcache_bytes(endpoint: str, profile: str) -> tuple[int, int]:
    """Bytes of a profile in PolarCache's memory, and bytes of one block."""
    with Client(endpoint, shared_memory_bytes=0) as client:
        for info in client.list_namespaces():
            if info.namespace.profile == profile:
                return info.memory_blocks * info.packed_block_bytes, info.packed_block_bytes
    raise LookupError(f"no engine has opened a namespace of {profile}")
