"""Namespaces opened since the service started."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from polarcache.cache_service.codec import BlockCodec
from polarcache.kernels.calibration import Calibration
from polarcache.kernels.errors import CalibrationError, CodecError
from polarcache.kernels.layout import LAYOUT_VERSION
from polarcache.kernels.profile import Profile
from polarcache.proto.errors import (
    InvalidRequestError,
    LayoutMismatchError,
    NamespaceUnknownError,
)
from polarcache.proto.layout import KvLayout, NamespaceSpec

__all__ = ["Namespace", "NamespaceRegistry"]

# Geometry that follows from the model's weights; dtype, block size and profile are choices.
_INTRINSIC = ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "rope_pairing", "rotary_dim")


@dataclass(frozen=True, slots=True)
class Namespace:
    """An open namespace.

    Attributes:
        namespace_id: 16 bytes.
        spec: Its definition, with the profile in canonical spelling.
        codec: Turns its blocks into packed form and back.
    """

    namespace_id: bytes
    spec: NamespaceSpec
    codec: BlockCodec


class NamespaceRegistry:
    """Open namespaces by id. Thread-safe.

    Args:
        device: Device of the memory tier, where codecs run.
        max_slice_bytes: Longest RAW slice that fits one message.
    """

    def __init__(self, device: torch.device, max_slice_bytes: int) -> None:
        self._device = device
        self._max_slice_bytes = max_slice_bytes
        self._lock = threading.Lock()
        self._by_id: dict[bytes, Namespace] = {}
        self._layout_of_model: dict[tuple[str | int, ...], KvLayout] = {}

    def open(self, spec: NamespaceSpec) -> Namespace:
        """Registers a namespace, or finds it registered.

        Raises:
            InvalidRequestError: The profile is unknown or does not fit the geometry.
            LayoutMismatchError: The model identity was opened with another geometry.
        """
        layout = spec.layout
        if layout.raw_slice_bytes > self._max_slice_bytes:
            raise InvalidRequestError(
                f"one layer of one block is {layout.raw_slice_bytes} bytes; this service takes "
                f"at most {self._max_slice_bytes}: use fewer block_tokens"
            )
        try:
            profile = Profile.parse(spec.profile)
            spec = spec.with_profile(str(profile))
            calibration = _calibration(profile, spec.calibration)
            codec = BlockCodec(profile, layout, self._device, calibration)
        except CodecError as error:
            raise InvalidRequestError(f"profile {spec.profile!r}: {error}") from error
        digest = calibration.digest if calibration else ""
        namespace = Namespace(spec.namespace_id(LAYOUT_VERSION, digest), spec, codec)
        with self._lock:
            first = self._layout_of_model.setdefault(spec.model_identity, layout)
            _check_same_model(spec.model, first, layout)
            return self._by_id.setdefault(namespace.namespace_id, namespace)

    def get(self, namespace_id: bytes) -> Namespace:
        """An open namespace.

        Raises:
            NamespaceUnknownError: It was not opened since the service started.
        """
        namespace = self._by_id.get(namespace_id)
        if namespace is None:
            raise NamespaceUnknownError(
                f"namespace {namespace_id.hex() or '(empty)'} was not opened since the service "
                "started; open it again"
            )
        return namespace

    def all(self) -> list[Namespace]:
        """All of them, in the order of opening."""
        with self._lock:
            return list(self._by_id.values())


def _check_same_model(model: str, first: KvLayout, layout: KvLayout) -> None:
    differing = [name for name in _INTRINSIC if getattr(first, name) != getattr(layout, name)]
    if differing:
        details = ", ".join(
            f"{name} {getattr(layout, name)!r}, before {getattr(first, name)!r}"
            for name in differing
        )
        raise LayoutMismatchError(
            f"model {model!r} was opened with another geometry: {details}; give other weights "
            "another model or revision"
        )


def _calibration(profile: Profile, text: str) -> Calibration | None:
    if bool(profile.calibration) != bool(text):
        raise CalibrationError(
            f"the profile names calibration {profile.calibration!r}; expected its text with the "
            "namespace"
            if profile.calibration
            else "a calibration came, but the profile names none"
        )
    return Calibration.parse(text) if text else None
