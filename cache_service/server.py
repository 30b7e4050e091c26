"""The running service: its parts, gRPC, health, signals and drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import signal
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from polarcache.cache_service.attention import Attention
from polarcache.cache_service.config import ServiceConfig
from polarcache.cache_service.embedded_redis import EmbeddedRedis, short_socket_path
from polarcache.cache_service.local import LocalSocket
from polarcache.cache_service.memory import MemoryTier
from polarcache.cache_service.metrics import Counters
from polarcache.cache_service.namespaces import NamespaceRegistry
from polarcache.cache_service.rpc import method_handlers
from polarcache.cache_service.servicer import KvCacheServicer
from polarcache.cache_service.store import BlockStore
from polarcache.cache_service.tiers.pool import PagePool
from polarcache.cache_service.tiers.redis import RedisTier, redact_url
from polarcache.cache_service.transfers import Transfers
from polarcache.cache_service.workers import Workers
from polarcache.proto.channel import STREAM_OPTIONS
from polarcache.proto.errors import InvalidRequestError, ServiceUnavailableError
from polarcache.proto.malloc import keep_freed_memory
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["Service", "run"]

_log = logging.getLogger(__name__)

REDIS_HEALTH_NAME = "polarcache.redis"
_MONITOR_PERIOD_S = 0.5
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Service:
    """All parts of one service process.

    Args:
        config: Settings.

    Raises:
        InvalidRequestError: The device is unknown.
        TierUnavailableError: The embedded Redis does not come up.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        device = _device(config.device)
        boot_id = secrets.token_hex(16)
        counters = Counters()
        self._embedded: EmbeddedRedis | None = None
        url = config.redis
        if url == "embedded":
            self._embedded = EmbeddedRedis(config.state_dir, config.redis_memory)
            url = self._embedded.url
        self._redis: RedisTier | None = None
        if url != "off":
            if "://" not in url:
                raise InvalidRequestError(f'redis must be "embedded", "off" or a URL, got {url!r}')
            self._redis = RedisTier(
                url, timeout_s=config.redis_timeout_ms / 1000, ttl_s=config.redis_ttl_s
            )
        memory = MemoryTier(PagePool(config.memory, device))
        self._store = BlockStore(memory, self._redis, counters)
        self._workers = Workers(config.cpu_threads)
        namespaces = NamespaceRegistry(device, config.max_message_bytes // 2)
        self._attention = Attention(config, self._store, namespaces, counters)
        transfers = Transfers(self._store, namespaces, counters, config.max_blocks_per_call)
        self._local: LocalSocket | None = None
        if config.shared_memory:
            config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._local = LocalSocket(
                short_socket_path(config.state_dir.resolve(), f"local-{boot_id[:8]}.sock"),
                boot_id,
                transfers,
                self._attention,
                limit_bytes=config.shared_memory_limit,
                threads=config.cpu_threads,
                idle_timeout_s=config.stream_idle_ms / 1000,
            )
        self._servicer = KvCacheServicer(
            config,
            self._store,
            namespaces,
            self._redis,
            self._local,
            counters,
            transfers,
            self._attention,
            self._workers,
            boot_id,
            str(device),
        )
        self._health = health_aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._monitor: asyncio.Task[None] | None = None
        _log.info(
            "boot %s, device %s, memory %d bytes, redis %s",
            boot_id, device, config.memory, redact_url(url),
        )  # fmt: skip

    async def start(self) -> int:
        """Starts listening; the port.

        Raises:
            ServiceUnavailableError: The address cannot be bound.
        """
        limit = int(self._config.max_message_bytes)
        server = grpc.aio.server(
            options=[
                *STREAM_OPTIONS,
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ]
        )
        services = pb.DESCRIPTOR.services_by_name
        server.add_generic_rpc_handlers(
            tuple(method_handlers(service, self._servicer) for service in services.values())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for service in services.values()]
        reflection.enable_server_reflection(
            [*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], server
        )
        address = f"{self._config.host}:{self._config.port}"
        try:
            port: int = server.add_insecure_port(address)
        except RuntimeError as error:
            raise ServiceUnavailableError(f"cannot listen on {address}: {error}") from error
        await self._report_health()
        for name in ("", *names):
            await self._health.set(name, _SERVING)
        await server.start()
        self._server = server
        self._monitor = asyncio.create_task(self._watch())
        return port

    async def stop(self) -> None:
        """Refuses new calls, finishes those that run, copies memory to Redis, stops."""
        self._servicer.drain()
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._config.drain_timeout_s)
        if self._monitor is not None:
            self._monitor.cancel()
        if self._redis is not None:
            left = await self._workers.io(self._store.spill_all, self._config.drain_timeout_s)
            if left:
                _log.warning("%d blocks were not copied to Redis", left)
        self._attention.close()
        self._workers.close()
        if self._local is not None:
            self._local.close()
        if self._redis is not None:
            self._redis.close()
        if self._embedded is not None:
            self._embedded.stop(max(self._config.drain_timeout_s, 5.0))

    async def _watch(self) -> None:
        """Ends expired leases and keeps the health of Redis known."""
        while True:
            await asyncio.sleep(_MONITOR_PERIOD_S)
            self._store.memory.expire_leases()
            await self._report_health()

    async def _report_health(self) -> None:
        if self._redis is None:
            return
        was_down = self._redis.down_reason
        is_up = await self._workers.io(self._redis.probe)
        if is_up and was_down is not None:
            _log.info("redis is back")
        elif not is_up and was_down is None:
            _log.warning("redis is down: %s", self._redis.down_reason)
        await self._health.set(REDIS_HEALTH_NAME, _SERVING if is_up else _NOT_SERVING)


def run(config: ServiceConfig, port_file: Path | None = None) -> None:
    """Runs a service until SIGTERM or SIGINT.

    Args:
        config: Settings.
        port_file: Where to write the port once the service listens.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    asyncio.run(_run(config, port_file))


async def _run(config: ServiceConfig, port_file: Path | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = Service(config)
    try:
        port = await service.start()
        # What is there now stays: a full collection that went through it (100 ms or more) would
        # stop all threads whenever enough requests have left something behind.
        gc.collect()
        gc.freeze()
        _log.info("listening on %s:%d", config.host, port)
        if port_file is not None:
            temporary = port_file.with_suffix(".tmp")
            temporary.write_text(f"{port}\n")
            temporary.replace(port_file)
        await stop.wait()
        _log.info("draining")
    finally:
        await service.stop()
    _log.info("stopped")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequestError(f"device must be cpu, cuda, cuda:N or auto: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequestError(f"device {name} was asked for, but torch sees no GPU")
    return device
