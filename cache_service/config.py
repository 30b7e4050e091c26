"""Configuration of the service: flag over `POLARCACHE_*` variable over YAML file over default."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

__all__ = ["ConfigError", "ServiceConfig", "load_config"]

ENV_PREFIX = "POLARCACHE_"
CONFIG_FILE_VARIABLE = "POLARCACHE_CONFIG_FILE"

# Read by other parts of the product, not by the service.
_OTHER_VARIABLES = {CONFIG_FILE_VARIABLE, "POLARCACHE_ENDPOINT"}


class ConfigError(ValueError):
    """A setting is unknown or out of range; the message names it and says what was expected."""


class ServiceConfig(BaseSettings):
    """Settings of `polarcache serve`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        50061, description="TCP port to listen on; 0 picks a free one and logs it."
    )
    device: str = Field(
        "auto", description='Device of the memory tier: "cpu", "cuda", "cuda:N", or "auto".'
    )
    memory: Annotated[ByteSize, Field(ge=1 << 16)] = Field(
        ByteSize(1 << 30), description='Bytes of the memory tier, such as "512MiB" or "40GiB".'
    )
    redis: str = Field(
        "embedded",
        description='"embedded" starts a private redis-server; "off" runs without; or a '
        "redis://, rediss://, unix:// or redis+cluster:// URL.",
    )
    redis_timeout_ms: Annotated[int, Field(ge=1, le=60_000)] = Field(
        1000, description="Longest wait for one answer of Redis, milliseconds."
    )
    redis_ttl_s: Annotated[int, Field(ge=1)] = Field(
        86_400,
        description="Life of a record in Redis since it was written or stored again, seconds.",
    )
    redis_memory: Annotated[ByteSize, Field(ge=1 << 20)] = Field(
        ByteSize(4 << 30), description="Most bytes the embedded Redis may use; it evicts by LRU."
    )
    state_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_state_dir("polarcache")),
        description="Directory of the embedded Redis and of the local socket.",
    )
    shared_memory: bool = Field(
        True, description="Offer shared memory to workers on the same host."
    )
    shared_memory_limit: Annotated[ByteSize, Field(ge=1 << 20)] = Field(
        ByteSize(4 << 30), description="Most bytes of shared memory that all workers may hand over."
    )
    frame_bytes: Annotated[ByteSize, Field(ge=1 << 16, le=32 << 20)] = Field(
        ByteSize(2 << 20), description="Payload bytes of one message."
    )
    max_message_bytes: Annotated[ByteSize, Field(ge=1 << 20, le=1 << 30)] = Field(
        ByteSize(64 << 20), description="Longest message taken, bytes."
    )
    max_blocks_per_call: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        16_384, description="Most block keys in one call."
    )
    lease_ms: Annotated[int, Field(ge=1)] = Field(
        30_000, description="Life of a lease whose worker asks for none, milliseconds."
    )
    max_lease_ms: Annotated[int, Field(ge=1)] = Field(
        300_000, description="Longest lease granted, milliseconds."
    )
    stream_idle_ms: Annotated[int, Field(ge=1)] = Field(
        30_000, description="A stream whose worker is silent for so long is ended, milliseconds."
    )
    cpu_threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="Threads for codec and storage work, each using one core."
    )
    attend_queue: Annotated[int, Field(ge=1)] = Field(
        1024, description="Attention requests that may wait; further ones are refused."
    )
    attend_batch: Annotated[int, Field(ge=1, le=4096)] = Field(
        256, description="Most attention requests that are computed in one launch."
    )
    attend_window_us: Annotated[int, Field(ge=0, le=200)] = Field(
        200,
        description="Longest wait for requests of other streams to join a launch, microseconds; "
        "none when no other is due.",
    )
    drain_timeout_s: Annotated[float, Field(ge=0)] = Field(
        20.0, description="On SIGTERM, time to finish calls and copy memory to Redis, seconds."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags first, then variables, then the file."""
        path = os.environ.get(CONFIG_FILE_VARIABLE)
        if not path:
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, Path(path))


def load_config(flags: dict[str, Any]) -> ServiceConfig:
    """The resolved configuration.

    Args:
        flags: Settings given on the command line, by field name.

    Raises:
        ConfigError: A variable, file key or value is unknown or out of range.
    """
    known = set(ServiceConfig.model_fields)
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable not in _OTHER_VARIABLES:
            _check_known(variable, {ENV_PREFIX + name.upper() for name in known})
    path = os.environ.get(CONFIG_FILE_VARIABLE)
    if path and not Path(path).is_file():
        raise ConfigError(f"{CONFIG_FILE_VARIABLE} names {path}, which is no file")
    try:
        return ServiceConfig(**flags)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item, known) for item in error.errors())) from error


def _explain(item: Any, known: set[str]) -> str:
    name = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        try:
            _check_known(name, known)
        except ConfigError as error:
            return str(error)
    return f"{name}: {item['msg']}, got {item.get('input')!r}"


def _check_known(name: str, known: set[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"unknown setting {name}{hint}")
