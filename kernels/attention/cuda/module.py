"""Loads the compiled kernel and launches it."""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver

from polarcache.kernels.attention.cuda.compiler import compile_source

__all__ = ["BoundKernel", "Kernel"]

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_float
_TYPES = (_P,) * 8 + (_L,) * 5 + (_I,) * 6 + (_F,) * 2 + (ctypes.c_uint,)
_lock = threading.Lock()
_kernels: dict[tuple[int, str, tuple[tuple[str, int], ...]], Kernel] = {}


@dataclass(frozen=True, slots=True)
class Kernel:
    """`attend` of a source with some macros, on one device.

    Attributes:
        function: the driver's handle.
        threads: threads of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    function: Any
    threads: int
    shared_bytes: int

    @classmethod
    def of(cls, device: int, source: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
        """Returns the kernel, compiled at its first use.

        Args:
            device: index of the CUDA device.
            source: file of the kernel, in this folder.
            defines: macros of the source and their values.

        Raises:
            CompileError: the source does not compile.
            RuntimeError: the driver refuses it.
        """
        key = (device, source, defines)
        found = _kernels.get(key)
        if found is None:
            with _lock:
                found = _kernels.get(key)
                if found is None:
                    found = _kernels[key] = cls._load(device, source, defines)
        return found

    @classmethod
    def _load(cls, device: int, source: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
        with torch.cuda.device(device):
            torch.zeros(1, device=f"cuda:{device}")  # makes the device's context current
            major, minor = torch.cuda.get_device_capability(device)
            macros = dict(defines)
            # With the features of the one architecture, which warpgroup products need.
            binary = compile_source(source, macros, f"sm_{major}{minor}a")
            module = _checked(driver.cuModuleLoadData(binary))
            function = _checked(driver.cuModuleGetFunction(module, b"attend"))
            # The source adds up its shared memory and leaves the sum where it can be read.
            address, size = _checked(driver.cuModuleGetGlobal(module, b"shared_bytes"))
            value = ctypes.c_int()
            _checked(driver.cuMemcpyDtoH(ctypes.addressof(value), address, size))
            _checked(
                driver.cuFuncSetAttribute(
                    function,
                    driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    value.value,
                )
            )
            return cls(function, 32 * macros["WARPS"], value.value)

    def bind(self, blocks: int, arguments: tuple[Any, ...]) -> BoundKernel:
        """Returns a launch with its arguments laid out for the driver.

        Args:
            blocks: thread blocks.
            arguments: the kernel's arguments, pointers as integers.
        """
        return BoundKernel(self, blocks, arguments)


class BoundKernel:
    """A launch that is repeated; not thread-safe.

    Attributes:
        values: the kernel's arguments, which may be changed between launches.
    """

    __slots__ = ("_addresses", "_function", "_grid", "_where", "values")

    def __init__(self, kernel: Kernel, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Lays the arguments out; see `Kernel.bind`."""
        self.values: list[Any] = [
            kind(value) for kind, value in zip(_TYPES, arguments, strict=True)
        ]
        addresses = [ctypes.addressof(value) for value in self.values]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._where = ctypes.addressof(self._addresses)
        self._function = kernel.function
        self._grid = (blocks, kernel.threads, kernel.shared_bytes)

    def __call__(self, stream: int) -> None:
        """Launches on a stream of the device that is current in this thread.

        Args:
            stream: the driver's handle.

        Raises:
            RuntimeError: the driver refuses the launch.
        """
        config = _launch_config(*self._grid, stream)
        _checked(driver.cuLaunchKernelEx(config, self._function, self._where, 0))


@functools.lru_cache(maxsize=256)
def _launch_config(blocks: int, threads: int, shared_bytes: int, stream: int) -> Any:
    """Returns how to launch: blocks may start before the launch before has ended.

    The kernel waits for that launch before it reads or writes anything that others share, so that
    only its set-up overlaps.
    """
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [attribute], 1
    return config


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{status.name}: the driver refused the attention kernel")
    return values[0] if len(values) == 1 else tuple(values)
