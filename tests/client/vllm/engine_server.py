"""vLLM's OpenAI server and a proxy that fails on command, for end-to-end tests and benchmarks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 400.0
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # One thread waits for no other one: on a busy machine that is much faster than two.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONSAFEPATH": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # For POST /reset_prefix_cache.
    "VLLM_SERVER_DEV_MODE": "1",
}


@dataclass(frozen=True)
class Answer:
    """A greedy completion.

    Attributes:
        token_ids: Generated tokens.
        cached_tokens: Prompt tokens that were not computed.
        first_s: Seconds to the answer.
    """

    token_ids: tuple[int, ...]
    cached_tokens: int
    first_s: float


def polarcache_transfer(**options: Any) -> dict[str, Any]:
    """The --kv-transfer-config of our connector with `polarcache.*` options."""
    return {
        "kv_connector": "PolarCacheConnector",
        "kv_connector_module_path": "polarcache.client.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            f"polarcache.{name}": value for name, value in options.items()
        },
    }


class EngineServer:
    """`vllm serve` on this machine's CPU.

    Args:
        directory: For its log.
        model: Folder of the model.
        transfer: What --kv-transfer-config says; None for no connector.
        flags: Of vLLM.
    """

    def __init__(
        self, directory: Path, model: Path, transfer: dict[str, Any] | None, *flags: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.log_path = directory / f"vllm-{self.url.rpartition(':')[2]}.log"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model), "--served-model-name", "model", "--enforce-eager",
            "--host", "127.0.0.1", "--port", self.url.rpartition(":")[2],
            "--enable-prompt-tokens-details", *flags,
        ]  # fmt: skip
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                env=os.environ | _ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> EngineServer:
        """Waits until it serves."""
        end_s = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._process.poll() is None, self.log_path.read_text()[-5000:]
            assert time.monotonic() < end_s, self.log_path.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
            else:
                return self

    def complete(self, token_ids: Sequence[int], max_tokens: int = 16) -> Answer:
        """Completes a prompt greedily."""
        began_s = time.monotonic()
        answer = self._post(
            "/v1/completions",
            {
                "model": "model",
                "prompt": list(token_ids),
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        seconds = time.monotonic() - began_s
        details = answer["usage"]["prompt_tokens_details"] or {}
        tokens = tuple(answer["choices"][0]["token_ids"])
        assert len(tokens) == max_tokens, answer
        return Answer(tokens, details.get("cached_tokens") or 0, seconds)

    def forget_local_blocks(self) -> None:
        """Empties the engine's own prefix cache, once stores no more hold blocks of it."""
        end_s = time.monotonic() + 30
        while self._post("/reset_prefix_cache", None).get("success") is False:
            assert time.monotonic() < end_s
            # Finished stores are told of in an engine step.
            self.complete([5], 1)

    def metric(self, name: str) -> float:
        """Sum of a metric's series."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    def log(self) -> str:
        """What it logged so far."""
        return self.log_path.read_text()

    def stop(self) -> None:
        """Ends it and its workers."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(30)

    def _post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path,
            data=b"" if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text = response.read()
        answer: dict[str, Any] = json.loads(text) if text.strip() else {}
        return answer


class Proxy:
    """A TCP proxy before the store that breaks or stalls its connections on command."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._left = {"up": -1, "down": -1}
        self._stalls = False
        self._open: list[socket.socket] = []
        self.num_broken = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def break_after(self, direction: str, num_bytes: int, *, stall: bool = False) -> None:
        """Breaks (or stalls) everything once so many bytes went up to or down from the store."""
        with self._lock:
            self._left[direction], self._stalls = num_bytes, stall

    def heal(self) -> None:
        """Lets everything pass again; connections that stalled are closed."""
        with self._lock:
            self._left = {"up": -1, "down": -1}
        self._close_all()

    def close(self) -> None:
        """Ends it."""
        self._listener.close()
        self._close_all()

    def _close_all(self) -> None:
        with self._lock:
            sockets, self._open = self._open, []
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target), 5)
            except ConnectionRefusedError:
                client.close()
                continue
            except OSError:
                return
            server.settimeout(None)
            with self._lock:
                self._open += [client, server]
            for source, target, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(
                    target=self._pump, args=(source, target, direction), daemon=True
                ).start()

    def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(1 << 16):
                if not self._may_pass(direction, len(data)):
                    if self._stalls:
                        return
                    break
                target.sendall(data)
        except OSError:
            pass
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _may_pass(self, direction: str, num_bytes: int) -> bool:
        with self._lock:
            if self._left[direction] < 0:
                return True
            self._left[direction] = max(0, self._left[direction] - num_bytes)
            if self._left[direction] == 0:
                self.num_broken += 1
                return False
            return True
