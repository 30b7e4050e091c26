import pytest

from polarcache.client.vllm.config import ConnectorConfig
from polarcache.proto.errors import InvalidRequestError


def test_options_are_read_by_their_prefix() -> None:
    config = ConnectorConfig.from_extra_config(
        {"polarcache.endpoint": "grpc://store:1", "polarcache.profile": "k=pair:r4t4,v=int4"}
    )
    assert (config.endpoint, config.profile) == ("grpc://store:1", "k=pair:r4t4,v=int4")
    assert config.min_load_tokens == 256


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"polarcache.endpont": "grpc://a:1"}, "no option 'polarcache.endpont'"),
        ({"endpoint": "grpc://a:1"}, "no option 'endpoint'; expected some of: polarcache.endp"),
        ({"polarcache.load": "sync"}, "polarcache.load: .*'sync'"),
        ({"polarcache.lookup_timeout_ms": 0}, "polarcache.lookup_timeout_ms: .*0"),
        ({"polarcache.endpoint": "http://a"}, "endpoint must be grpc://"),
    ],
)
def test_what_is_wrong_is_named(extra: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ConnectorConfig.from_extra_config(extra)


def test_a_calibration_that_cannot_be_read_is_an_error(tmp_path: object) -> None:
    config = ConnectorConfig(calibration_file=f"{tmp_path}/none.json")
    with pytest.raises(InvalidRequestError, match="calibration_file"):
        config.calibration()
