"""Frames of a transfer: everything once, in order, all full but the last."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from polarcache.proto.plan import plan_frames


@given(st.integers(0, 12), st.integers(1, 9), st.integers(1, 20))
def test_frames_carry_every_layer_once_in_order(
    num_blocks: int, num_layers: int, per_frame: int
) -> None:
    parts = [(block, range(num_layers)) for block in range(num_blocks)]
    frames = list(plan_frames(parts, per_frame))
    sent = [(block, layer) for frame in frames for block, part in frame for layer in part]
    assert sent == list(itertools.product(range(num_blocks), range(num_layers)))
    counts = [sum(len(part) for _, part in frame) for frame in frames]
    assert all(count == per_frame for count in counts[:-1])
    assert not counts or 1 <= counts[-1] <= per_frame
    assert all(len({block for block, _ in frame}) == len(frame) for frame in frames)
