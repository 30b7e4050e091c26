"""Streams that wait too long, ask for too much or are forgotten leave nothing behind."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polarcache.client import NamespaceSpec
from polarcache.proto.errors import (
    CapacityError,
    DeadlineError,
    PolarCacheError,
    ServiceUnavailableError,
)
from tests.conftest import ServiceProcess
from tests.integration.attend_streams import HEADS, KEYS, TRANSPORTS, RawStream, leased, queries

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


@pytest.fixture(params=TRANSPORTS)
def shared_bytes(request: pytest.FixtureRequest) -> int:
    return TRANSPORTS[request.param]


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
