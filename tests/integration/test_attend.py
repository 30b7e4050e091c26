"""Attention over a prefix in a real service: what comes back is right, however it travelled."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch

from polarcache.client import AsyncClient, Client, KvLayout, Match, NamespaceSpec, chain_keys
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs

KEYS = chain_keys(range(6 * 128), 128)
HEADS = 8
# Exact fp32 pages and queries: only the order of sums differs from float64.
EXACT_TOLERANCE = 1e-5
# Retrieved blocks were rounded to fp16 once more.
CODED_TOLERANCE = 1e-3
TRANSPORTS = {"grpc": 0, "shared-memory": 64 << 20}


def reference(
    layer: tuple[torch.Tensor, torch.Tensor],
    queries: torch.Tensor,
    *,
    tokens: int | None = None,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    window: int = 0,
    sink_tokens: int = 0,
    position: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float64, written out."""
    share = queries.shape[1] // layer[0].shape[1]
    keys, values = (side[:tokens].double().repeat_interleave(share, 1) for side in layer)
    scores = torch.einsum("thd,shd->ths", queries.double(), keys)
    scores = scores * (scale or queries.shape[-1] ** -0.5)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if window:
        token = torch.arange(len(keys))
        last_hidden = position + torch.arange(len(queries)) - window
        hidden = (token <= last_hidden[:, None]) & (token >= sink_tokens)
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1), values), scores.logsumexp(-1)


