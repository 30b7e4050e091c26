import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarcache.cache_service.tiers.record import RecordError, pack_record, unpack_record

NS, KEY, VERSION = bytes(range(16)), b"k" * 32, 1
PACKED = bytes(range(256)) * 4
RECORD = pack_record(NS, KEY, VERSION, PACKED)


def unpack(record: bytes, **changes: object) -> bytes:
    expected = {
        "namespace_id": NS,
        "block_key": KEY,
        "layout_version": VERSION,
        "num_bytes": len(PACKED),
    }
    return bytes(unpack_record(record, **(expected | changes)))  # type: ignore[arg-type]


def test_a_record_is_two_msgpack_objects() -> None:
    unpacker = msgpack.Unpacker()
    unpacker.feed(RECORD)
    header, payload = list(unpacker)
    assert header[0] == "polarcache"
    assert payload == PACKED
    assert unpack(RECORD) == PACKED


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"namespace_id": b"x" * 16}, "identity"),
        ({"block_key": b"other"}, "identity"),
        ({"layout_version": 2}, "version"),
        ({"num_bytes": 1023}, "size"),
    ],
)
def test_a_record_of_something_else_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        unpack(RECORD, **changes)
    assert caught.value.reason == reason


@given(st.integers(0, len(RECORD) - 1), st.integers(1, 255))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_one_changed_byte_is_refused(position: int, change: int) -> None:
    damaged = bytearray(RECORD)
    damaged[position] ^= change
    with pytest.raises(RecordError):
        unpack(bytes(damaged))


@given(st.integers(0, len(RECORD) - 1))
@settings(derandomize=True, deadline=None)
def test_a_cut_record_is_refused(length: int) -> None:
    with pytest.raises(RecordError):
        unpack(RECORD[:length])


@given(st.binary(max_size=400))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_foreign_bytes_are_refused(record: bytes) -> None:
    with pytest.raises(RecordError):
        unpack(record)


def test_bytes_after_the_payload_are_refused() -> None:
    with pytest.raises(RecordError):
        unpack(RECORD + b"x")
