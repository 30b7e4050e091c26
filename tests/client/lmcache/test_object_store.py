"""The adapter's inside without LMCache: keys and objects as LMCache has them, a real service."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polarcache.client.lmcache.object_store import ObjectStore
from polarcache.client.lmcache.objects import L2Config, block_key, object_block, object_layout
from polarcache.proto.errors import InvalidRequestError, LayoutMismatchError

CHUNK_TOKENS, LAYERS, HEADS, HEAD_DIM = 64, 3, 2, 32
SHAPES = {
    "split": [2, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM],
    "packed": [1, LAYERS, CHUNK_TOKENS, HEADS * 2 * HEAD_DIM],
    "packed-3d": [LAYERS, CHUNK_TOKENS, HEADS * 2 * HEAD_DIM],
}
CONFIG = L2Config(num_kv_heads=HEADS, head_dim=HEAD_DIM)


class MemoryObject:
    """An object of LMCache: its tensors and what they are."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def get_shapes(self) -> list[torch.Size]:
        return [tensor.shape for tensor in self.tensors]

    def get_dtypes(self) -> list[torch.dtype]:
        return [tensor.dtype for tensor in self.tensors]

    def get_tensor(self, index: int) -> torch.Tensor:
        return self.tensors[index]


@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str
    kv_rank: int = 0x01000101
    object_group_id: int = 0
    cache_salt: str = ""


def make_keys(model: str, num_chunks: int, **fields: Any) -> list[ObjectKey]:
    return [ObjectKey(bytes([i]) * 32, model, **fields) for i in range(num_chunks)]


def make_objects(shape: str, num_chunks: int, seed: int | None) -> list[MemoryObject]:
    if seed is None:
        return [
            MemoryObject(torch.full(SHAPES[shape], torch.nan, dtype=torch.bfloat16))
            for _ in range(num_chunks)
        ]
    generator = torch.Generator().manual_seed(seed)
    return [
        MemoryObject(torch.randn(SHAPES[shape], generator=generator).to(torch.bfloat16))
        for _ in range(num_chunks)
    ]


def layouts(shape: str, *groups: int) -> dict[int, Any]:
    desc = SimpleNamespace(shapes=[torch.Size(SHAPES[shape])], dtypes=[torch.bfloat16])
    return dict.fromkeys(groups or (0,), desc)


def same(one: list[MemoryObject], other: list[MemoryObject]) -> bool:
    return all(torch.equal(a.tensors[0], b.tensors[0]) for a, b in zip(one, other, strict=True))


@pytest.fixture
def start_store(service: Any) -> Iterator[Callable[..., ObjectStore]]:
    started: list[ObjectStore] = []

    def start(**options: Any) -> ObjectStore:
        options = {"num_kv_heads": HEADS, "head_dim": HEAD_DIM, "lookup_timeout_ms": 5000} | options
        started.append(
            ObjectStore(L2Config.parse("test", {"endpoint": service.endpoint} | options))
        )
        return started[-1]

    yield start
    for store in started:
        store.close()


@pytest.mark.parametrize("shape", list(SHAPES))
def test_objects_come_back_bit_for_bit(start_store: Any, spec: Any, shape: str) -> None:
    store = start_store()
    keys, objects, got = (
        make_keys(spec.model, 5),
        make_objects(shape, 5, 1),
        make_objects(shape, 5, None),
    )
    assert store.lookup(keys, layouts(shape)) == [False] * 5
    assert store.store(keys[:3], objects[:3]) == [True] * 3
    assert store.lookup(keys, layouts(shape)) == [True, True, True, False, False]
    assert store.load(keys, got) == [True, True, True, False, False]
    assert same(got[:3], objects[:3])
    assert torch.isnan(got[3].tensors[0]).all()
    assert store.load(keys[1:3], got[3:]) == [True, True]
    assert same(got[3:], objects[1:3])


def test_the_shapes_hold_the_same_keys_and_values(start_store: Any, spec: Any) -> None:
    split = make_objects("split", 1, 1)[0].tensors[0]
    keys, values = (side.unflatten(-1, (HEADS, HEAD_DIM)) for side in split)
    packed = torch.cat([keys, values], dim=-1).flatten(-2)
    assert list(packed.shape) == SHAPES["packed-3d"]
    start_store().store(make_keys(spec.model, 1), [MemoryObject(packed)])
    got = make_objects("split", 1, None)
    assert start_store().load(make_keys(spec.model, 1), got) == [True]
    assert torch.equal(got[0].tensors[0], split)


