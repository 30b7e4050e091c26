"""Byte buffers and torch tensors over the same memory. torch is imported only when called."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

from polarcache.proto.frames import Buffer

if TYPE_CHECKING:
    import torch

__all__ = ["bytes_tensor", "tensor_bytes"]


def bytes_tensor(buffer: Buffer) -> torch.Tensor:
    """A uint8 tensor [len(buffer)] over a buffer's memory.

    Args:
        buffer: C-contiguous bytes; when it is read-only the tensor must not be written.
    """
    import torch

    _allow_read_only()
    if len(buffer) == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(buffer, dtype=torch.uint8)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A byte view of a tensor's memory.

    Args:
        tensor: On the CPU, contiguous, any dtype.
    """
    import torch

    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()}")
    view: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return view


@functools.cache
def _allow_read_only() -> None:
    # Wire buffers are read-only and stay so: torch need not warn about each process's first one.
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
