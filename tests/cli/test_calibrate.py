import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from polarcache.cli.calibrate import query_energies
from polarcache.cli.main import main
from polarcache.kernels.calibration import Calibration


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokens_file(folder: Path, count: int = 300) -> Path:
    path = folder / "tokens.npy"
    np.save(path, np.random.default_rng(1).integers(0, 64, count).astype(np.uint16))
    return path


def test_calibrate_writes_a_file_that_loads(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "calibration.json"
    arguments = ["calibrate", str(model_folder), str(tokens_file(tmp_path))]
    options = ["--output", str(output), "--context", "64", "--documents", "2", "--json"]
    result = CliRunner().invoke(main, arguments + options)
    assert result.exit_code == 0, result.output
    calibration = Calibration.load(output)
    facts = json.loads(result.stdout[result.stdout.index("{") :])
    assert facts["name"] == f"cal{calibration.name}"
    assert calibration.query.shape == (2, 2, 8)
    assert (calibration.pairing, calibration.rotary_dim) == ("half", 16)
    again = tmp_path / "again.json"
    CliRunner().invoke(main, [*arguments, "--output", str(again), *options[2:]])
    assert Calibration.load(again).digest == calibration.digest


def test_energies_are_the_mean_squared_queries_of_the_heads_that_share_a_kv_head(
    model_folder: Path,
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    document = torch.arange(32) % 64
    energies, head_dim = query_energies(model, [document], "half")
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(document[None]))
    query = layer.self_attn.q_proj(hidden).view(32, 4, 16)
    # RoPE turns a pair without changing its length.
    square = query.square().mean(0).view(2, 2, 2, 8).sum(2).mean(1)
    assert head_dim == 16
    torch.testing.assert_close(energies[0], square, rtol=1e-4, atol=1e-6)


def test_calibrate_refuses_a_source_that_is_too_short(model_folder: Path, tmp_path: Path) -> None:
    source = tokens_file(tmp_path, 10)
    arguments = ["calibrate", str(model_folder), str(source), "--output", str(tmp_path / "c.json")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "expected at least" in result.output
