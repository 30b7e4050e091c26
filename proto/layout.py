"""What a namespace is: identity, geometry, codec profile, and its id."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast

from polarcache.proto.errors import InvalidRequestError
from polarcache.proto.v1 import polarcache_pb2 as pb

__all__ = ["DTYPE_BYTES", "KvLayout", "NamespaceSpec", "RopePairing"]

RopePairing = Literal["half", "interleaved"]

_MAX_CALIBRATION_BYTES = 1 << 20
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_DTYPES = {
    "float16": pb.DTYPE_FLOAT16,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float32": pb.DTYPE_FLOAT32,
}
_PAIRINGS = {"half": pb.ROPE_PAIRING_HALF, "interleaved": pb.ROPE_PAIRING_INTERLEAVED}
_DTYPE_NAMES = {number: name for name, number in _DTYPES.items()}
_PAIRING_NAMES = {number: name for name, number in _PAIRINGS.items()}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one block of a model's key/value cache, on one rank.

    Attributes:
        num_layers: Attention layers, 1 to 1024.
        num_kv_heads: Key/value heads, 1 to 1024.
        head_dim: Channels of a key, a multiple of 16 from 16 to 256.
        v_head_dim: Channels of a value, likewise; 0 means `head_dim`.
        dtype: "float16", "bfloat16" or "float32".
        block_tokens: Tokens in a block, a multiple of 8 from 8 to 1024.
        rope_pairing: Channels that RoPE rotates together: "half" (j with j + rotary_dim / 2) or
            "interleaved" (2j with 2j + 1).
        rotary_dim: Leading channels that RoPE rotates; -1 means all of `head_dim`, 0 none.

    Raises:
        InvalidRequestError: A field is out of range.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int = 0
    dtype: str = "float16"
    block_tokens: int = 128
    rope_pairing: RopePairing = "half"
    rotary_dim: int = -1

    def __post_init__(self) -> None:
        """Fills in what was left to its default and checks every field."""
        if self.v_head_dim == 0:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        if self.rotary_dim == -1:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        for name in ("num_layers", "num_kv_heads"):
            _check(name, getattr(self, name), 1, 1024, 1)
        for name in ("head_dim", "v_head_dim"):
            _check(name, getattr(self, name), 16, 256, 16)
        _check("block_tokens", self.block_tokens, 8, 1024, 8)
        _check("rotary_dim", self.rotary_dim, 0, self.head_dim, 2)
        if self.dtype not in _DTYPES:
            raise InvalidRequestError(f"dtype must be one of {list(_DTYPES)}, got {self.dtype!r}")
        if self.rope_pairing not in _PAIRINGS:
            raise InvalidRequestError(
                f"rope_pairing must be one of {list(_PAIRINGS)}, got {self.rope_pairing!r}"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def raw_key_bytes(self) -> int:
        """Bytes of the keys of one RAW slice."""
        return self.block_tokens * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def raw_value_bytes(self) -> int:
        """Bytes of the values of one RAW slice."""
        return self.block_tokens * self.num_kv_heads * self.v_head_dim * self.element_bytes

    @property
    def raw_slice_bytes(self) -> int:
        """Bytes of one RAW slice: one layer of one block, keys then values."""
        return self.raw_key_bytes + self.raw_value_bytes

    @property
    def raw_block_bytes(self) -> int:
        """Bytes of one RAW block: its slices, layer after layer."""
        return self.raw_slice_bytes * self.num_layers

    def to_proto(self) -> pb.Geometry:
        """The message form."""
        return pb.Geometry(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            dtype=_DTYPES[self.dtype],
            block_tokens=self.block_tokens,
            rope_pairing=_PAIRINGS[self.rope_pairing],
            rotary_dim=self.rotary_dim,
        )

    @classmethod
    def from_proto(cls, message: pb.Geometry) -> KvLayout:
        """From the message form, every field checked.

        Raises:
            InvalidRequestError: A field is missing or out of range.
        """
        return cls(
            num_layers=message.num_layers,
            num_kv_heads=message.num_kv_heads,
            head_dim=message.head_dim,
            v_head_dim=message.v_head_dim,
            dtype=_DTYPE_NAMES.get(message.dtype, f"Dtype {message.dtype}"),
            block_tokens=message.block_tokens,
            rope_pairing=cast(
                RopePairing,
                _PAIRING_NAMES.get(message.rope_pairing, f"RopePairing {message.rope_pairing}"),
            ),
            rotary_dim=message.rotary_dim,
        )


@dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """Everything that must be equal for two workers to share bytes.

    Attributes:
        model: Model name as the fleet knows it, 1 to 256 bytes of UTF-8.
        layout: Shape of a block.
        profile: Codec profile, such as "exact" or "k=pair:r4t4,v=int4".
        revision: Fingerprint of the weights.
        lora: Name and version of the LoRA adapter, "" for none.
        tenant: Whose blocks these are, "" for the shared default tenant.
        salt: Extra separation, such as a secret per user group.
        tp_rank: Tensor-parallel rank, below `tp_size`.
        tp_size: Tensor-parallel world size.
        pp_rank: Pipeline-parallel rank, below `pp_size`.
        pp_size: Pipeline-parallel world size.
        calibration: Text of the calibration that the profile names, "" for none.

    Raises:
        InvalidRequestError: A field is out of range.
    """

    model: str
    layout: KvLayout
    profile: str = "exact"
    revision: str = ""
    lora: str = ""
    tenant: str = ""
    salt: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    calibration: str = ""

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("model", "revision", "lora", "tenant", "salt", "profile"):
            length = len(getattr(self, name).encode())
            if length > 256 or (length == 0 and name in ("model", "profile")):
                least = 1 if name in ("model", "profile") else 0
                raise InvalidRequestError(
                    f"{name} must be {least} to 256 bytes of UTF-8, got {length} bytes"
                )
        if len(self.calibration) > _MAX_CALIBRATION_BYTES:
            raise InvalidRequestError(
                f"calibration must be at most {_MAX_CALIBRATION_BYTES} bytes, got "
                f"{len(self.calibration)}"
            )
        for kind in ("tp", "pp"):
            rank, world = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            if not 0 <= rank < world <= 65536:
                raise InvalidRequestError(
                    f"{kind}_rank must be below {kind}_size, at most 65536: got {rank} of {world}"
                )

    @property
    def model_identity(self) -> tuple[str | int, ...]:
        """What names one set of weights on one rank: it has one geometry."""
        return (
            self.model, self.revision, self.lora, self.tenant, self.salt,
            self.tp_rank, self.tp_size, self.pp_rank, self.pp_size,
        )  # fmt: skip

    def namespace_id(self, layout_version: int, calibration_digest: str = "") -> bytes:
        """First 16 bytes of the SHA-256 of the canonical form.

        Args:
            layout_version: Version of the packed layout, so that another version's blocks miss.
            calibration_digest: What stands for the calibration, whose text holds remarks too.
        """
        facts = asdict(self) | {"calibration": calibration_digest}
        canonical = json.dumps(
            {"schema": 1, "layout_version": layout_version, **facts},
            sort_keys=True,
            separators=(",", ":"),
        )
        return hashlib.sha256(canonical.encode()).digest()[:16]

    def with_profile(self, profile: str) -> NamespaceSpec:
        """The same namespace with another codec profile."""
        return replace(self, profile=profile)

    def to_proto(self) -> pb.Namespace:
        """The message form."""
        return pb.Namespace(
            model=self.model,
            revision=self.revision,
            lora=self.lora,
            tenant=self.tenant,
            salt=self.salt,
            tp_rank=self.tp_rank,
            tp_size=self.tp_size,
            pp_rank=self.pp_rank,
            pp_size=self.pp_size,
            geometry=self.layout.to_proto(),
            profile=self.profile,
            calibration=self.calibration,
        )

    @classmethod
    def from_proto(cls, message: pb.Namespace) -> NamespaceSpec:
        """From the message form, every field checked.

        Raises:
            InvalidRequestError: A field is missing or out of range.
        """
        return cls(
            model=message.model,
            layout=KvLayout.from_proto(message.geometry),
            profile=message.profile,
            revision=message.revision,
            lora=message.lora,
            tenant=message.tenant,
            salt=message.salt,
            tp_rank=message.tp_rank,
            tp_size=message.tp_size or 1,
            pp_rank=message.pp_rank,
            pp_size=message.pp_size or 1,
            calibration=message.calibration,
        )


def _check(name: str, value: int, least: int, most: int, step: int) -> None:
    if not isinstance(value, int) or not least <= value <= most or value % step:
        multiple = f" and a multiple of {step}" if step > 1 else ""
        raise InvalidRequestError(f"{name} must be {least} to {most}{multiple}, got {value}")