def assert_close(got: Any, expected: Any, tolerance: float) -> None:
    for name, one, other in zip(("out", "lse"), got, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= tolerance, name


def queries_of(num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, HEADS, 64, generator=generator).to(dtype)


@pytest.fixture(params=TRANSPORTS)
def client(request: pytest.FixtureRequest, service: Any) -> Any:
    with service.client(shared_memory_bytes=TRANSPORTS[request.param]) as client:
        yield client


@pytest.fixture
def stored(client: Client, spec: NamespaceSpec, make_layers: Any) -> Callable[..., Match]:
    """Stores six blocks under a profile and leases them."""

    def store(profile: str = "exact", dtype: str = "float16") -> Match:
        layout = dataclasses.replace(spec.layout, dtype=dtype)
        changed = dataclasses.replace(spec, layout=layout, profile=profile)
        namespace = client.open_namespace(changed)
        client.store(namespace, KEYS, make_layers(layout, 6))
        return client.lookup(namespace, KEYS)

    return store


@pytest.mark.parametrize(
    ("profile", "dtype", "tolerance"),
    [
        ("exact", "float32", EXACT_TOLERANCE),
        ("exact", "float16", EXACT_TOLERANCE),
        ("k=pair:r4t4,v=int4", "float16", CODED_TOLERANCE),
        ("k=polar:b8,v=polar:b8", "float16", CODED_TOLERANCE),
    ],
    ids=["exact-fp32", "exact-fp16", "pair", "polar"],
)
def test_it_equals_attention_over_what_is_retrieved(
    client: Client, stored: Callable[..., Match], profile: str, dtype: str, tolerance: float
) -> None:
    match = stored(profile, dtype)
    layers = client.retrieve(match).layers
    with client.attend(match, query_heads=HEADS) as stream:
        assert stream.prefix_tokens == 768
        assert stream.is_local == (client._transport.local_address() is not None)
        for layer in (0, 2, 1):
            for num_tokens in (1, 3):
                queries = queries_of(num_tokens, layer, getattr(torch, dtype))
                assert_close(
                    stream.attend(layer, queries), reference(layers[layer], queries), tolerance
                )
        assert stream.timing is not None
        assert stream.timing.batch_requests == 1


def test_scale_cap_window_sinks_and_a_part_of_the_prefix(
    client: Client, stored: Callable[..., Match]
) -> None:
    match = stored(dtype="float32")
    layer = client.retrieve(match).layers[1]
    queries = queries_of(4, dtype=torch.float32)
    with client.attend(
        match, query_heads=HEADS, prefix_tokens=700, scale=0.3, soft_cap=5.0, window=200,
        sink_tokens=3,
    ) as stream:  # fmt: skip
        assert stream.prefix_tokens == 700
        expected = reference(
            layer, queries, tokens=700, scale=0.3, soft_cap=5.0, window=200, sink_tokens=3,
            position=710,
        )  # fmt: skip
        assert_close(stream.attend(1, queries, 710), expected, EXACT_TOLERANCE)
        # Beyond the window nothing but the sinks is seen.
        out, lse = stream.attend(1, queries, 5000)
        expected = reference(layer, queries, tokens=3, scale=0.3, soft_cap=5.0)
        assert_close((out, lse), expected, EXACT_TOLERANCE)
    with client.attend(match, query_heads=HEADS, window=10) as stream:
        out, lse = stream.attend(1, queries, 5000)
        assert not out.any()
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_queries_in_other_dtypes_and_more_than_one_request_takes(
    client: Client, stored: Callable[..., Match]
) -> None:
    match = stored()
    layer = client.retrieve(match).layers[0]
    with client.attend(match, query_heads=HEADS, query_dtype="bfloat16") as stream:
        queries = queries_of(1100, dtype=torch.bfloat16)
        before = client.stats().counters["attend_requests_total"]
        assert_close(stream.attend(0, queries), reference(layer, queries), EXACT_TOLERANCE)
        assert client.stats().counters["attend_requests_total"] - before >= 3
        strided = queries_of(2, 1, torch.bfloat16).repeat_interleave(2, 0)[::2]
        assert_close(stream.attend(0, strided), reference(layer, strided), EXACT_TOLERANCE)


def test_streams_that_are_batched_get_what_they_get_alone(
    client: Client, spec: NamespaceSpec, make_layers: Any
) -> None:
    namespace = client.open_namespace(spec)
    matches = []
    for number in range(6):
        # Pairs of streams share a prefix, whole or in part.
        tokens = [number // 2 * 1000 + i for i in range((2 + number) * 128)]
        keys = chain_keys(tokens, 128)
        client.store(namespace, keys, make_layers(spec.layout, 2 + number, seed=number // 2))
        matches.append(client.lookup(namespace, keys))
    streams = [client.attend(match, query_heads=HEADS) for match in matches]
    queries = [queries_of(1 + number % 3, number) for number in range(6)]
    alone = [
        [one.attend(layer, q) for layer in range(3)]
        for one, q in zip(streams, queries, strict=True)
    ]
    largest = [0] * 6
    failures: list[BaseException] = []
    together = threading.Barrier(6)

    def work(number: int) -> None:
        try:
            for round_number in range(30):
                # Half of the rounds together on one layer, half each on its own.
                layer = round_number % 3 if round_number < 15 else (round_number + number) % 3
                together.wait(20)
                got = streams[number].attend(layer, queries[number])
                timing = streams[number].timing
                assert timing is not None
                largest[number] = max(largest[number], timing.batch_requests)
                assert_close(got, [side.double() for side in alone[number][layer]], 1e-6)
        except BaseException as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        stream.close()
    assert not failures
    assert max(largest) >= 2


def test_streams_on_one_prefix_cost_one_copy_of_its_pages(
    client: Client, stored: Callable[..., Match], service: Any, until: Any
) -> None:
    match = stored()
    layer = client.retrieve(match).layers[1]
    before = service.gauges()
    streams = [client.attend(match, query_heads=HEADS) for _ in range(12)]
    for number, stream in enumerate(streams):
        queries = queries_of(1, number)
        assert_close(stream.attend(1, queries), reference(layer, queries), EXACT_TOLERANCE)
    during = service.gauges()
    assert during["memory_used_bytes"] == before["memory_used_bytes"]
    assert during["attend_streams"] == 12
    for stream in streams:
        stream.close()
    until(lambda: service.gauges()["attend_streams"] == 0)


def test_the_lease_lives_as_long_as_the_stream(
    client: Client, spec: NamespaceSpec, make_layers: Any, service: Any, until: Any
) -> None:
    namespace = client.open_namespace(spec)
    client.store(namespace, KEYS, make_layers(spec.layout, 6))
    match = client.lookup(namespace, KEYS, lease_ms=200)
    expired = service.counters()["leases_expired_total"]
    with client.attend(match, query_heads=HEADS) as stream:
        other = client.lookup(namespace, KEYS, lease_ms=200)
        until(lambda: service.counters()["leases_expired_total"] == expired + 1)
        assert other.lease_id != match.lease_id
        assert client.retrieve(match).num_blocks == 6
        stream.attend(0, queries_of(1))
    until(lambda: service.counters()["leases_expired_total"] == expired + 2)


def test_one_layer_in_one_call(service: Any, client: Client, stored: Callable[..., Match]) -> None:
    match = stored()
    layer = client.retrieve(match).layers[2]
    queries = queries_of(2)
    stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
    response = stub.AttendLayer(
        pb.AttendLayerRequest(
            begin=pb.AttendBegin(
                namespace_id=match.namespace.namespace_id,
                lease_id=match.lease_id,
                num_q_heads=HEADS,
                query_dtype=pb.DTYPE_FLOAT16,
            ),
            layer=2,
            num_tokens=2,
            queries=queries.numpy().tobytes(),
        ),
        timeout=20,
    )
    out = torch.frombuffer(bytearray(response.out), dtype=torch.float32).view(2, HEADS, 64)
    lse = torch.frombuffer(bytearray(response.lse), dtype=torch.float32).view(2, HEADS)
    assert_close((out, lse), reference(layer, queries), EXACT_TOLERANCE)


def test_a_generated_stub_speaks_to_the_stream(
    service: Any, client: Client, stored: Callable[..., Match]
) -> None:
    match = stored()
    layers = client.retrieve(match).layers
    queries = queries_of(1)
    stub = stubs.KvCacheStub(grpc.insecure_channel(service.endpoint.split("//")[1]))
    begin = pb.AttendBegin(
        namespace_id=match.namespace.namespace_id,
        lease_id=match.lease_id,
        num_q_heads=HEADS,
        query_dtype=pb.DTYPE_FLOAT16,
    )
    requests = [pb.AttendRequest(begin=begin)] + [
        pb.AttendRequest(
            request_id=7 + layer, layer=layer, num_tokens=1, queries=queries.numpy().tobytes()
        )
        for layer in range(3)
    ]
    ready, *answers = stub.Attend(iter(requests), timeout=20)
    assert ready.ready.prefix_tokens == 768
    assert {answer.request_id for answer in answers} == {7, 8, 9}
    for answer in answers:
        out = torch.frombuffer(bytearray(answer.out), dtype=torch.float32).view(1, HEADS, 64)
        lse = torch.frombuffer(bytearray(answer.lse), dtype=torch.float32).view(1, HEADS)
        expected = reference(layers[answer.request_id - 7], queries)
        assert_close((out, lse), expected, EXACT_TOLERANCE)


async def test_the_asyncio_client_attends(
    service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    async with AsyncClient(service.endpoint) as client:
        namespace = await client.open_namespace(spec)
        layers = make_layers(spec.layout, 6)
        await client.store(namespace, KEYS, layers)
        match = await client.lookup(namespace, KEYS)
        queries = queries_of(1)
        async with await client.attend(match, query_heads=HEADS) as stream:
            got = await stream.attend(2, queries)
            assert stream.timing is not None
        assert_close(got, reference(layers[2], queries), EXACT_TOLERANCE)


def test_a_prefix_in_redis_is_promoted(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--memory", "8MiB")
    layers = make_layers(spec.layout, 6)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, KEYS, layers, durable=True)
        client.clear(namespace, tiers=["memory"])
        match = client.lookup(namespace, KEYS)
        assert match.tiers == ("redis",) * 6
        queries = queries_of(1)
        with client.attend(match, query_heads=HEADS) as stream:
            assert_close(stream.attend(0, queries), reference(layers[0], queries), EXACT_TOLERANCE)
            assert service.gauges()["pinned_blocks"] == 6
    assert service.counters()["promoted_blocks_total"] == 6


def test_values_may_be_of_another_size_than_keys(client: Client, make_layers: Any) -> None:
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=64, v_head_dim=32, block_tokens=128)
    name = f"attend-dv-{client._transport.local_address() is None}"
    namespace = client.open_namespace(NamespaceSpec(model=name, layout=layout))
    layers = make_layers(layout, 3)
    client.store(namespace, KEYS[:3], layers)
    queries = queries_of(2)
    with client.attend(client.lookup(namespace, KEYS[:3]), query_heads=HEADS) as stream:
        assert_close(stream.attend(1, queries), reference(layers[1], queries), EXACT_TOLERANCE)
