"""The connector's options: `polarcache.*` keys of vLLM's kv_connector_extra_config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polarcache.client._channel import DEFAULT_ENDPOINT, grpc_target
from polarcache.proto.errors import InvalidRequestError

__all__ = ["ConnectorConfig"]

_PREFIX = "polarcache."


class ConnectorConfig(BaseModel):
    """How one engine uses the store.

    Every engine that shall share blocks needs the same `model`, `revision`, `tenant`, `salt`,
    `profile` and `block_tokens`; the rest may differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str = Field(DEFAULT_ENDPOINT, description="grpc://host:port or grpc+unix:///path.")
    model: str = Field("", description="Model name in the store; empty for the served name.")
    revision: str = Field(
        "",
        description="Fingerprint of the weights; empty for one computed from the model's files.",
    )
    tenant: str = Field("", description="Whose blocks these are.")
    salt: str = Field("", description="Extra separation, such as a secret per user group.")
    profile: str = Field("exact", description='Codec profile, such as "k=pair:r4t4,v=int4".')
    calibration_file: str = Field(
        "", description="File of `polarcache calibrate`, for profiles that name a calibration."
    )
    block_tokens: int = Field(
        0,
        ge=0,
        le=1024,
        description="Tokens of a stored block, a multiple of the engine's block size; 0 for 128 "
        "where that is one, else the engine's.",
    )
    rope_pairing: Literal["auto", "half", "interleaved"] = Field(
        "auto", description="Channels that RoPE turns together; auto asks the model's config."
    )
    rotary_dim: int = Field(
        -1, ge=-1, description="Leading channels that RoPE turns; -1 asks the model's config."
    )
    pack: Literal["service", "worker"] = Field(
        "service", description="Where the codec runs; worker sends packed bytes."
    )
    load: Literal["async", "layerwise"] = Field(
        "async",
        description="async: a request waits outside of the batch until its blocks are there; "
        "layerwise: it is scheduled at once and each layer waits for its own.",
    )
    store_generated: bool = Field(True, description="Whether to store generated tokens too.")
    min_load_tokens: int = Field(
        256, ge=1, description="Load no fewer tokens than this; recompute instead."
    )
    min_load_bytes_per_s: float = Field(
        0.0,
        ge=0,
        description="Recompute while loads bring fewer bytes of keys and values a second.",
    )
    lookup_timeout_ms: int = Field(
        2_000,
        ge=1,
        le=60_000,
        description="A lookup without an answer by then is a miss, and the store counts as away.",
    )
    transfer_timeout_ms: int = Field(
        10_000, ge=1, description="A load or store that is not done by then is given up."
    )
    retry_ms: int = Field(
        2_000, ge=10, description="Pause between attempts to reach a store that is not there."
    )
    lease_ms: int = Field(60_000, ge=1_000, le=300_000, description="Life of a lookup's lease.")
    load_threads: int = Field(2, ge=1, le=64, description="Loads at a time, a worker.")
    store_threads: int = Field(1, ge=1, le=64, description="Stores at a time, a worker.")
    max_pinned: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Part of the engine's cache blocks that waiting stores may keep from reuse; "
        "beyond it blocks are not stored.",
    )
    shared_memory_bytes: int = Field(
        64 << 20, ge=0, description="Memory shared with a store on the same host; 0 for none."
    )

    @classmethod
    def from_extra_config(cls, extra_config: Mapping[str, Any]) -> ConnectorConfig:
        """Reads the options.

        Args:
            extra_config: vLLM's kv_connector_extra_config; every key starts with `polarcache.`.

        Raises:
            InvalidRequestError: A key is unknown or a value is out of range.
        """
        known = ", ".join(f"{_PREFIX}{name}" for name in cls.model_fields)
        options = {}
        for key, value in extra_config.items():
            name = key.removeprefix(_PREFIX)
            if name == key or name not in cls.model_fields:
                raise InvalidRequestError(
                    f"kv_connector_extra_config has no option {key!r}; expected some of: {known}"
                )
            options[name] = value
        try:
            config = cls(**options)
        except ValidationError as error:
            problems = "; ".join(
                f"{_PREFIX}{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}"
                for one in error.errors()
            )
            raise InvalidRequestError(f"kv_connector_extra_config: {problems}") from error
        grpc_target(config.endpoint)
        return config

    def calibration(self) -> str:
        """Text of the calibration file, empty without one.

        Raises:
            InvalidRequestError: The file cannot be read.
        """
        if not self.calibration_file:
            return ""
        try:
            return Path(self.calibration_file).read_text()
        except OSError as error:
            raise InvalidRequestError(f"{_PREFIX}calibration_file: {error}") from error
