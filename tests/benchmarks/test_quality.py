import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    """Imports a module of the benchmarks, which are scripts and not installed."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 400, 3000))
    return folder


def test_attention_through_exact_codecs_is_the_models_own(model_folder: Path) -> None:
    quality = load("quality_model")
    tokens = torch.arange(300) % 400
    model = quality.Model(model_folder)
    own = LlamaForCausalLM.from_pretrained(model_folder)(tokens[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(model.log_probs(tokens, 0), own.detach(), rtol=1e-3, atol=1e-3)


def test_a_token_sees_its_own_block_exact_and_earlier_blocks_coded() -> None:
    quality = load("quality_model")
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn((3, 1, 2, 300, 8), generator=generator).unbind(0)
    coded = key + 0.3, value + 0.5
    out, _ = quality.attend(query, (key, value), coded, 0.4, 128)
    for t in (0, 127, 128, 200, 299):
        start = t // 128 * 128
        keys = torch.cat((coded[0][:, :, :start], key[:, :, start : t + 1]), 2)
        values = torch.cat((coded[1][:, :, :start], value[:, :, start : t + 1]), 2)
        weights = (query[:, :, t : t + 1] @ keys.transpose(2, 3) * 0.4).softmax(-1)
        torch.testing.assert_close(out[:, :, t], (weights @ values)[:, :, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_turbo_points_are_symmetric_lloyd_max(width: int) -> None:
    points = load("quality_baselines").gaussian_points(width)
    known = {2: 1.5104, 3: 2.1519, 4: 2.7326}
    assert points[-1] == pytest.approx(known[width], abs=2e-3)
    assert points[0] == pytest.approx(-points[-1], abs=1e-3)


def test_the_benchmark_prints_and_writes_every_row(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    profiles = ["exact", "k=kivi4,v=fp8", "k=polar,v=polar", "k=exact,v=turbo3"]
    monkeypatch.setattr(
        sys, "argv",
        ["quality.py", "--model", str(model_folder), "--tokens", str(model_folder / "tokens.npy"),
         "--context", "384", "--documents", "2", "--records", "4", "--json",
         "--output", str(tmp_path), "--name", "small", "--profiles", *profiles],
    )  # fmt: skip
    load("quality").main()
    rows = {row["profile"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == profiles
    assert rows["exact"]["kl_text"] == pytest.approx(0, abs=1e-3)
    assert rows["exact"]["bits"] == 16
    assert 0 < rows["k=polar,v=polar"]["kl_text"] < 1000
    assert rows["k=kivi4,v=fp8"]["value_bits"] == 8
    assert "k=kivi4,v=fp8" in (tmp_path / "small.md").read_text()
    assert (tmp_path / "small.json").exists()
    assert (tmp_path / "small.png").stat().st_size > 1000
