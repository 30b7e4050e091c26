"""The namespace of a model: what two workers must have in common to share keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import PreTrainedConfig, PreTrainedModel

from polarcache.proto.errors import InvalidRequestError, LayoutMismatchError, UnsupportedError
from polarcache.proto.layout import KvLayout, NamespaceSpec, RopePairing

__all__ = ["check_layout", "kv_layout", "namespace_spec", "weights_digest"]

# Models that are tested, all of which rotate channel j with channel j + rotary_dim / 2.
_HALF_PAIRED = ("llama", "qwen2", "qwen3")
# Their keys depend on the length of the whole context, so that equal prefixes differ.
_CHANGING_ROPE = ("dynamic", "longrope")


def namespace_spec(
    model: PreTrainedModel,
    *,
    name: str = "",
    revision: str = "",
    profile: str = "exact",
    block_tokens: int = 128,
    dtype: str = "",
    rope_pairing: RopePairing | None = None,
    lora: str = "",
    tenant: str = "",
    salt: str = "",
    calibration: str = "",
) -> NamespaceSpec:
    """The namespace of a model's keys and values.

    Args:
        model: A causal language model.
        name: What the fleet calls it; "" for its name on the Hub, or of its directory.
        revision: What tells its weights from others'; "" for `weights_digest`, which reads all
            of them once.
        profile: Codec profile, such as "exact" or "k=pair:r4t4,v=int4".
        block_tokens: Tokens of a block.
        dtype: Type in which blocks travel, and are stored by `exact`; "" for the model's.
        rope_pairing: Which channels RoPE rotates together; None where the model type is known.
        lora: As in `NamespaceSpec`; so are the rest.
        tenant: Whose blocks these are.
        salt: Extra separation.
        calibration: Text of the calibration that the profile names.

    Raises:
        UnsupportedError: The model's pairing is not known, or its keys depend on more than the
            tokens before them.
        InvalidRequestError: A value is out of range.
    """
    config = model.config
    layout = kv_layout(model, block_tokens=block_tokens, dtype=dtype, rope_pairing=rope_pairing)
    return NamespaceSpec(
        model=name or _name_of(config),
        revision=revision or weights_digest(model),
        layout=layout,
        profile=profile,
        lora=lora,
        tenant=tenant,
        salt=salt,
        calibration=calibration,
    )


def kv_layout(
    model: PreTrainedModel,
    *,
    block_tokens: int = 128,
    dtype: str = "",
    rope_pairing: RopePairing | None = None,
) -> KvLayout:
    """The shape of a block of a model's keys and values; arguments as for `namespace_spec`.

    Raises:
        UnsupportedError: The model's pairing is not known, or its keys depend on more than the
            tokens before them.
        InvalidRequestError: A value is out of range.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _CHANGING_ROPE:
        raise UnsupportedError(
            f"RoPE of type {rope['rope_type']!r} makes keys depend on the length of the context: "
            "they cannot be shared"
        )
    if rope_pairing is None:
        if config.model_type not in _HALF_PAIRED:
            raise UnsupportedError(
                f"model type {config.model_type!r} is not among {list(_HALF_PAIRED)}: say its "
                "rope_pairing"
            )
        rope_pairing = "half"
    head_dim = _head_dim(config)
    return KvLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        dtype=dtype or str(model.dtype).removeprefix("torch."),
        block_tokens=block_tokens,
        rope_pairing=rope_pairing,
        rotary_dim=int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2 * 2,
    )


def check_layout(layout: KvLayout, model: PreTrainedModel) -> None:
    """Checks that a namespace is of a model's shape.

    Raises:
        LayoutMismatchError: It is not.
    """
    config = model.config.get_text_config(decoder=True)
    expected = (config.num_hidden_layers, config.num_key_value_heads, _head_dim(config))
    found = (layout.num_layers, layout.num_kv_heads, layout.head_dim)
    if found != expected or layout.v_head_dim != layout.head_dim:
        raise LayoutMismatchError(
            f"the namespace has (layers, KV heads, head_dim) = {found} and v_head_dim "
            f"{layout.v_head_dim}, the model {expected}"
        )


def weights_digest(model: PreTrainedModel) -> str:
    """32 hexadecimal digits that differ for other weights, RoPE parameters or windows.

    Reads every weight, adapters included: seconds for billions of parameters.

    Raises:
        InvalidRequestError: Weights are not loaded.
    """
    config = model.config.get_text_config(decoder=True)
    shaping = {
        name: getattr(config, name, None)
        for name in ("rope_parameters", "layer_types", "sliding_window")
    }
    digest = xxhash.xxh3_128(json.dumps(shaping, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise InvalidRequestError(f"weight {name} is not loaded: say the model's revision")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _head_dim(config: PreTrainedConfig) -> int:
    given: int | None = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def _name_of(config: Any) -> str:
    path = str(config._name_or_path or config.model_type)
    return Path(path).resolve().name if Path(path).is_dir() else path
