"""Leases, queries and raw streams for tests of remote attention."""

import queue
from typing import Any

import grpc
import torch

from polarcache.client import Client, Match, NamespaceSpec, chain_keys
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs

KEYS = chain_keys(range(6 * 128), 128)
HEADS = 8
TRANSPORTS = {"grpc": 0, "shared-memory": 64 << 20}


def leased(client: Client, spec: NamespaceSpec, make_layers: Any, **options: Any) -> Match:
    namespace = client.open_namespace(spec)
    client.store(namespace, KEYS, make_layers(spec.layout, 6))
    return client.lookup(namespace, KEYS, **options)


def queries(num_tokens: int = 1, heads: int = HEADS, head_dim: int = 64) -> torch.Tensor:
    return torch.ones(num_tokens, heads, head_dim, dtype=torch.float16)


class RawStream:
    """Speaks the schema directly, as fast as it likes."""

    def __init__(self, service: Any, match: Match, **begin: Any) -> None:
        self._requests: queue.SimpleQueue[pb.AttendRequest | None] = queue.SimpleQueue()
        stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
        self.answers = stub.Attend(iter(self._requests.get, None), timeout=30)
        fields = {
            "namespace_id": match.namespace.namespace_id,
            "lease_id": match.lease_id,
            "num_q_heads": HEADS,
            "query_dtype": pb.DTYPE_FLOAT16,
        }
        self.send(begin=pb.AttendBegin(**(fields | begin)))
        assert next(self.answers).HasField("ready")

    def send(self, **fields: Any) -> None:
        self._requests.put(pb.AttendRequest(**fields))

    def ask(self, request_id: int, num_tokens: int = 1, **fields: Any) -> None:
        payload = queries(num_tokens).numpy().tobytes()
        self.send(request_id=request_id, num_tokens=num_tokens, queries=payload, **fields)

    def end(self) -> None:
        self._requests.put(None)
