"""Streams that break, wait too long, ask for too much or are forgotten leave nothing behind."""

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from polarcache.client import Client, Match, NamespaceSpec, chain_keys
from polarcache.proto.attend_doorbells import ANSWER, ASK, LENGTH, REFUSAL
from polarcache.proto.errors import (
    BlockNotFoundError,
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    LeaseExpiredError,
    PolarCacheError,
    ServiceUnavailableError,
)
from polarcache.proto.local import receive_exactly
from polarcache.proto.status import error_from_rpc
from polarcache.proto.v1 import polarcache_pb2 as pb
from polarcache.proto.v1 import polarcache_pb2_grpc as stubs
from tests.conftest import ServiceProcess

KEYS = chain_keys(range(6 * 128), 128)
HEADS = 8
TRANSPORTS = {"grpc": 0, "shared-memory": 64 << 20}


@pytest.fixture(params=TRANSPORTS)
def shared_bytes(request: pytest.FixtureRequest) -> int:
    return TRANSPORTS[request.param]


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


def test_closing_a_stream_ends_a_request_that_waits(
    patient_service: Any, spec: NamespaceSpec, make_layers: Any, shared_bytes: int, until: Any
) -> None:
    with patient_service.client(shared_memory_bytes=shared_bytes) as client:
        match = leased(client, spec, make_layers)
        stream = client.attend(match, query_heads=HEADS)
        outcomes: list[BaseException] = []

        def work() -> None:
            try:
                while True:
                    stream.attend(0, queries(512))
            except BaseException as error:
                outcomes.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        before = client.stats().counters["attend_requests_total"]
        until(lambda: client.stats().counters["attend_requests_total"] > before)
        stream.close()
        thread.join(10)
        assert not thread.is_alive()
        assert isinstance(outcomes[0], PolarCacheError)
        client.release(match)
        until(lambda: patient_service.gauges()["pinned_blocks"] == 0)


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


FORGETFUL = """
import sys, time
from polarcache.client import Client, KvLayout, NamespaceSpec, chain_keys
endpoint, model, shared_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = Client(endpoint, shared_memory_bytes=shared_bytes)
layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=64, block_tokens=128)
namespace = client.open_namespace(NamespaceSpec(model=model, layout=layout))
keys = chain_keys(range(6 * 128), 128)
streams = [
    client.attend(client.lookup(namespace, keys), query_heads=8) for _ in range(int(sys.argv[4]))
]
print("open", flush=True)
time.sleep(60)
"""


def test_of_200_streams_the_abandoned_half_leaves_nothing(
    start_service: Any, spec: NamespaceSpec, make_layers: Any, until: Any
) -> None:
    service = start_service(
        "--redis", "off", "--memory", "8MiB", "--stream-idle-ms", "1500", "--lease-ms", "1000"
    )
    empty = service.gauges()
    with service.client() as client, service.client(shared_memory_bytes=0) as remote:
        match = leased(client, spec, make_layers)
        streams = [
            (client if i % 2 else remote).attend(
                client.lookup(match.namespace, KEYS), query_heads=HEADS
            )
            for i in range(160)
        ]
        killed = [
            subprocess.Popen(
                [
                    sys.executable, "-c", FORGETFUL, service.endpoint, spec.model,
                    str(shared_bytes), "20",
                ],
                stdout=subprocess.PIPE,
            )
            for shared_bytes in TRANSPORTS.values()
        ]  # fmt: skip
        for process in killed:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            process.kill()
            process.wait(20)
        for stream in streams[:100]:
            with contextlib.suppress(DeadlineError):
                stream.attend(0, queries())
            stream.close()
        until(lambda: service.gauges()["attend_streams"] == 0, 30.0)
        # The abandoned streams are still open at this end.
        gauges = until(lambda: (g := service.gauges())["leases"] == 0 and g, 30.0)
        until(lambda: service.gauges()["local_workers"] <= 1)
        assert gauges["pinned_blocks"] == gauges["attend_waiting_requests"] == 0
        client.set_memory_limit(1)
        assert service.gauges()["memory_used_bytes"] == empty["memory_used_bytes"] == 0
        with pytest.raises((DeadlineError, ServiceUnavailableError)):
            streams[-1].attend(0, queries())
        for stream in streams[100:]:
            stream.close()
    assert service.counters()["attend_streams_opened_total"] == 200


def serial_service(directory: Path, *flags: str) -> Iterator[Any]:
    running = ServiceProcess(directory, "--redis", "off", "--attend-batch", "1", *flags)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def patient_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Computes one request at a time."""
    yield from serial_service(tmp_path_factory.mktemp("patient"))


@pytest.fixture(scope="module")
def short_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Computes one request at a time, of which two may wait."""
    yield from serial_service(tmp_path_factory.mktemp("short"), "--attend-queue", "2")


