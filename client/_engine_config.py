"""Options that the SGLang and LMCache integrations share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polarcache.client._channel import DEFAULT_ENDPOINT
from polarcache.client._engine_store import StoreLimits
from polarcache.proto.errors import InvalidRequestError

__all__ = ["EngineConfig"]


class EngineConfig(BaseModel):
    """How one engine uses the store.

    Every engine that shall share blocks needs the same `revision`, `tenant`, `salt`, `profile`,
    RoPE options and block size; the rest may differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str = Field(DEFAULT_ENDPOINT, description="grpc://host:port or grpc+unix:///path.")
    revision: str = Field("", description="Fingerprint of the weights.")
    tenant: str = Field("", description="Whose blocks these are.")
    salt: str = Field("", description="Extra separation, such as a secret per user group.")
    profile: str = Field("exact", description='Codec profile, such as "k=pair:r4t4,v=int4".')
    calibration_file: str = Field(
        "", description="File of `polarcache calibrate`, for profiles that name a calibration."
    )
    rope_pairing: Literal["half", "interleaved"] = Field(
        "half", description="Channels that RoPE turns together: half for Llama, Qwen, Mistral."
    )
    rotary_dim: int = Field(
        -1, ge=-1, description="Leading channels that RoPE turns; -1 for all, 0 without RoPE."
    )
    pack: Literal["service", "worker"] = Field(
        "service", description="Where the codec runs; worker sends packed bytes."
    )
    lookup_timeout_ms: int = Field(
        500, ge=1, le=60_000, description="A lookup without an answer by then is a miss."
    )
    transfer_timeout_ms: int = Field(
        10_000, ge=1, description="A load or store that is not done by then is given up."
    )
    retry_ms: int = Field(2_000, ge=10, description="So long a store that was away is left alone.")
    shared_memory_bytes: int = Field(
        64 << 20, ge=0, description="Memory shared with a store on the same host; 0 for none."
    )

    @classmethod
    def parse(cls, source: str, options: Mapping[str, Any]) -> Self:
        """Reads options.

        Args:
            source: Where they were given, for the message.
            options: The options by name.

        Raises:
            InvalidRequestError: A name is unknown, or a value is missing or out of range.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}"
                for one in error.errors()
            )
            raise InvalidRequestError(
                f"{source}: {problems}; the options are {', '.join(cls.model_fields)}"
            ) from error

    def limits(self) -> StoreLimits:
        """Deadlines and resources."""
        return StoreLimits(
            lookup_timeout_s=self.lookup_timeout_ms / 1000,
            transfer_timeout_s=self.transfer_timeout_ms / 1000,
            retry_s=self.retry_ms / 1000,
            pack=self.pack,
            shared_memory_bytes=self.shared_memory_bytes,
        )

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
            raise InvalidRequestError(f"calibration_file: {error}") from error
