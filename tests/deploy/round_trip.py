"""Stores blocks in a running service over TCP and reads them back.

round_trip.py ENDPOINT stores, looks up, retrieves and compares; with --again the same blocks must
be there already.
"""

from __future__ import annotations

import sys

import torch

from polarcache.client import Client, KvLayout, NamespaceSpec, chain_keys

NUM_BLOCKS = 4
LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_tokens=128)
# Profile, and the relative error that it may have on normal noise: 16 angles give 0.11.
PROFILES = {"exact": 0.0, "k=pair:r4t4,v=int4": 1 / 6}


def _layers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    shape = (NUM_BLOCKS * LAYOUT.block_tokens, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    return [
        (
            torch.randn(shape, generator=random).to(torch.float16),
            torch.randn(shape, generator=random).to(torch.float16),
        )
        for _ in range(LAYOUT.num_layers)
    ]


def _relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    difference = (expected.float() - got.float()).norm()
    return float(difference / expected.float().norm())


def _round_trip(client: Client, profile: str, bound: float, *, again: bool) -> None:
    namespace = client.open_namespace(NamespaceSpec("image-test", LAYOUT, profile))
    keys = chain_keys(range(NUM_BLOCKS * LAYOUT.block_tokens), LAYOUT.block_tokens)
    layers = _layers()
    if not again:
        stored = client.store(namespace, keys, layers)
        assert stored.num_stored == NUM_BLOCKS, stored
    match = client.lookup(namespace, keys)
    assert match.num_blocks == NUM_BLOCKS, match
    retrieved = client.retrieve(match)
    client.release(match)
    assert retrieved.num_blocks == NUM_BLOCKS, retrieved.miss_reason
    error = max(
        _relative_error(expected, got)
        for pair, got_pair in zip(layers, retrieved.layers, strict=True)
        for expected, got in zip(pair, got_pair, strict=True)
    )
    assert error <= bound, f"{profile}: relative error {error:.4f} above {bound:.4f}"
    where = "/".join(sorted(set(match.tiers)))
    print(f"{profile}: {match.num_blocks} blocks from {where}, relative error {error:.4f}")


def main() -> None:
    endpoint, again = sys.argv[1], "--again" in sys.argv[2:]
    with Client(endpoint, shared_memory_bytes=0) as client:
        for profile, bound in PROFILES.items():
            _round_trip(client, profile, bound, again=again)


if __name__ == "__main__":
    main()
