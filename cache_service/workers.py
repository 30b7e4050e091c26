"""Threads for what would block the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

__all__ = ["Workers"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
_IO_THREADS = 32


class Workers:
    """Two pools: one for codecs and copies, as wide as there are cores for it; one for waiting.

    Args:
        cpu_threads: Threads for codecs and copies.
    """

    def __init__(self, cpu_threads: int) -> None:
        self._cpu = ThreadPoolExecutor(cpu_threads, thread_name_prefix="codec")
        self._io = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="io")

    def cpu(
        self, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[ResultT]:
        """Runs codec or copy work."""
        return asyncio.wrap_future(self._cpu.submit(work, *args, **kwargs))

    def submit_cpu(
        self, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> Future[ResultT]:
        """Like `cpu`, for a result that is awaited later or not at all."""
        return self._cpu.submit(work, *args, **kwargs)

    def io(
        self, work: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[ResultT]:
        """Runs work that may wait on Redis or on a lock."""
        return asyncio.wrap_future(self._io.submit(work, *args, **kwargs))

    async def io_owned(
        self,
        undo: Callable[[ResultT], Any],
        work: Callable[P, ResultT],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> ResultT:
        """Like `io`; when the caller is cancelled meanwhile, the late result is undone."""
        future = self._io.submit(work, *args, **kwargs)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: _undo(done, undo))
            raise

    def io_later(self, work: Callable[[], object]) -> None:
        """Runs clean-up that nobody waits for."""
        self._io.submit(work)

    def close(self) -> None:
        """Waits for what runs."""
        self._cpu.shutdown()
        self._io.shutdown()


def _undo(done: Future[ResultT], undo: Callable[[ResultT], Any]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())
