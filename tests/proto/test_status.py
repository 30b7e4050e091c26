import grpc
import pytest

from polarcache.proto import errors
from polarcache.proto.status import REASON_KEY, error_from_rpc, status_of


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, metadata: object) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> object:
        return self._metadata


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_survives_the_wire(name: str) -> None:
    error = getattr(errors, name)("expected this")
    code, message, metadata = status_of(error)

    received = error_from_rpc(FakeRpcError(code, message, metadata))

    assert type(received) is type(error)
    assert str(received) == "expected this"
    assert metadata[0][0] == REASON_KEY


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServiceUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.UNKNOWN, errors.InternalError),
    ],
)
def test_a_status_without_reason_is_typed_by_its_code(
    code: grpc.StatusCode, expected: type[Exception]
) -> None:
    assert type(error_from_rpc(FakeRpcError(code, "", None))) is expected


def test_the_error_tree_is_drawn_whole() -> None:
    for name in errors.__all__:
        assert name in (errors.__doc__ or "")
