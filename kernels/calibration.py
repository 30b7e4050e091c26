"""Energies of a model's queries, by layer, KV head and RoPE pair: what a block cannot know.

Encoders weigh key errors with them. A packed slice carries all that decoding needs, so readers
need no calibration; its digest is part of the profile, so that equal profiles mean equal bytes.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from polarcache.kernels.errors import CalibrationError, ShapeError
from polarcache.kernels.layout import BlockShape
from polarcache.kernels.profile import Profile

FORMAT = "polarcache-calibration-1"
DIGEST_DIGITS = 8
_MAX_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Energies of queries, and which pairs they belong to.

    Attributes:
        query: fp16 [L, Hkv, P], positive, relative to the largest pair of a head.
        pairing: which channels RoPE turns together, `half` or `interleaved`.
        rotary_dim: channels that RoPE turns.
        source: what was run, for people; not part of the digest.

    Raises:
        CalibrationError: the energies are not positive numbers of that shape and dtype.
    """

    query: Tensor
    pairing: str
    rotary_dim: int
    source: str = ""

    def __post_init__(self) -> None:
        """Checks the energies."""
        query = self.query
        if query.dim() != 3 or query.dtype != torch.float16 or not query.numel():
            raise CalibrationError(
                f"energies {query.dtype} {tuple(query.shape)}: expected float16 [layers, heads, "
                "pairs]"
            )
        if not bool((query.isfinite() & (query > 0)).all()):
            raise CalibrationError("energies: expected positive finite numbers")

    @classmethod
    def measured(cls, energies: Tensor, pairing: str, rotary_dim: int, source: str = "") -> Self:
        """Makes a calibration of mean squared queries [L, Hkv, P] of any scale."""
        largest = energies.amax(-1, keepdim=True)
        relative = energies / torch.where(largest > 0, largest, 1.0)
        least = torch.finfo(torch.float16).tiny
        return cls(relative.clamp(min=least).half().cpu(), pairing, rotary_dim, source)

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Reads what `text` writes.

        Raises:
            CalibrationError: it is damaged or of another format.
        """
        try:
            document: Any = json.loads(text)
            if document["format"] != FORMAT:
                raise CalibrationError(f"format {document['format']!r}: expected {FORMAT}")
            shape = [int(size) for size in document["shape"]]
            raw = bytearray(base64.b64decode(document["query"], validate=True))
            if min(shape) < 1 or len(raw) > 2 * _MAX_NUMBERS:
                raise CalibrationError(f"shape {shape}: expected three positive sizes")
            query = torch.frombuffer(raw, dtype=torch.float16).view(shape)
            found = cls(
                query, str(document["pairing"]), int(document["rotary_dim"]), document["source"]
            )
            digest = document["digest"]
        except CalibrationError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error) as error:
            raise CalibrationError(f"not a calibration ({error})") from error
        if digest != found.digest:
            raise CalibrationError(f"digest {digest}: expected {found.digest}")
        return found

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file that `save` wrote.

        Raises:
            CalibrationError: the file cannot be read, is damaged or of another format.
        """
        try:
            return cls.parse(path.read_bytes())
        except (OSError, CalibrationError) as error:
            raise CalibrationError(f"{path}: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides codes, in hex."""
        facts = [FORMAT, self.pairing, self.rotary_dim, list(self.query.shape)]
        state = hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode())
        state.update(self._raw())
        return state.hexdigest()

    @property
    def name(self) -> str:
        """What profiles call it: the first digits of the digest."""
        return self.digest[:DIGEST_DIGITS]

    def text(self) -> str:
        """Returns the calibration as JSON, energies as base64 of little-endian fp16."""
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "source": self.source,
            "pairing": self.pairing,
            "rotary_dim": self.rotary_dim,
            "shape": list(self.query.shape),
            "query": base64.b64encode(self._raw()).decode(),
        }
        return json.dumps(document, indent=1) + "\n"

    def save(self, path: Path) -> None:
        """Writes `text` to a file."""
        path.write_text(self.text())

    def check(self, profile: Profile, shape: BlockShape) -> None:
        """Checks that this is the calibration of a profile and fits a shape.

        Raises:
            CalibrationError: the profile names another one.
            ShapeError: heads, pairs, pairing or rotary_dim differ.
        """
        if profile.calibration != self.name:
            raise CalibrationError(f"calibration {self.name}: expected {profile.calibration!r}")
        own = (*self.query.shape[1:], self.pairing, self.rotary_dim)
        expected = (shape.kv_heads, shape.pairs, shape.pairing, shape.rotary_dim)
        if own != expected:
            raise ShapeError(f"calibration of heads, pairs, pairing, rotary_dim {own}: {expected}")

    def energies(self, layers: Sequence[int], device: torch.device) -> Tensor:
        """Returns energies fp32 [N, Hkv, P] of slices.

        Raises:
            CalibrationError: a layer is not one of the calibration's.
        """
        num_layers = self.query.shape[0]
        if any(not 0 <= layer < num_layers for layer in layers):
            raise CalibrationError(f"layers {list(layers)}: expected 0 to {num_layers - 1}")
        return self.query[list(layers)].to(device, torch.float32)

    def _raw(self) -> bytes:
        return self.query.contiguous().view(torch.uint8).numpy().tobytes()
