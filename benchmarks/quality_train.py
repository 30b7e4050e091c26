#!/usr/bin/env python3
"""Trains a small model of another architecture, whose keys the codecs have not met.

    benchmarks/quality_train.py llama TOKENS.npy SECONDS OUTPUT

`llama`: head_dim 64, no biases. `qwen3`: head_dim 128, queries and keys normalized. Both learn the
records of `quality_data`, which the benchmark asks for. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality_data import load_tokens, write_records

VOCABULARY, CONTEXT, BATCH, PEAK_RATE, WARM_STEPS = 4096, 2048, 64, 2.5e-3, 100
RECORD_SHARE, MAX_RECORDS, HELD_OUT_TOKENS = 0.4, 48, 200_000
Tokens = npt.NDArray[np.int64]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=["llama", "qwen3"])
    parser.add_argument("tokens", type=Path, help="training token ids, .npy")
    parser.add_argument("seconds", type=float, help="training time")
    parser.add_argument("output", type=Path, help="model directory to write")
    options = parser.parse_args()
    torch.manual_seed(11)
    tokens = load_tokens(options.tokens)
    model = _model(options.architecture).cuda()
    steps = _train(model, tokens[:-HELD_OUT_TOKENS], options.seconds)
    loss = _held_out_loss(model, tokens[-HELD_OUT_TOKENS:])
    model.half().save_pretrained(options.output)
    facts = {"architecture": options.architecture, "steps": steps, "held_out_loss": loss}
    (options.output / "train.json").write_text(json.dumps(facts) + "\n")
    print(facts, flush=True)


def _model(architecture: str) -> Any:
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if architecture == "llama":
        parameters = {"rope_type": "default", "rope_theta": 5e5}
        config = LlamaConfig(num_hidden_layers=8, rope_parameters=parameters, **shared)
        config._attn_implementation = "sdpa"
        return LlamaForCausalLM(config)
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(num_hidden_layers=6, head_dim=128, rope_parameters=parameters, **shared)
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config)


def _train(model: Any, tokens: Tokens, seconds: float) -> int:
    rng = np.random.default_rng(11)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    loss_of = torch.compile(lambda x: _loss(model, x))
    step, started = 0, time.perf_counter()
    while True:
        batch = torch.from_numpy(_batch(tokens, rng)).cuda()
        done = (time.perf_counter() - started) / seconds if step > 2 else 0.0
        if done >= 1:
            return step
        rate = min(1, (step + 1) / WARM_STEPS) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 3:  # compiled by now
            torch.cuda.synchronize()
            started = time.perf_counter()
        if step % 200 == 0:
            print(step, round(float(loss), 3), f"{done:.2f}", flush=True)


def _loss(model: Any, x: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=x[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())


def _batch(tokens: Tokens, rng: np.random.Generator) -> Tokens:
    starts = rng.integers(0, len(tokens) - CONTEXT - 1, BATCH)
    rows = np.stack([tokens[start : start + CONTEXT + 1] for start in starts])
    for index in np.flatnonzero(rng.random(BATCH) < RECORD_SHARE):
        write_records(rows[index], int(rng.integers(2, MAX_RECORDS)), VOCABULARY, rng)
    return rows


@torch.inference_mode()
def _held_out_loss(model: Any, tokens: Tokens) -> float:
    losses = []
    for start in range(0, len(tokens) - CONTEXT - 1, 8 * CONTEXT):
        x = torch.from_numpy(tokens[start : start + CONTEXT + 1]).cuda()[None]
        losses.append(float(_loss(model, x)))
    return round(float(np.mean(losses)), 4)


if __name__ == "__main__":
    main()
