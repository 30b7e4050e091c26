"""What goes into each frame of a transfer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

__all__ = ["Part", "plan_frames"]

# A block's index and consecutive layers of it.
Part: TypeAlias = tuple[int, range]


def plan_frames(parts: Iterable[Part], slices_per_frame: int) -> Iterator[list[Part]]:
    """Cuts parts into frames, all full but the last.

    Short frames at both ends would shorten the waits for the first and the last; measured, they
    cost more than that.

    Args:
        parts: What to send, in order.
        slices_per_frame: Slices of a frame, at least 1.
    """
    frame: list[Part] = []
    room = slices_per_frame
    for block_index, layers in parts:
        first = layers.start
        while first < layers.stop:
            end = min(layers.stop, first + room)
            frame.append((block_index, range(first, end)))
            room -= end - first
            first = end
            if not room:
                yield frame
                frame, room = [], slices_per_frame
    if frame:
        yield frame
