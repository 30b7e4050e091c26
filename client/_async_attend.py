"""`AttendStream` for asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polarcache.client._attend import AttendStream, AttendTiming

if TYPE_CHECKING:
    import torch

__all__ = ["AsyncAttendStream"]


class AsyncAttendStream:
    """`AttendStream` for asyncio: the same methods, in threads. Made by `AsyncClient.attend`.

    Attributes:
        prefix_tokens: As for `AttendStream`.
        is_local: As for `AttendStream`.
    """

    def __init__(self, stream: AttendStream, run: Callable[..., Awaitable[Any]]) -> None:
        self._stream = stream
        self._run = run
        self.prefix_tokens = stream.prefix_tokens
        self.is_local = stream.is_local

    @property
    def timing(self) -> AttendTiming | None:
        """As for `AttendStream`."""
        return self._stream.timing

    async def __aenter__(self) -> AsyncAttendStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See `AttendStream.close`."""
        self._stream.close()

    async def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        position: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttendStream.attend`."""
        result: tuple[torch.Tensor, torch.Tensor] = await self._run(
            self._stream.attend, layer, queries, position, timeout_s=timeout_s
        )
        return result
