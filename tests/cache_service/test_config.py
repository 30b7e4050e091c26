from pathlib import Path

import pytest
from click.testing import CliRunner

from polarcache.cache_service.config import ConfigError, ServiceConfig, load_config
from polarcache.cli.main import main


def test_flag_beats_variable_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("port: 1001\nlease_ms: 1002\nmemory: 2MiB\n")
    monkeypatch.setenv("POLARCACHE_CONFIG_FILE", str(file))
    monkeypatch.setenv("POLARCACHE_LEASE_MS", "2002")
    monkeypatch.setenv("POLARCACHE_MEMORY", "3MiB")

    config = load_config({"memory": "4MiB"})

    assert (config.port, config.lease_ms, config.memory) == (1001, 2002, 4 << 20)
    assert config.redis == ServiceConfig.model_fields["redis"].default


def test_an_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARCACHE_MEMORI", "1MiB")
    with pytest.raises(ConfigError, match=r"POLARCACHE_MEMORI.*did you mean POLARCACHE_MEMORY"):
        load_config({})


def test_an_unknown_key_in_the_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("reddis: off\n")
    monkeypatch.setenv("POLARCACHE_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError, match=r"reddis.*did you mean redis"):
        load_config({})


def test_a_missing_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLARCACHE_CONFIG_FILE", "/nowhere.yaml")
    with pytest.raises(ConfigError, match="no file"):
        load_config({})


@pytest.mark.parametrize(
    ("name", "value"), [("port", "70000"), ("memory", "lots"), ("cpu_threads", "0")]
)
def test_a_value_out_of_range_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_config({name: value})


def test_help_shows_every_setting_with_its_default() -> None:
    text = CliRunner().invoke(main, ["serve", "--help"], terminal_width=200).output
    for name in ServiceConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert text.count("[default:") == len(ServiceConfig.model_fields)


def test_an_unknown_flag_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["serve", "--memori", "1MiB"])
    assert result.exit_code == 2
    assert "memory" in result.output
