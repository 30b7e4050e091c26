"""A causal language model whose attention reads earlier blocks through a codec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

BLOCK_TOKENS = 128
_INT8_FILE = "model_int8.safetensors"


class Coder(Protocol):
    """What a codec looks like from inside attention."""

    def keys(self, layer: int, blocks: Tensor) -> Tensor:
        """Returns decoded keys of one layer for blocks [N, T, Hkv, D]."""

    def values(self, layer: int, blocks: Tensor) -> Tensor:
        """Returns decoded values of one layer for blocks [N, T, Hkv, Dv]."""


@dataclass(slots=True)
class Captured:
    """What one layer's attention was given: fp32 [B, H, T, D] each, keys after RoPE."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@dataclass(slots=True)
class CodedAttention:
    """Attention of transformers: own block exact, earlier blocks through `coder`.

    Attributes:
        coder: None reads everything exact.
        captured: filled with one entry a layer while `capture` is on.
        capture: whether to keep what attention is given.
        block_tokens: tokens of a block.
    """

    coder: Coder | None = None
    capture: bool = False
    captured: list[Captured] = field(default_factory=list)
    block_tokens: int = BLOCK_TOKENS

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Returns outputs [B, T, Hq, Dv] of causal attention; the mask given is ignored."""
        if self.capture:
            self.captured.append(Captured(query, key, value, scaling))
        read_key, read_value = key, value
        if self.coder is not None:
            read_key = through_blocks(self.coder.keys, module.layer_idx, key, self.block_tokens)
            read_value = through_blocks(
                self.coder.values, module.layer_idx, value, self.block_tokens
            )
        out, _ = attend(query, (key, value), (read_key, read_value), scaling, self.block_tokens)
        return out.transpose(1, 2), None


def attend(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    read: tuple[Tensor, Tensor],
    scaling: float,
    block_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention, keys and values of a token's own block from `own`, others from `read`.

    Args:
        query: [B, Hq, T, D].
        own: keys [B, Hkv, T, D] and values [B, Hkv, T, Dv].
        read: likewise.
        scaling: factor of the scores.
        block_tokens: tokens of a block.

    Returns:
        Outputs [B, Hq, T, Dv] and scores before the softmax [B, Hq, T, T].
    """
    groups = query.shape[1] // own[0].shape[1]
    (own_k, own_v), (read_k, read_v) = (
        tuple(x.repeat_interleave(groups, 1) for x in side) for side in (own, read)
    )
    tokens = query.shape[2]
    scores = query @ read_k.transpose(2, 3)
    spans = [slice(at, at + block_tokens) for at in range(0, tokens, block_tokens)]
    for span in spans:
        scores[:, :, span, span] = query[:, :, span] @ own_k[:, :, span].transpose(2, 3)
    scores *= scaling
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    out = weights @ read_v
    if own_v is not read_v:
        difference = own_v - read_v
        for span in spans:
            out[:, :, span] += weights[:, :, span, span] @ difference[:, :, span]
    return out, scores


def through_blocks(code: Any, layer: int, x: Tensor, block_tokens: int) -> Tensor:
    """Codes the whole blocks of [B, H, T, D]; the tail below one block stays exact."""
    whole = x.shape[2] // block_tokens * block_tokens
    if not whole:
        return x
    blocks = x[:, :, :whole].transpose(1, 2).unflatten(1, (-1, block_tokens)).flatten(0, 1)
    decoded = code(layer, blocks.contiguous()).to(x.dtype)
    decoded = decoded.unflatten(0, (x.shape[0], -1)).flatten(1, 2).transpose(1, 2)
    return torch.cat((decoded, x[:, :, whole:]), 2)


class Model:
    """A model directory, in fp32, with `CodedAttention` in every layer.

    Attributes:
        model: the transformers model.
        attention: its attention.
        name: the directory's name.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        ntk: float = 1.0,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.name = path.name
        self.block_tokens = block_tokens
        self.attention = CodedAttention(block_tokens=block_tokens)
        implementation = f"polarcache_coded_{id(self.attention)}"
        AttentionInterface.register(implementation, self.attention.__call__)
        config = AutoConfig.from_pretrained(path)
        self.head_dim: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.kv_heads: int = config.num_key_value_heads
        self.num_layers: int = config.num_hidden_layers
        if ntk != 1.0:
            power = self.head_dim / (self.head_dim - 2)
            config.rope_parameters["rope_theta"] *= ntk**power
        options = {"config": config, "dtype": torch.float32}
        if (path / _INT8_FILE).exists():
            model = _from_int8(path, config)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        model.set_attn_implementation(implementation)
        self.model = model.eval().to(device)
        self.device = device

    @contextmanager
    def reading(self, coder: Coder | None) -> Iterator[None]:
        """Reads earlier blocks through `coder` inside the context."""
        self.attention.coder = coder
        try:
            yield
        finally:
            self.attention.coder = None

    @torch.inference_mode()
    def log_probs(self, tokens: Tensor, start: int) -> Tensor:
        """Returns next-token log probabilities after positions from `start` on, fp32 [T', V]."""
        hidden = self.model.model(input_ids=tokens[None].to(self.device), use_cache=False)[0]
        logits: Tensor = self.model.lm_head(hidden[0, start:])
        return logits.float().log_softmax(-1)

    @torch.inference_mode()
    def capture(self, tokens: Tensor) -> list[Captured]:
        """Returns what each layer's attention is given on an exact pass."""
        self.attention.capture, self.attention.captured = True, []
        self.model.model(input_ids=tokens[None].to(self.device), use_cache=False)
        self.attention.capture = False
        return self.attention.captured


def _from_int8(path: Path, config: Any) -> Any:
    """Builds a model from int8 rows with fp16 row scales (`NAME` and `NAME.scale`)."""
    stored = load_file(path / _INT8_FILE)
    weights = {}
    for name, value in stored.items():
        if name.endswith(".scale"):
            continue
        if value.dtype is torch.int8:
            value = value.float() * stored[f"{name}.scale"].float()[:, None]
        weights[name] = value.float()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model
