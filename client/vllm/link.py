"""The connection to a store that may not be there: found in the background, lost without harm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from polarcache.client._sync import Client
from polarcache.client._types import Namespace
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.proto.errors import (
    DeadlineError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.layout import NamespaceSpec

__all__ = ["StoreLink"]

_log = logging.getLogger(__name__)


class StoreLink:
    """Keeps a store's namespaces open. Thread-safe.

    While the store is away nothing waits for it: `namespaces` is empty, and a thread tries again
    every `retry_ms`.

    Args:
        config: The connector's options.
        specs: Namespaces to keep open.
    """

    def __init__(self, config: ConnectorConfig, specs: Sequence[NamespaceSpec]) -> None:
        self.client = Client(
            config.endpoint,
            timeout_s=config.lookup_timeout_ms / 1000,
            transfer_timeout_s=config.transfer_timeout_ms / 1000,
            shared_memory_bytes=config.shared_memory_bytes,
        )
        self._endpoint = config.endpoint
        self._retry_s = config.retry_ms / 1000
        self._specs = tuple(specs)
        self._namespaces: tuple[Namespace, ...] = ()
        self._last_problem = ""
        self._is_closed = False
        self._wanted = threading.Event()
        self._wanted.set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep_open, name="polarcache-link", daemon=True)
        self._thread.start()

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """The open namespaces, in order; none while the store is away."""
        return self._namespaces

    def wait(self, timeout_s: float) -> tuple[Namespace, ...]:
        """The open namespaces, waited for.

        Raises:
            ServiceUnavailableError: The store is away.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._namespaces or self._is_closed, timeout_s)
        if not self._namespaces:
            raise ServiceUnavailableError(f"{self._endpoint} is away: {self._last_problem}")
        return self._namespaces

    def failed(self, error: PolarCacheError) -> None:
        """Takes note of a failed call: when the store is away, it is tried anew."""
        if isinstance(error, DeadlineError | ServiceUnavailableError):
            self._lost(error)

    def close(self) -> None:
        """Ends the thread and the connection; calls under way fail."""
        with self._changed:
            self._is_closed = True
            self._namespaces = ()
            self._changed.notify_all()
        self._wanted.set()
        self._thread.join(2 * self._retry_s + 5)
        self.client.close()

    def _lost(self, error: PolarCacheError) -> None:
        problem = f"{type(error).__name__}: {error}"
        with self._changed:
            self._namespaces = ()
            # Said once: an engine without a store is no reason to fill its log.
            if type(error).__name__ != self._last_problem.partition(":")[0]:
                _log.warning("PolarCache at %s is away: %s", self._endpoint, problem)
            self._last_problem = problem
        self._wanted.set()

    def _keep_open(self) -> None:
        while True:
            self._wanted.wait()
            if self._is_closed:
                return
            self._wanted.clear()
            try:
                opened = tuple(self.client.open_namespace(spec) for spec in self._specs)
            except PolarCacheError as error:
                self._lost(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, self._retry_s)
                continue
            with self._changed:
                if self._is_closed:
                    return
                self._namespaces, self._last_problem = opened, ""
                self._changed.notify_all()
            _log.info("PolarCache at %s: %d namespace(s) open", self._endpoint, len(opened))
