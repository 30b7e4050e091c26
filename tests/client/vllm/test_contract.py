"""The connector against the real vLLM's classes, where vLLM is installed."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, supports_hma
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED, KVCacheBlock
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from polarcache.client.vllm import PolarCacheConnector
from polarcache.client.vllm.connector import ReportMetadata, StepMetadata
from polarcache.client.vllm.layouts import TransposedKeys
from polarcache.client.vllm.plan import LeasedPrefix, LoadJob, StepPlan, StoreJob, WorkerReport
from polarcache.proto.layout import KvLayout

TRANSFER: dict[str, Any] = {
    "kv_connector": "PolarCacheConnector",
    "kv_connector_module_path": "polarcache.client.vllm",
    "kv_role": "kv_both",
}


def test_vllm_finds_the_connector_by_its_module_path() -> None:
    config = KVTransferConfig(**TRANSFER)
    assert KVConnectorFactory.get_connector_class(config) is PolarCacheConnector
    assert KVConnectorFactory.supports_hma_config(config)
    assert supports_hma(PolarCacheConnector)
    assert not inspect.isabstract(PolarCacheConnector)


def test_every_method_takes_what_vllm_passes() -> None:
    for name in vars(PolarCacheConnector):
        base = getattr(KVConnectorBase_V1, name, None)
        if name.startswith("_") or base is None or not callable(base):
            continue
        mine = inspect.signature(getattr(PolarCacheConnector, name)).parameters
        theirs = inspect.signature(base).parameters
        assert list(mine) == list(theirs), name


def test_layerwise_loads_ask_for_piecewise_graphs() -> None:
    asks = PolarCacheConnector.requires_piecewise_for_cudagraph
    assert asks({"polarcache.load": "layerwise"})
    assert not asks({})


def test_a_request_has_what_the_scheduler_side_reads() -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(40)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=lambda request: [b"h"] if not request.block_hashes else [],
    )
    assert request.num_tokens == request.num_prompt_tokens == 40
    assert request.num_computed_tokens == 0
    assert not request.skip_reading_prefix_cache
    assert [bytes(one) for one in request.block_hashes] == [b"h"]


def test_a_scheduler_output_has_what_the_scheduler_side_reads() -> None:
    names = {field.name for field in fields(SchedulerOutput)}
    assert {"num_scheduled_tokens", "kv_connector_block_state"} <= names
    state = KVConnectorBlockState({"r"}, {"r": ([4, 5],)}.__getitem__, {})
    assert state.get_block_ids("r") == ([4, 5],)


def test_a_block_pool_counts_references() -> None:
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=16)
    blocks: list[KVCacheBlock] = pool.get_new_blocks(2)
    pool.touch(blocks)
    pool.free_blocks(blocks)
    assert [pool.blocks[block.block_id].ref_cnt for block in blocks] == [1, 1]


def test_an_attention_spec_has_what_names_a_cache() -> None:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16)
    assert (spec.head_size_v, spec.tokens_per_state, spec.num_head_slots) == (64, 1, None)
    assert spec.kv_quant_mode.name == "NONE"
    assert spec.state_content_size_bytes == 128 * 2


def test_the_default_hash_seed_is_the_one_we_name() -> None:
    from polarcache.client.vllm import identity

    assert identity._DEFAULT_HASH_SEED == DEFAULT_NONE_HASH_SEED


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("head_dim", "block_tokens"), [(64, 32), (128, 128)])
def test_the_cpu_cache_is_laid_out_as_we_take_it(
    dtype: str, head_dim: int, block_tokens: int
) -> None:
    def write(*tensors: torch.Tensor) -> None:
        ops.cpu_attn_reshape_and_cache(*tensors, "vec")

    layout = KvLayout(
        num_layers=1, num_kv_heads=2, head_dim=head_dim, dtype=dtype, block_tokens=block_tokens
    )
    TransposedKeys(write).check(layout, block_tokens)


def test_what_travels_between_processes_survives_it() -> None:
    plan = StepPlan(
        loads=(LoadJob("r", (LeasedPrefix(b"l", 5, 3),), 0, 3, 16, (1, 2), is_async=True),),
        stores=(StoreJob(1, "r", (b"k",), (4,)),),
    )
    # vLLM pickles its own messages between its processes.
    assert pickle.loads(pickle.dumps(StepMetadata(plan))).plan == plan
    one = ReportMetadata(WorkerReport(stores={1: 1}))
    total = one.aggregate(ReportMetadata(WorkerReport(stores={1: 1}, failed_stores={"r"})))
    assert pickle.loads(pickle.dumps(total)).report == WorkerReport({1: 2}, {"r"})
