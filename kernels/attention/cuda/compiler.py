"""Compiles CUDA C++ of this package at run time (NVRTC) and keeps the binaries on disk.

A binary's file name is the digest of everything that it depends on, and files appear whole (written
aside, then renamed), so processes that compile the same source at once cannot disturb each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc
from platformdirs import user_cache_path

__all__ = ["CompileError", "compile_source"]

_FOLDER = Path(__file__).parent


class CompileError(RuntimeError):
    """NVRTC refused a source; the message ends with its log."""


def compile_source(name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """Returns the binary (cubin) of a source file of this folder.

    Args:
        name: file name of the source, such as `decode.cu`.
        defines: macros and their values.
        architecture: such as `sm_90`.

    Raises:
        CompileError: the source does not compile.
    """
    source = (_FOLDER / name).read_bytes()
    headers = {path.name: path.read_bytes() for path in sorted(_FOLDER.glob("*.cuh"))}
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in sorted(defines.items())]
    version = _checked(nvrtc.nvrtcVersion(), None)
    digest = hashlib.sha256(repr((version, options)).encode())
    for text in (source, *headers.values()):
        digest.update(hashlib.sha256(text).digest())
    path = user_cache_path("polarcache") / "kernels" / f"{digest.hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        binary = _compiled(source, name, headers, options)
    # A cache that cannot be written costs the next process a second.
    with contextlib.suppress(OSError):
        _keep(path, binary)
    return binary


def _compiled(source: bytes, name: str, headers: Mapping[str, bytes], options: list[str]) -> bytes:
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            source,
            name.encode(),
            len(headers),
            list(headers.values()),
            [header.encode() for header in headers],
        ),
        None,
    )[0]
    try:
        result = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        _checked(result, program)
        binary: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), program)[0]
        _checked(nvrtc.nvrtcGetCUBIN(program, binary), program)
        return binary
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...], program: Any) -> tuple[Any, ...]:
    """Returns what an NVRTC call gave beside its status."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b""
        if program is not None:
            log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
            nvrtc.nvrtcGetProgramLog(program, log)
        raise CompileError(f"{status}: {log.decode(errors='replace').strip()}")
    return tuple(values)


def _keep(path: Path, binary: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
