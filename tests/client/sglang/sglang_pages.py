"""Names and places of the pages that these tests store."""

import hashlib

import torch

PAGE_TOKENS, LAYERS, PAGES = 64, 3, 6
KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(6)]


def slots(*pages: int) -> torch.Tensor:
    starts = torch.tensor(pages, dtype=torch.int64) * PAGE_TOKENS
    return (starts[:, None] + torch.arange(PAGE_TOKENS)).flatten()