def test_beyond_the_queue_requests_are_refused_and_the_stream_goes_on(
    short_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    with short_service.client() as client:
        match = leased(client, spec, make_layers)
        streams = [RawStream(short_service, match) for _ in range(6)]
        for number in range(8):
            for stream in streams:
                stream.ask(number, 256)
        for stream in streams:
            stream.end()
        answers = [list(stream.answers) for stream in streams]
        for of_stream in answers:
            assert [answer.request_id for answer in of_stream] == list(range(8))
        reasons = [answer.error.reason for of_stream in answers for answer in of_stream]
        sizes = [len(answer.out) for of_stream in answers for answer in of_stream]
        assert set(reasons) == {"CapacityError", ""}
        assert {(reason, size) for reason, size in zip(reasons, sizes, strict=True)} == {
            ("CapacityError", 0),
            ("", 256 * HEADS * 64 * 4),
        }


def test_the_client_is_told_that_the_queue_is_full(
    short_service: Any, spec: NamespaceSpec, make_layers: Any, shared_bytes: int
) -> None:
    with short_service.client(shared_memory_bytes=shared_bytes) as client:
        match = leased(client, spec, make_layers)
        streams = [client.attend(match, query_heads=HEADS) for _ in range(8)]
        outcomes: list[str] = []

        def work(stream: Any) -> None:
            for _ in range(10):
                try:
                    stream.attend(0, queries(64))
                    outcomes.append("answered")
                except CapacityError:
                    outcomes.append("refused")

        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 80
        assert set(outcomes) == {"answered", "refused"}
        for stream in streams:
            stream.attend(1, queries())
            stream.close()


def test_expired_requests_leave_the_queue(
    patient_service: Any, spec: NamespaceSpec, make_layers: Any
) -> None:
    with patient_service.client() as client:
        match = leased(client, spec, make_layers)
        streams = [RawStream(patient_service, match) for _ in range(10)]
        client.release(match)
        for stream in streams:
            stream.ask(1, 512, timeout_ms=1)
            stream.ask(2)
            stream.end()
        answers = [list(stream.answers) for stream in streams]
        reasons = [first.error.reason for first, _ in answers]
        assert reasons.count("DeadlineError") >= 3
        assert set(reasons) <= {"DeadlineError", ""}
        assert all(second.lse for _, second in answers)


def test_cancelled_streams_take_their_requests_along(
    patient_service: Any, spec: NamespaceSpec, make_layers: Any, until: Any
) -> None:
    service = patient_service
    computed = service.counters()["attend_requests_total"]
    with service.client() as client:
        match = leased(client, spec, make_layers)
        streams = [RawStream(service, match) for _ in range(30)]
        for stream in streams:
            for number in range(4):
                stream.ask(number, 512)
        until(lambda: service.gauges()["attend_waiting_requests"] > 10)
        for stream in streams:
            stream.answers.cancel()
        until(lambda: service.gauges()["attend_streams"] == 0)
        assert service.gauges()["attend_waiting_requests"] == 0
        assert service.counters()["attend_requests_total"] - computed < 120
        client.release(match)
        until(lambda: service.gauges()["pinned_blocks"] == 0)


def raw_local(service: Any, match: Match) -> Any:
    """A local connection with 64 KiB of memory, its stream open."""
    from polarcache.client._attend_links import LocalAttendLink

    with service.client(shared_memory_bytes=0) as client:
        described = client.describe()
    link = LocalAttendLink(described.local_socket, described.boot_id, 1 << 16)
    begin = pb.AttendBegin(
        namespace_id=match.namespace.namespace_id,
        lease_id=match.lease_id,
        num_q_heads=HEADS,
        query_dtype=pb.DTYPE_FLOAT16,
    )
    link.open(begin, 10.0)
    return link


@pytest.fixture
def link(service: Any, spec: NamespaceSpec, make_layers: Any) -> Iterator[Any]:
    with service.client() as client:
        link = raw_local(service, leased(client, spec, make_layers))
        yield link
        link.close()


def ring(link: Any, *fields: int) -> None:
    """Sends a doorbell: request_id, layer, num_tokens, position, timeout_ms, offset, length."""
    link._socket.settimeout(10)
    link._socket.sendall(LENGTH.pack(ASK.size) + ASK.pack(*fields))


def heard(link: Any) -> bytes:
    """The next message's body."""
    (length,) = LENGTH.unpack(receive_exactly(link._socket, LENGTH.size))
    return receive_exactly(link._socket, length)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (0, 1024, "must fit"),
        (1 << 16, 4096, "outside of the shared memory"),
        (2**64 - 4096, 4096, "outside of the shared memory"),
    ],
    ids=["short", "beyond", "wrapping"],
)
def test_a_place_outside_of_the_shared_memory_is_refused(
    link: Any, offset: int, length: int, message: str
) -> None:
    ring(link, 7, 0, 1, -1, 0, offset, length)
    body = heard(link)
    assert body[:9] == REFUSAL + (7).to_bytes(8, "little")
    assert body[9:].startswith(b"InvalidRequestError\0")
    assert message.encode() in body
    # The stream goes on, and several requests may be under way.
    ring(link, 8, 0, 1, -1, 0, 0, 8192)
    ring(link, 9, 1, 1, -1, 0, 8192, 8192)
    answered = {heard(link)[:2] for _ in range(2)}
    assert answered == {ANSWER + b"\x08", ANSWER + b"\x09"}


@pytest.mark.parametrize("body", [b"\xff" * 48, b"x" * 5000], ids=["wrong length", "garbage"])
def test_garbage_on_the_local_socket_ends_the_stream(link: Any, body: bytes) -> None:
    link._socket.settimeout(10)
    link._socket.sendall(body)
    assert heard(link)[:1] == b"E"
    with contextlib.suppress(ConnectionResetError):
        assert link._socket.recv(1) == b""


def test_a_worker_that_reads_no_answers_is_cut_off(link: Any, service: Any, until: Any) -> None:
    before = service.gauges()["attend_streams"]
    body = LENGTH.pack(ASK.size) + ASK.pack(1, 9, 1, -1, 0, 0, 8192)
    link._socket.settimeout(10)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        link._socket.sendall(body * 100_000)
    until(lambda: service.gauges()["attend_streams"] <= before)
