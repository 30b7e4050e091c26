"""`polarcache calibrate`: measures queries, so that encoders spend bits where they look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polarcache.cli.output import print_fields, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_TEXT_BYTES = 1 << 24


@click.command()
@click.argument("model_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("source", type=_FILE)
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--context", default=2048, show_default=True, help="Tokens of a document.")
@click.option("--documents", default=8, show_default=True, help="Documents, evenly spread.")
@click.option(
    "--pairing",
    type=click.Choice(["half", "interleaved"]),
    default="half",
    show_default=True,
    help="Which key channels RoPE turns together.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def calibrate(
    model_folder: Path,
    source: Path,
    output: Path,
    context: int,
    documents: int,
    pairing: str,
    device: str,
    as_json: bool,
) -> None:
    """Runs a Hugging Face model on SOURCE and writes the energies of its queries.

    SOURCE is a text file, or token ids in a .npy file. Nothing leaves this machine. Name the
    result in a profile, such as k=pair:tiers8:cal<digits>,v=polar.
    """
    from polarcache.kernels import CodecError

    try:
        from polarcache.kernels.calibration import Calibration

        model = _load(model_folder, device)
        documents_ids = _documents(model_folder, source, context, documents)
        energies, head_dim = query_energies(model, documents_ids, pairing)
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"polarcache calibrate needs the package {error.name}: "
            "pip install 'polarcache[cli,transformers]'"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise click.ClickException(f"{model_folder}: {error}") from error
    origin = f"{model_folder.name} on {len(documents_ids)} x {context} tokens of {source.name}"
    try:
        calibration = Calibration.measured(energies, pairing, rotary_dim(model, head_dim), origin)
        calibration.save(output)
    except (CodecError, OSError) as error:
        raise click.ClickException(str(error)) from error
    layers, heads, pairs = calibration.query.shape
    facts = {
        "file": str(output),
        "name": f"cal{calibration.name}",
        "digest": calibration.digest,
        "layers": layers,
        "kv_heads": heads,
        "pairs": pairs,
        "source": origin,
    }
    if as_json:
        print_json(facts)
    else:
        print_fields("Calibration", facts)


def query_energies(model: Any, documents: Sequence[Tensor], pairing: str) -> tuple[Tensor, int]:
    """Measures mean squared queries after RoPE, by layer, KV head and pair.

    Args:
        model: a causal language model of transformers.
        documents: token ids, int64 [T] each.
        pairing: which channels RoPE turns together.

    Returns:
        Energies fp32 [L, Hkv, P] and head_dim.
    """
    import torch
    from transformers import AttentionInterface

    sums: dict[int, Tensor] = {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, None]:
        square = query.float().square().mean((0, 2))
        square = square.view(key.shape[1], -1, square.shape[-1]).mean(1)
        sums[module.layer_idx] = sums.get(module.layer_idx, 0) + square.cpu()
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=named.get("scaling"), enable_gqa=True
        )
        return out.transpose(1, 2), None

    name = f"polarcache_calibrate_{id(sums)}"
    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)
    with torch.inference_mode():
        for document in documents:
            model(input_ids=document[None].to(model.device), use_cache=False)
    square = torch.stack([sums[layer] for layer in sorted(sums)])
    head_dim = square.shape[-1]
    rotary = rotary_dim(model, head_dim)
    return _by_pair(square, pairing, rotary) / len(documents), head_dim


def rotary_dim(model: Any, head_dim: int) -> int:
    """Returns how many channels of a head RoPE turns, from the model's config."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or 1.0
    return int(head_dim * share) // 2 * 2


def _by_pair(square: Tensor, pairing: str, rotary: int) -> Tensor:
    """Sums squares [L, Hkv, D] over the two channels of each pair."""
    from polarcache.kernels import BlockShape

    heads, head_dim = square.shape[1:]
    shape = BlockShape(
        8, heads, head_dim, 16, "half" if pairing == "half" else "interleaved", rotary
    )
    energies = square.new_empty((*square.shape[:-1], shape.pairs))
    for pairs, first, second in shape.pair_channels():
        energies[..., pairs] = square[..., first] + square[..., second]
    return energies


def _load(folder: Path, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().to(device)


def _documents(folder: Path, source: Path, context: int, count: int) -> list[torch.Tensor]:
    """Returns up to `count` windows of `context` tokens.

    Raises:
        ValueError: the source is shorter than one window.
    """
    import numpy as np
    import torch

    if source.suffix == ".npy":
        tokens = np.load(source, allow_pickle=False).astype(np.int64).ravel()
    else:
        from transformers import AutoTokenizer

        text = source.read_bytes()[:_TEXT_BYTES].decode("utf-8", "replace")
        tokens = np.array(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    last = len(tokens) - context
    if last < 0:
        raise ValueError(f"{source}: {len(tokens)} tokens, expected at least {context}")
    count = min(count, 1 + last // context)
    starts = np.linspace(0, last, count).astype(np.int64)
    return [torch.from_numpy(tokens[start : start + context].copy()) for start in starts]
