"""What a worker may write on the local socket, and what becomes of it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from polarcache.client import Match, NamespaceSpec
from polarcache.proto.attend_doorbells import ANSWER, ASK, LENGTH, REFUSAL
from polarcache.proto.local import receive_exactly
from polarcache.proto.v1 import polarcache_pb2 as pb
from tests.integration.attend_streams import HEADS, leased


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
