"""The Redis tier: packed blocks as records with a time to live.

One record a block, under a key whose hash tag is the block itself, so that blocks spread over a
Redis Cluster. Every command has a timeout; after a failure the tier counts as down and answers at
once with `TierUnavailableError` until `probe` has reached Redis again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from polarcache.proto.errors import TierUnavailableError

__all__ = ["RedisTier", "redact_url"]

_PREFIX = "polarcache"
_CLUSTER_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_SCAN_COUNT = 1000


class RedisTier:
    """Block records in Redis. Thread-safe.

    Args:
        url: `redis://`, `rediss://` or `unix://` for one server, `redis+cluster://` or
            `rediss+cluster://` for a cluster.
        timeout_s: Longest wait for one answer.
        ttl_s: Life of a record since it was last written or found, seconds.
    """

    def __init__(self, url: str, *, timeout_s: float, ttl_s: int) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._ttl_s = ttl_s
        self._client: Any = None
        self._connect_lock = threading.Lock()
        self.down_reason: str | None = None

    def exists(self, names: Sequence[tuple[bytes, bytes]]) -> list[bool]:
        """Whether Redis holds a record of each (namespace id, block key)."""
        return [bool(n) for n in self._pipeline(names, lambda pipe, key: pipe.exists(key))]

    def touch(self, names: Sequence[tuple[bytes, bytes]]) -> list[bool]:
        """Renews the life of records; False for each that is not there."""
        ttl_s = self._ttl_s
        return [bool(n) for n in self._pipeline(names, lambda pipe, key: pipe.expire(key, ttl_s))]

    def get(self, names: Sequence[tuple[bytes, bytes]]) -> list[bytes | None]:
        """The record of each block, None where there is none."""
        return self._pipeline(names, lambda pipe, key: pipe.get(key))

    def put(self, records: Sequence[tuple[tuple[bytes, bytes], bytes]]) -> None:
        """Writes records.

        Raises:
            TierUnavailableError: Redis does not answer, or refused a record (out of memory).
        """
        by_name = dict(records)
        ttl_s = self._ttl_s
        with self._guard() as client:
            pipe = client.pipeline(transaction=False)
            for name, record in by_name.items():
                pipe.set(_key(*name), record, ex=ttl_s)
            pipe.execute()

    def delete(self, names: Sequence[tuple[bytes, bytes]]) -> list[bool]:
        """Removes records; whether each was there."""
        return [bool(n) for n in self._pipeline(names, lambda pipe, key: pipe.delete(key))]

    def clear(self, namespace_id: bytes | None) -> int:
        """Removes all records, or those of one namespace; how many there were."""
        pattern = f"{_PREFIX}:{{{namespace_id.hex() if namespace_id else '*'}:*"
        removed = 0
        with self._guard() as client:
            batch: list[bytes] = []
            for key in client.scan_iter(match=pattern, count=_SCAN_COUNT):
                batch.append(key)
                if len(batch) == _SCAN_COUNT:
                    removed += self._unlink(client, batch)
                    batch = []
            removed += self._unlink(client, batch)
        return removed

    def probe(self) -> bool:
        """Asks Redis whether it is there, and takes the tier up or down accordingly."""
        try:
            with self._guard(even_if_down=True) as client:
                client.ping()
        except TierUnavailableError:
            return False
        self.down_reason = None
        return True

    def shut_down_server(self) -> None:
        """Tells the server to save its records and stop."""
        with self._guard(even_if_down=True) as client:
            client.shutdown(save=True)

    def close(self) -> None:
        """Closes all connections."""
        with self._connect_lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _pipeline(
        self, names: Sequence[tuple[bytes, bytes]], add: Callable[[Any, str], Any]
    ) -> list[Any]:
        if not names:
            return []
        with self._guard() as client:
            pipe = client.pipeline(transaction=False)
            for name in names:
                add(pipe, _key(*name))
            result: list[Any] = pipe.execute()
            return result

    @staticmethod
    def _unlink(client: Any, keys: list[bytes]) -> int:
        if not keys:
            return 0
        pipe = client.pipeline(transaction=False)
        for key in keys:
            pipe.unlink(key)
        return sum(pipe.execute())

    @contextmanager
    def _guard(self, *, even_if_down: bool = False) -> Iterator[Any]:
        """Yields the client; turns every failure of Redis into one error and takes it down."""
        down_reason = self.down_reason
        if down_reason is not None and not even_if_down:
            raise TierUnavailableError(f"Redis is down: {down_reason}")
        try:
            yield self._connected()
        except redis.exceptions.ResponseError as error:
            # Redis is there and refuses: out of memory, read-only, loading. Not a broken link.
            raise TierUnavailableError(f"Redis refused: {error}") from error
        except (redis.RedisError, OSError) as error:
            self.down_reason = f"{type(error).__name__}: {error}"
            raise TierUnavailableError(f"Redis does not answer: {error}") from error

    def _connected(self) -> Any:
        with self._connect_lock:
            if self._client is None:
                self._client = _connect(self._url, self._timeout_s)
            return self._client


def redact_url(url: str) -> str:
    """The URL without its password, for logs."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return url.replace(f":{parts.password}@", ":***@")


def _key(namespace_id: bytes, block_key: bytes) -> str:
    return f"{_PREFIX}:{{{namespace_id.hex()}:{block_key.hex()}}}"


def _connect(url: str, timeout_s: float) -> Any:
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 1),
        "health_check_interval": 30,
    }
    scheme, rest = url.split("://", 1)
    if scheme in _CLUSTER_SCHEMES:
        return RedisCluster.from_url(f"{_CLUSTER_SCHEMES[scheme]}://{rest}", **options)
    return redis.Redis.from_url(url, **options)
