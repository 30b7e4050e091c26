import pytest
import torch

from polarcache.client.vllm.layouts import KeyThenValue, TransposedKeys, check_shape
from polarcache.proto.errors import UnsupportedError
from polarcache.proto.layout import KvLayout

BLOCKS, HEADS, TOKENS, DIM = 7, 2, 32, 64


def tokens_of(num_blocks: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_blocks * TOKENS, HEADS, dim, generator=generator).half()


def write_transposed(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """What vLLM's vector attention does, token by token and channel by channel."""
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, TOKENS)
        for head in range(HEADS):
            flat = key_cache[block, head].view(-1)
            for channel in range(DIM):
                flat[channel * TOKENS + offset] = keys[token, head, channel]
            value_cache[block, head, offset] = values[token, head]


@pytest.mark.parametrize("value_dim", [DIM, 32])
@pytest.mark.parametrize("memory", ["heads first", "tokens first"])
def test_keys_then_values_come_back_and_nothing_else_changes(memory: str, value_dim: int) -> None:
    shape = (BLOCKS, HEADS, TOKENS, DIM + value_dim)
    cache = torch.full(shape, torch.nan, dtype=torch.float16)
    if memory == "tokens first":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    keys, values = tokens_of(2, DIM, 0), tokens_of(2, value_dim, 1)
    layout = KeyThenValue(DIM)
    layout.scatter(cache, torch.tensor([5, 1]), keys, values)
    # Token 3 of the second block given, which is block 1.
    assert torch.equal(cache[1, 1, 3, :DIM], keys[TOKENS + 3, 1])
    assert torch.equal(cache[1, 1, 3, DIM:], values[TOKENS + 3, 1])
    assert cache[[0, 2, 3, 4, 6]].isnan().all()
    got_keys, got_values = layout.gather(cache, torch.tensor([1, 5]))
    assert torch.equal(got_keys, torch.cat([keys[TOKENS:], keys[:TOKENS]]))
    assert torch.equal(got_values, torch.cat([values[TOKENS:], values[:TOKENS]]))
    assert got_keys.is_contiguous()
    assert got_values.is_contiguous()


def test_transposed_keys_come_back_and_nothing_else_changes() -> None:
    cache = torch.full((BLOCKS, HEADS, TOKENS, 2 * DIM), torch.nan, dtype=torch.float16)
    keys, values = tokens_of(2, DIM, 0), tokens_of(2, DIM, 1)
    layout = TransposedKeys(write_transposed)
    layout.scatter(cache, torch.tensor([5, 1]), keys, values)
    assert cache[[0, 2, 3, 4, 6]].isnan().all()
    got_keys, got_values = layout.gather(cache, torch.tensor([1, 5]))
    assert torch.equal(got_keys, torch.cat([keys[TOKENS:], keys[:TOKENS]]))
    assert torch.equal(got_values, torch.cat([values[TOKENS:], values[:TOKENS]]))
    assert got_keys.is_contiguous()
    assert got_values.is_contiguous()


def test_an_engine_that_writes_in_another_way_is_refused() -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=HEADS, head_dim=DIM)
    TransposedKeys(write_transposed).check(layout, TOKENS)

    def write_rows(
        keys: torch.Tensor,
        values: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        key_cache[slots // TOKENS, :, slots % TOKENS] = keys
        value_cache[slots // TOKENS, :, slots % TOKENS] = values

    with pytest.raises(UnsupportedError, match="does not keep transposed keys"):
        TransposedKeys(write_rows).check(layout, TOKENS)


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, BLOCKS, TOKENS, HEADS, DIM, dtype=torch.float16),
        torch.zeros(BLOCKS, TOKENS, HEADS, 2 * DIM, dtype=torch.float16),
        torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=torch.bfloat16),
        torch.zeros(BLOCKS, HEADS, TOKENS // 2, 2 * DIM, dtype=torch.float16),
    ],
    ids=["two tensors", "tokens before heads", "dtype", "split blocks"],
)
def test_a_cache_of_another_shape_is_refused(cache: torch.Tensor) -> None:
    layout = KvLayout(num_layers=1, num_kv_heads=HEADS, head_dim=DIM)
    check_shape("l", torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM).half(), layout, TOKENS)
    with pytest.raises(UnsupportedError, match="cache of l is"):
        check_shape("l", cache, layout, TOKENS)