def test_ranks_groups_and_salts_of_one_call_are_told_apart(start_store: Any, spec: Any) -> None:
    store = start_store()
    rows = [
        make_keys(spec.model, 2, kv_rank=0x02000200),
        make_keys(spec.model, 2, kv_rank=0x02010201),
        make_keys(spec.model, 2, kv_rank=0x02010201, object_group_id=1),
        make_keys(spec.model, 2, kv_rank=0x02010201, cache_salt="tenant"),
        make_keys(f"{spec.model}-other", 2, kv_rank=0x02000200),
    ]
    # As LMCache flattens them: chunk after chunk, or row after row.
    keys = [row[chunk] for chunk in range(2) for row in rows]
    objects, got = make_objects("packed", 10, 1), make_objects("packed", 10, None)
    assert store.store(keys[:8], objects[:8]) == [True] * 8
    found = store.lookup(keys, layouts("packed", 0, 1))
    assert found == [True] * 8 + [False] * 2
    assert store.load(keys, got) == found
    assert same(got[:8], objects[:8])
    assert store.lookup([key for row in rows for key in row], layouts("packed", 0, 1)) == [
        True, True, True, True, True, True, True, False, True, False,
    ]  # fmt: skip
    assert store.lookup(rows[2], layouts("packed", 0)) == [False, False]


@pytest.mark.parametrize("options", [{"revision": "2"}, {"salt": "s"}, {"tenant": "t"}], ids=str)
def test_options_separate_servers(start_store: Any, spec: Any, options: Any) -> None:
    keys = make_keys(spec.model, 1)
    start_store().store(keys, make_objects("split", 1, 1))
    assert start_store().lookup(keys, layouts("split")) == [True]
    assert start_store(**options).lookup(keys, layouts("split")) == [False]


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(2, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM + 32)],
        [torch.zeros(1, LAYERS, CHUNK_TOKENS, HEADS * HEAD_DIM)],
        [torch.zeros(LAYERS, CHUNK_TOKENS, 576)],
        [torch.zeros(SHAPES["split"], dtype=torch.uint8)],
        [torch.zeros(1000, dtype=torch.uint8)],
        [torch.zeros(SHAPES["split"]), torch.zeros(SHAPES["split"])],
        [torch.zeros(2, LAYERS, 7, HEADS * HEAD_DIM)],
    ],
    ids=["width", "one-plane", "latent", "uint8", "bytes", "two-tensors", "seven-tokens"],
)
def test_what_holds_no_keys_and_values_is_missing_and_logged_once(
    start_store: Any, spec: Any, tensors: list[torch.Tensor], caplog: Any
) -> None:
    store, objects, keys = start_store(), [MemoryObject(*tensors)], make_keys(spec.model, 1)
    assert store.store(keys, objects) == [False]
    assert store.load(keys, objects) == [False]
    desc = SimpleNamespace(shapes=objects[0].get_shapes(), dtypes=objects[0].get_dtypes())
    assert store.lookup(keys, {0: desc}) == [False]
    assert len(caplog.records) == 1
    assert "cannot store objects" in caplog.text


def test_a_rank_beyond_its_world_is_missing(start_store: Any, spec: Any, caplog: Any) -> None:
    keys = make_keys(spec.model, 1, kv_rank=0x01020102)
    assert start_store().store(keys, make_objects("split", 1, 1)) == [False]
    assert "tp_rank" in caplog.text


def test_a_store_that_is_away_is_a_miss(start_store: Any, spec: Any) -> None:
    store = start_store(endpoint="grpc://127.0.0.1:9")
    keys, objects = make_keys(spec.model, 2), make_objects("split", 2, 1)
    assert store.store(keys, objects) == [False, False]
    assert store.is_away
    assert store.lookup(keys, layouts("split")) == [False, False]
    assert store.load(keys, objects) == [False, False]


def test_values_may_be_narrower_than_keys() -> None:
    config = L2Config(num_kv_heads=2, head_dim=64, v_head_dim=32)
    tensor = torch.arange(LAYERS * 8 * 2 * 96, dtype=torch.float32).view(LAYERS, 8, 2 * 96)
    layout = object_layout([tensor.shape], [tensor.dtype], config)
    keys, values = object_block(tensor, layout)
    assert (keys.shape, values.shape) == ((LAYERS, 8, 2, 64), (LAYERS, 8, 2, 32))
    assert keys[1, 2, 1].tolist() == tensor[1, 2, 96 : 96 + 64].tolist()
    assert values[1, 2, 1].tolist() == tensor[1, 2, 96 + 64 :].tolist()
    with pytest.raises(LayoutMismatchError, match="must be"):
        object_layout([SHAPES["split"]], [torch.float16], config)


def test_options_and_keys() -> None:
    with pytest.raises(InvalidRequestError, match=r"endpont.*options are endpoint"):
        L2Config.parse("adapter_params", {"num_kv_heads": 1, "head_dim": 64, "endpont": "x"})
    with pytest.raises(InvalidRequestError, match="head_dim"):
        L2Config.parse("adapter_params", {"num_kv_heads": 1})
    assert block_key(ObjectKey(b"k" * 32, "m")) == b"k" * 32
    assert len(block_key(ObjectKey(b"k" * 65, "m"))) == 32
