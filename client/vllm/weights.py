"""A fingerprint of a model's weights that is cheap enough for every start of an engine."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["weights_fingerprint"]

_SAMPLE_BYTES = 1 << 16
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def weights_fingerprint(model: str, commit: str) -> str:
    """What stands for the weights, at most 64 characters.

    Of a folder: a hash of every weight file's name, length, and first and last 64 KiB, and of
    config.json. Two trainings of one architecture differ there: weights are dense in both ends.

    Args:
        model: Folder or file of the model, or its name on a hub.
        commit: The hub's commit or revision where it is known, else empty.

    Returns:
        The fingerprint; empty when neither files nor commit are known.
    """
    path = Path(model)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix in _WEIGHT_SUFFIXES or file.name == "config.json"
        )
    else:
        return commit[:64]
    digest = hashlib.sha256()
    for file in files:
        num_bytes = file.stat().st_size
        digest.update(f"{file.name}:{num_bytes}:".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, num_bytes - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
