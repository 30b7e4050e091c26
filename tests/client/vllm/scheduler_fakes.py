"""A store that answers when told to, and a scheduler's side with everything around it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from polarcache.client import Match, Namespace
from polarcache.client.vllm.config import ConnectorConfig
from polarcache.client.vllm.identity import EngineIdentity
from polarcache.client.vllm.lookups import Lookups
from polarcache.client.vllm.pins import PinnedBlocks
from polarcache.client.vllm.plan import StepPlan
from polarcache.client.vllm.scheduler import SchedulerSide
from polarcache.proto.errors import PolarCacheError

BLOCK = 128  # Tokens of a stored block; the engine's have 16.


class FakeStore:
    """A client and a link at once."""

    def __init__(self, identity: EngineIdentity) -> None:
        self.client = self
        self.namespaces: tuple[Namespace, ...] = tuple(
            Namespace(bytes([i]) * 16, spec, 1, 16.0, 16.0) for i, spec in enumerate(identity.specs)
        )
        self.has: list[set[bytes]] = [set() for _ in identity.specs]
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.error: Exception | None = None
        self.errors: list[PolarCacheError] = []
        self.leases: set[bytes] = set()
        self.asked: list[int] = []

    def lookup(self, namespace: Namespace, keys: Sequence[bytes], *, lease_ms: int) -> Match:
        assert self.may_answer.wait(20)
        self.asked.append(len(keys))
        if self.error is not None:
            raise self.error
        rank = self.namespaces.index(namespace)
        count = next((i for i, key in enumerate(keys) if key not in self.has[rank]), len(keys))
        lease = b""
        if count:
            lease = f"lease {rank} {len(self.asked)}".encode()
            self.leases.add(lease)
        return Match(namespace, ("memory",) * count, lease, lease_ms, partial=False)

    def release(self, match: Match) -> None:
        self.leases.discard(match.lease_id)

    def failed(self, error: PolarCacheError) -> None:
        self.errors.append(error)


class Engine:
    """A scheduler's side with everything around it."""

    def __init__(self, identity: EngineIdentity, fakes: SimpleNamespace, **options: Any) -> None:
        roles = {name: options.pop(name) for name in ("may_load", "may_store") if name in options}
        self.fakes = fakes
        self.store = FakeStore(identity)
        self.pool = fakes.Pool(fakes.num_blocks)
        config = ConnectorConfig(**{"min_load_tokens": BLOCK, **options})
        link: Any = self.store
        self.lookups = Lookups(link, config)
        pins = PinnedBlocks(len(identity.specs), int(config.max_pinned * fakes.num_blocks))
        pins.bind(self.pool)
        self.now_s = 0.0
        self.side = SchedulerSide(
            identity, config, link, self.lookups, pins, **roles, clock=lambda: self.now_s
        )

    def answered(self, request: Any, num_computed_tokens: int = 0) -> tuple[int, bool]:
        """Asks again until the lookup is done."""
        for _ in range(2000):
            tokens, is_async = self.side.matched_tokens(request, num_computed_tokens)
            if tokens is not None:
                return tokens, is_async
            threading.Event().wait(0.005)
        raise AssertionError("no answer")

    def step(self, request: Any, num_tokens: int, block_ids: Sequence[int] = ()) -> StepPlan:
        """Plans a step that computes tokens of a request, and counts them as computed."""
        blocks = list(block_ids) or list(range(self.fakes.num_blocks))
        if request.num_computed_tokens == 0:
            self.side.allocated(request, blocks, 0)
        output = self.fakes.scheduled(
            {request.request_id: num_tokens}, {request.request_id: blocks}
        )
        plan = self.side.plan(output)
        request.num_computed_tokens += num_tokens
        return plan


def keys_of(request: Any, num_blocks: int) -> list[bytes]:
    """A stored block has the hash of the last of its eight engine blocks."""
    return request.block_hashes[7::8][:num_blocks]
