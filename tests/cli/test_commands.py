import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from polarcache.cli.main import main
from polarcache.client import NamespaceSpec, chain_keys


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, terminal_width=200)


def run_json(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.output))


@pytest.fixture
def endpoint(service: Any) -> list[str]:
    return ["--endpoint", service.endpoint]


@pytest.fixture
def stored(service: Any, spec: NamespaceSpec, make_layers: Any) -> tuple[str, list[bytes]]:
    """Four blocks in a namespace of their own: its id in hex, and their keys."""
    keys = chain_keys(range(4 * 128), 128)
    with service.client() as client:
        namespace = client.open_namespace(spec)
        client.store(namespace, keys, make_layers(spec.layout, 4))
    return namespace.namespace_id.hex(), keys


def test_ping(endpoint: list[str]) -> None:
    result = run("ping", *endpoint)
    assert result.exit_code == 0
    assert result.output.startswith("ok: grpc://")
    answer = run_json("ping", *endpoint)
    assert answer["health"] == "ok"
    assert answer["round_trip_ms"] > 0


def test_ping_without_a_service_exits_with_1() -> None:
    result = run("ping", "--endpoint", "grpc://127.0.0.1:1", "--timeout", "1")
    assert result.exit_code == 1
    assert "ServiceUnavailableError" in result.output


def test_describe(endpoint: list[str], stored: Any) -> None:
    text = run("describe", *endpoint).output
    assert "memory tier" in text
    answer = run_json("describe", *endpoint)
    assert answer["device"] == "cpu"
    assert stored[0] in [info["namespace_id"] for info in answer["namespaces"]]


def test_lookup_by_keys_and_by_tokens(endpoint: list[str], stored: Any, tmp_path: Path) -> None:
    namespace_id, keys = stored
    np.save(tmp_path / "tokens.npy", np.arange(5 * 128))
    by_tokens = run_json(
        "lookup", namespace_id[:12], "--tokens", str(tmp_path / "tokens.npy"), *endpoint
    )
    assert (by_tokens["num_blocks"], by_tokens["asked_blocks"]) == (4, 5)
    assert by_tokens["tiers"] == ["memory"] * 4
    text = run("lookup", namespace_id, keys[0].hex(), "00ff", *endpoint).output
    assert "1 of 2 blocks, 128 tokens" in text
    assert run("lookup", "nothing", "00", *endpoint).exit_code == 1
    assert "must be hex" in run("lookup", namespace_id, "xyz", *endpoint).output


def test_stats_and_clear(endpoint: list[str], stored: Any) -> None:
    namespace_id, keys = stored
    assert run_json("stats", *endpoint)["counters"]["stored_blocks_total"] >= 4
    assert "memory_used_bytes" in run("stats", *endpoint).output
    assert run("clear", "--namespace", namespace_id, *endpoint).exit_code == 1
    cleared = run_json("clear", "--namespace", namespace_id, "--yes", *endpoint)
    assert cleared["memory_blocks"] == 4
    left = run_json("lookup", namespace_id, keys[0].hex(), *endpoint)
    assert left["num_blocks"] == 0


def test_help_names_every_command() -> None:
    text = run("--help").output
    for name in ("serve", "ping", "describe", "lookup", "stats", "clear", "codec"):
        assert name in text
        assert run(name, "--help").exit_code == 0
    assert run("nonsense").exit_code == 2
