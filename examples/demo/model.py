"""The language model of a worker: prefill, decode, and its cache as per-layer tensors.

The cache holds fp16 numbers, as an engine's would; arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation import BaseStreamer
from transformers.utils import logging as transformers_logging

from polarcache.client import KvLayout
from polarcache.client.transformers import PrefixCache

__all__ = ["LanguageModel"]

Layers = list[tuple[torch.Tensor, torch.Tensor]]
_CHUNK_TOKENS = 512


class LanguageModel:
    """A causal language model on the CPU.

    Args:
        directory: Hugging Face model directory.
    """

    def __init__(self, directory: Path) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        # Without a prefix in the service this is PyTorch's attention.
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="polarcache"
        ).eval()
        config = self.model.config
        self.layout = KvLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype="float16",
            block_tokens=128,
        )

    @torch.inference_mode()
    def prefill(
        self, tokens: torch.Tensor, progress: Callable[[int], None] = lambda _: None
    ) -> Layers:
        """Keys and values of tokens from position 0 on: K and V [T, Hkv, D] fp16 a layer."""
        layers: Layers = []
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            cache = self._cache(layers)
            self.model(input_ids=tokens[None, start : start + _CHUNK_TOKENS],
                        past_key_values=cache, logits_to_keep=1)  # fmt: skip
            layers = [
                (layer.keys[0].transpose(0, 1).half(), layer.values[0].transpose(0, 1).half())
                for layer in cache.layers
            ]
            progress(min(start + _CHUNK_TOKENS, len(tokens)))
        return layers

    @torch.inference_mode()
    def logits(self, prefix: Layers, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary] of tokens that follow a prefix."""
        output = self.model(input_ids=tokens[None], past_key_values=self._cache(prefix))
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def answer(
        self,
        prefix: Layers,
        question: torch.Tensor,
        num_tokens: int,
        on_first: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Greedy continuation of a prefix and a question.

        Args:
            prefix: Keys and values of the prefix.
            question: Token ids that follow it.
            num_tokens: Tokens to generate.
            on_first: Called when the first of them is known.
        """
        cache = self._cache(prefix)
        tokens, generated = question, []
        for i in range(num_tokens):
            logits = self.model(input_ids=tokens[None], past_key_values=cache).logits[0, -1]
            generated.append(int(logits.argmax()))
            if i == 0:
                on_first()
            tokens = torch.tensor(generated[-1:])
        return generated

    def generate(
        self,
        cache: PrefixCache,
        tokens: torch.Tensor,
        num_tokens: int,
        on_first: Callable[[], None] = lambda: None,
    ) -> tuple[list[int], torch.Tensor]:
        """Greedy continuation by transformers itself, and its logits [num_tokens, vocabulary].

        Args:
            cache: Begins with a stored prefix of the tokens.
            tokens: The whole prompt.
            num_tokens: Tokens to generate.
            on_first: Called when the first of them is known.
        """
        output = self.model.generate(
            tokens[None], past_key_values=cache, max_new_tokens=num_tokens, do_sample=False,
            eos_token_id=None, streamer=_FirstToken(on_first), output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return output.sequences[0, len(tokens) :].tolist(), torch.cat(output.logits)

    @staticmethod
    def _cache(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
        data = [
            (k.transpose(0, 1)[None].float(), v.transpose(0, 1)[None].float()) for k, v in layers
        ]
        return DynamicCache(ddp_cache_data=data) if data else DynamicCache()


class _FirstToken(BaseStreamer):
    """Tells when the first token is known; what transformers shows first is the prompt."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._on_first = on_first
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        self._shown += 1
        if self._shown == 2:
            self._on_first()

    def end(self) -> None:
        """Nothing is left to show."""
