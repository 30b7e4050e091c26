import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from polarcache.cli.codec import codec

JSON_KEYS = [
    "profile",
    "key_bits",
    "value_bits",
    "bits",
    "key_relative_l2",
    "value_relative_l2",
    "key_max_error",
    "value_max_error",
    "raw_bytes",
    "packed_bytes",
    "ratio",
    "num_tokens",
    "num_tokens_coded",
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    np.save(tmp_path / "k.npy", random.normal(size=(150, 2, 64)).astype(np.float16))
    np.save(tmp_path / "v.npy", random.normal(size=(150, 2, 32)).astype(np.float16))
    return ["--keys", str(tmp_path / "k.npy"), "--values", str(tmp_path / "v.npy")]


def report(*arguments: str) -> Result:
    return CliRunner().invoke(codec, ["report", *arguments])


def test_report_prints_one_json_object_and_saves_decoded_tensors(
    files: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "decoded"
    result = report("--profile", "k=pair,v=int4", *files, "--json", "--save-decoded", str(folder))
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert list(figures) == JSON_KEYS
    assert figures["profile"] == "k=pair:r4t4,v=int4"
    assert (figures["num_tokens"], figures["num_tokens_coded"]) == (150, 128)
    keys, decoded = np.load(tmp_path / "k.npy"), np.load(folder / "keys.npy")
    coded = keys[:128].astype(float)
    assert decoded.dtype == np.float16
    assert np.array_equal(decoded[128:], keys[128:])
    error = np.linalg.norm(decoded[:128] - coded)
    assert figures["key_relative_l2"] == pytest.approx(
        error / np.linalg.norm(keys[:128].astype(float))
    )
    assert np.load(folder / "values.npy").shape == (150, 2, 32)


def test_report_prints_a_table_for_people(files: list[str]) -> None:
    result = report("--profile", "exact", *files, "--block-tokens", "64")
    assert result.exit_code == 0, result.output
    assert "key relative l2" in result.output
    assert "num tokens coded" in result.output


def test_report_takes_pairing_and_rotary_dim(files: list[str]) -> None:
    result = report(
        "--profile", "k=pair:g32,v=exact", *files, "--json",
        "--pairing", "interleaved", "--rotary-dim", "32", "--block-tokens", "32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["num_tokens_coded"] == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "k=int4,v=int4"], "for keys one of"),
        (["--profile", "exact", "--block-tokens", "256"], "at least one block"),
        (["--profile", "exact", "--rotary-dim", "65"], "rotary_dim"),
        (["--profile", "k=pair,v=exact", "--block-tokens", "64"], "divisor"),
    ],
)
def test_report_says_what_was_expected(
    files: list[str], arguments: list[str], message: str
) -> None:
    result = report(*arguments, *files)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output


@pytest.mark.parametrize(
    "content", ["text", "empty", "objects", "integers", "flat", "archive", "nan"]
)
def test_report_refuses_files_that_are_no_keys(
    files: list[str], tmp_path: Path, content: str
) -> None:
    path = tmp_path / "k.npy"
    match content:
        case "text":
            path.write_text("keys")
        case "empty":
            path.write_bytes(b"")
        case "objects":
            np.save(path, np.array([{}]), allow_pickle=True)
        case "integers":
            np.save(path, np.zeros((150, 2, 64), np.int32))
        case "flat":
            np.save(path, np.zeros(64, np.float32))
        case "archive":
            with path.open("wb") as file:
                np.savez(file, keys=np.zeros((150, 2, 64), np.float16))
        case "nan":
            np.save(path, np.full((150, 2, 64), np.nan, np.float16))
    result = report("--profile", "k=pair,v=int4", *files)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Error: ")
    assert isinstance(result.exception, SystemExit)
