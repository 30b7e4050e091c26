"""A compute that the test holds back, and a stream that keeps what it is told."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from polarcache.cache_service.attend_batcher import AttendBatcher
from polarcache.cache_service.attend_compute import Computed
from polarcache.cache_service.attend_queries import Launch, WaitingQuery
from polarcache.proto.errors import (
    PolarCacheError,
)

KIND, OTHER_KIND = object(), object()


@dataclass
class HeldBack:
    """Computes nothing, when it is let."""

    launches: list[list[int]] = field(default_factory=list)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fails: bool = False
    threads: set[int] = field(default_factory=set)

    def begin(self, requests: Sequence[WaitingQuery]) -> None:
        self.requests = requests
        self.threads.add(threading.get_ident())
        self.launches.append(sorted(request.request_id for request in requests))
        self.begun.release()
        assert self.go.acquire(timeout=20)
        if self.fails:
            raise RuntimeError("the kernel failed")

    def is_done(self) -> bool:
        return True

    def finish(self) -> Computed[WaitingQuery]:
        requests = self.requests
        return Computed(requests, [(memoryview(b"o"), memoryview(b"l"))] * len(requests), 5)


class Stream:
    """Sends requests and keeps what it is told."""

    def __init__(self, batcher: AttendBatcher, name: int, kind: Any = KIND) -> None:
        self.batcher = batcher
        self.turn = batcher.join(self, kind)
        self.prefix: Any = SimpleNamespace(
            kind=kind, identity=bytes([name]), first_unit=name, slice_bytes=256
        )
        self.answered: list[int] = []
        self.refused: list[PolarCacheError] = []

    def ask(
        self, request_id: int, num_tokens: int = 1, timeout_ms: int = 0, here: bool = False
    ) -> bool:
        query = WaitingQuery(self.prefix, 0, num_tokens, b"", 0, request_id, timeout_ms)
        return self.batcher.submit(self.turn, query, here=here)

    def answer(
        self, request: WaitingQuery, launch: Launch, out: memoryview, lse: memoryview
    ) -> None:
        assert (launch.kernel_ns, bytes(out), bytes(lse)) == (5, b"o", b"l")
        assert request.queue_ns(launch) >= 0
        self.answered.append(request.request_id)

    def refuse(self, request: WaitingQuery, error: PolarCacheError) -> None:
        self.refused.append(error)


Make = Callable[..., tuple[AttendBatcher, HeldBack]]
