"""Streams that break or are asked for what cannot be are told so."""

import signal
import threading
import time
from typing import Any

import grpc
import pytest

from polarcache.client import NamespaceSpec
from polarcache.proto.errors import (
    BlockNotFoundError,
    DeadlineError,
    InvalidRequestError,
    LeaseExpiredError,
    ServiceUnavailableError,
)
from polarcache.proto.status import error_from_rpc
from polarcache.proto.v1 import polarcache_pb2 as pb
from tests.integration.attend_streams import HEADS, KEYS, TRANSPORTS, RawStream, leased, queries


@pytest.fixture(params=TRANSPORTS)
def shared_bytes(request: pytest.FixtureRequest) -> int:
    return TRANSPORTS[request.param]


BAD_OPENINGS = {
    "no lease": ({"lease_id": b""}, LeaseExpiredError, "look up again"),
    "heads": ({"num_q_heads": 3}, InvalidRequestError, "multiple of 2 KV heads"),
    "no heads": ({"num_q_heads": 0}, InvalidRequestError, "query_heads 0"),
    "dtype": ({"query_dtype": 0}, InvalidRequestError, "query_dtype"),
    "too long": ({"prefix_tokens": 769}, InvalidRequestError, "covers 768 tokens"),
    "scale": ({"scale": float("nan")}, InvalidRequestError, "finite"),
    "sinks": ({"sink_tokens": 4}, InvalidRequestError, "without a window"),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_a_bad_opening_is_refused(
    service: Any, spec: NamespaceSpec, make_layers: Any, case: str
) -> None:
    fields, error_class, message = BAD_OPENINGS[case]
    before = service.gauges()["pinned_blocks"]
    with service.client() as client:
        match = leased(client, spec, make_layers)
        with pytest.raises(grpc.RpcError) as caught:
            RawStream(service, match, **fields)
        error = error_from_rpc(caught.value)
        assert type(error) is error_class
        assert message in str(error)
        client.release(match)
    assert service.gauges()["pinned_blocks"] == before


BAD_REQUESTS = {
    "layer": ({"layer": 3}, "3 layers"),
    "no tokens": ({"num_tokens": 0}, "num_tokens 0"),
    "too many tokens": ({"num_tokens": 513}, "1 to 512"),
    "cut queries": ({"queries": b"\0" * 1022}, "queries are 1022 bytes"),
    "region over grpc": ({"region": pb.RegionRange(length=4096)}, "local socket alone"),
    "no position": ({"position": None}, "position missing"),
    "huge position": ({"position": 2**32 - 1}, "position"),
}


def test_a_bad_request_is_refused_and_the_stream_goes_on(
    service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    with service.client() as client:
        stream = RawStream(service, leased(client, spec, make_layers), sliding_window=100)
        good = {
            "num_tokens": 1,
            "layer": 1,
            "position": 768,
            "queries": queries().numpy().tobytes(),
        }
        for number, (changes, message) in enumerate(BAD_REQUESTS.values()):
            stream.send(request_id=number, **(good | changes))
            answer = next(stream.answers)
            assert answer.request_id == number
            assert answer.error.reason == "InvalidRequestError"
            assert message in answer.error.message
        stream.send(request_id=99, **good)
        assert len(next(stream.answers).out) == HEADS * 64 * 4
        stream.end()
        assert list(stream.answers) == []


def test_the_client_refuses_what_does_not_fit(
    service: Any, spec: NamespaceSpec, make_layers: Any, shared_bytes: int
) -> None:
    with service.client(shared_memory_bytes=shared_bytes) as client:
        match = leased(client, spec, make_layers)
        for options in ({"query_heads": 3}, {"query_heads": HEADS, "query_dtype": "int8"}):
            with pytest.raises(InvalidRequestError):
                client.attend(match, **options)
        unleased = client.lookup(match.namespace, KEYS, lease=False)
        with pytest.raises(InvalidRequestError, match="no lease"):
            client.attend(unleased, query_heads=HEADS)
        with client.attend(match, query_heads=HEADS, window=64) as stream:
            for layer, asked, position in (
                (3, queries(), 0),
                (-1, queries(), 0),
                (0, queries(heads=4), 0),
                (0, queries(head_dim=32), 0),
                (0, queries()[0], 0),
                (0, queries(0), 0),
                (0, queries().float(), 0),
                (0, queries(), None),
                (0, queries(), -1),
            ):
                with pytest.raises(InvalidRequestError):
                    stream.attend(layer, asked, position)
            stream.attend(0, queries(), 768)
        with pytest.raises(InvalidRequestError, match="closed"):
            stream.attend(0, queries(), 768)


def test_a_block_that_is_gone_is_named(
    start_service: Any, redis_server: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", redis_server.url)
    with service.client() as client, service.client(shared_memory_bytes=0) as remote:
        match = leased(client, spec, make_layers)
        client.store(match.namespace, KEYS, make_layers(spec.layout, 6), durable=True)
        client.release(match)
        client.clear(match.namespace, tiers=["memory"])
        match = client.lookup(match.namespace, KEYS)
        # Another service deletes two of the blocks while the lease lives.
        for name in redis_server.client().keys("*"):
            if KEYS[3].hex().encode() in name or KEYS[5].hex().encode() in name:
                redis_server.client().delete(name)
        for one in (client, remote):
            with pytest.raises(BlockNotFoundError, match=f"block 3 .*{KEYS[3].hex()}"):
                one.attend(match, query_heads=HEADS)
            with one.attend(match, query_heads=HEADS, prefix_tokens=3 * 128) as stream:
                stream.attend(0, queries())
        client.release(match)
        for one in (client, remote):
            with pytest.raises(LeaseExpiredError):
                one.attend(match, query_heads=HEADS)
    assert service.gauges()["pinned_blocks"] == 0


def test_a_service_that_dies_or_hangs_is_told_within_the_deadline(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, until: Any
) -> None:
    service = start_service("--redis", "off")
    with service.client() as client, service.client(shared_memory_bytes=0) as remote:
        match = leased(client, spec, make_layers)
        hanging = [one.attend(match, query_heads=HEADS) for one in (client, remote)]
        dying = [one.attend(match, query_heads=HEADS) for one in (client, remote)]
        for stream in hanging + dying:
            stream.attend(0, queries())
        service.process.send_signal(signal.SIGSTOP)
        for stream in hanging:
            start_s = time.monotonic()
            with pytest.raises(DeadlineError):
                stream.attend(1, queries(), timeout_s=0.3)
            assert time.monotonic() - start_s < 2
        service.process.send_signal(signal.SIGCONT)
        outcomes: list[BaseException] = []
        answered: list[int] = []

        def work(number: int) -> None:
            while True:
                try:
                    dying[number].attend(2, queries(), timeout_s=5)
                    answered.append(number)
                except BaseException as error:
                    outcomes.append(error)
                    return

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: set(answered) == {0, 1})
        start_s = time.monotonic()
        service.kill()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start_s < 5
        assert [type(error) for error in outcomes] == [ServiceUnavailableError] * 2
        for stream in hanging + dying:
            with pytest.raises((DeadlineError, ServiceUnavailableError)):
                stream.attend(0, queries())
            stream.close()


def test_a_draining_service_ends_streams_at_once(
    start_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    service = start_service("--redis", "off")
    with service.client() as client, service.client(shared_memory_bytes=0) as remote:
        match = leased(client, spec, make_layers)
        streams = [one.attend(match, query_heads=HEADS) for one in (client, remote)]
        # gRPC waits for idle connections; the stream in shared memory does without one.
        client.close()
        for stream in streams:
            stream.attend(0, queries())
        start_s = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - start_s < 5
        for stream in streams:
            with pytest.raises(ServiceUnavailableError):
                stream.attend(0, queries())
            stream.close()
