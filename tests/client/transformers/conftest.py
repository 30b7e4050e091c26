"""Tiny random models, and their prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polarcache.client import Client, Namespace
from polarcache.client.transformers import namespace_spec

# Groups of tokens that share parameters have at least 32.
BLOCK_TOKENS = 32
_SHAPE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=32)),
    "qwen2-windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=24, max_window_layers=1)
    ),
}


def make_model(kind: str) -> PreTrainedModel:
    """A model with random weights, the same every time."""
    torch.manual_seed(5)
    model = _MODELS[kind]().eval()
    model.set_attn_implementation("polarcache")
    return model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(_MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def client(service: Any) -> Iterator[Client]:
    with service.client() as connected:
        yield connected


@pytest.fixture
def open_namespace(request: pytest.FixtureRequest, client: Client) -> Callable[..., Namespace]:
    """Opens a namespace that no other test uses."""

    def open_it(model: PreTrainedModel, profile: str = "exact", dtype: str = "") -> Namespace:
        spec = namespace_spec(
            model,
            name=request.node.nodeid[-200:],
            profile=profile,
            block_tokens=BLOCK_TOKENS,
            dtype=dtype,
        )
        return client.open_namespace(spec)

    return open_it


def make_prompt(num_tokens: int, rows: int = 1, seed: int = 3) -> torch.Tensor:
    """Token ids [rows, num_tokens]; rows differ in their last 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, _SHAPE["vocab_size"], (1, num_tokens), generator=generator)
    ids = ids.repeat(rows, 1)
    ids[:, -5:] = torch.randint(0, _SHAPE["vocab_size"], (rows, 5), generator=generator)
    return ids


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    """Greedy continuation with its logits."""
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=options.pop("max_new_tokens", 12),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.fixture(scope="session")
def prompt() -> Callable[..., torch.Tensor]:
    return make_prompt


@pytest.fixture(scope="session")
def greedy() -> Callable[..., Any]:
    return generate
