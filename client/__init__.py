"""What workers import.

    with Client("grpc://127.0.0.1:50061") as client:
        namespace = client.open_namespace(NamespaceSpec(model="m", layout=KvLayout(...)))
        keys = chain_keys(token_ids, namespace.spec.layout.block_tokens)
        match = client.lookup(namespace, keys)
        prefix = client.retrieve(match)
        client.store(namespace, keys[match.num_blocks:], layers)

Or, without downloading it, attention over the prefix, layer by layer:

        with client.attend(match, query_heads=32) as stream:
            out, lse = stream.attend(layer, queries)

`AsyncClient` has the same methods as coroutines.
"""

from polarcache.client._async import AsyncClient
from polarcache.client._async_attend import AsyncAttendStream
from polarcache.client._attend import AttendStream, AttendTiming
from polarcache.client._channel import DEFAULT_ENDPOINT
from polarcache.client._sync import Client
from polarcache.client._types import (
    Match,
    Namespace,
    Retrieved,
    RetrievedPacked,
    StoreResult,
)
from polarcache.proto.keys import chain_keys
from polarcache.proto.layout import KvLayout, NamespaceSpec
from polarcache.proto.malloc import keep_freed_memory

__all__ = [
    "DEFAULT_ENDPOINT",
    "AsyncAttendStream",
    "AsyncClient",
    "AttendStream",
    "AttendTiming",
    "Client",
    "KvLayout",
    "Match",
    "Namespace",
    "NamespaceSpec",
    "Retrieved",
    "RetrievedPacked",
    "StoreResult",
    "chain_keys",
    "keep_freed_memory",
]
