#!/usr/bin/env python3
"""Measures what reading keys and values through a codec does to a language model.

    benchmarks/quality.py --model examples/tiny_lm --tokens TOKENS.npy

Blocks of 128 tokens are read through the codec by later blocks; inside its own block a token
sees exact keys and values, which is how a worker uses the cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality_codecs import CALIBRATED, OURS, PUBLISHED_AND_PEERS, coder
from quality_data import load_tokens, recalls, texts
from quality_measure import Figures, Judge
from quality_model import Model
from quality_report import table, write

from polarcache.kernels.calibration import Calibration

_SIDES = ("keys", "values", "both")


def main() -> None:
    """Runs the command line."""
    options = _options()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    model = Model(options.model, options.device, options.ntk, options.block_tokens)
    calibration = Calibration.load(options.calibration) if options.calibration else None
    tokens = load_tokens(options.tokens)
    judge = Judge(
        model,
        texts(tokens, options.context, options.documents),
        recalls(
            tokens,
            options.context,
            options.documents if options.records else 0,
            options.records,
            model.model.config.vocab_size,
        ),
    )
    rows: list[Figures] = []
    for text in options.profiles or _chosen(options.sides, calibration is not None):
        rows.append(judge.figures(coder(text, model, options.sinks, calibration)))
        print(_progress(rows[-1], started), file=sys.stderr, flush=True)
    about = _about(options, model, time.perf_counter() - started)
    if options.output is not None:
        write(rows, about, options.output, options.name or f"quality-{model.name}-{date.today()}")
    if options.json:
        print(json.dumps({"about": about, "rows": [row.as_dict() for row in rows]}))
    else:
        print(table(rows))


def _chosen(sides: list[str], calibrated: bool) -> list[str]:
    texts = []
    for side in sides:
        texts += PUBLISHED_AND_PEERS[side] + OURS[side]
        texts += CALIBRATED[side] if calibrated else []
    return texts


def _progress(row: Figures, started: float) -> str:
    return (
        f"{time.perf_counter() - started:6.1f} s  {row.profile:45} {row.bits:6.3f} bits  "
        f"KL {row.kl_text:8.3f} / {row.kl_recall:8.3f}  "
        f"perplexity {row.perplexity_percent:+.3f} %  recall {row.recall:.3f}"
    )


def _about(options: argparse.Namespace, model: Model, seconds: float) -> dict[str, Any]:
    return {
        "model": model.name,
        "shape": f"{model.num_layers} layers, {model.kv_heads} KV heads, D {model.head_dim}",
        "context": options.context,
        "documents": f"{options.documents} of text, as many with {options.records} records",
        "block_tokens": options.block_tokens,
        "ntk": options.ntk,
        "exact_first_tokens": options.sinks,
        "date": str(date.today()),
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "seconds": round(seconds, 1),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--tokens", type=Path, required=True, help="token ids, 1-D .npy")
    parser.add_argument("--profiles", nargs="+", help="such as k=pair:r4t4,v=int4 k=kivi4,v=exact")
    parser.add_argument("--sides", nargs="+", choices=_SIDES, default=_SIDES)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=4, help="documents of each kind")
    parser.add_argument("--records", type=int, default=16, help="records of a document; 0: none")
    parser.add_argument("--sinks", type=int, default=0, help="first tokens that stay exact")
    parser.add_argument("--ntk", type=float, default=1.0, help="NTK factor of the RoPE base")
    parser.add_argument("--block-tokens", type=int, default=128, help="tokens of a block")
    parser.add_argument("--calibration", type=Path, help="file of `polarcache calibrate`")
    parser.add_argument("--output", type=Path, help="folder for .md, .json and .png")
    parser.add_argument("--name", help="stem of these files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
