"""Block keys for workers whose engine has none.

An engine that chains its own block hashes (vLLM, SGLang) passes them as they are. `chain_keys`
makes the same kind of name from token ids: a block's key is the SHA-256 of its parent's key and
its tokens, so equal keys mean equal prefixes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from polarcache.proto.errors import InvalidRequestError

__all__ = ["MAX_BLOCK_KEY_BYTES", "chain_keys"]

MAX_BLOCK_KEY_BYTES = 64


def chain_keys(token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of the whole blocks of a prompt, 32 bytes each.

    Args:
        token_ids: Token ids from token 0 on, each in [0, 2**32).
        block_tokens: Tokens in a block, at least 1. The tail below one block gets no key.

    Raises:
        InvalidRequestError: A token id or `block_tokens` is out of range.
    """
    if block_tokens < 1:
        raise InvalidRequestError(f"block_tokens must be at least 1, got {block_tokens}")
    keys: list[bytes] = []
    parent = b""
    packer = struct.Struct(f"<{block_tokens}I")
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        try:
            tokens = packer.pack(*token_ids[start : start + block_tokens])
        except struct.error as error:
            raise InvalidRequestError(f"token ids must be in [0, 2**32): {error}") from error
        parent = hashlib.sha256(b"polarcache-block-v1" + parent + tokens).digest()
        keys.append(parent)
    return keys
