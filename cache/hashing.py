"""Names for the content of full KV blocks: a chain of keyed hashes over token ids.

A block's keys and values depend on every token up to its end, so its name is the hash
of its parent's name and its own tokens. The hash is cryptographic and keyed: whoever
can choose prompts must not be able to make two texts share a name, nor to guess one
(cheap hashes have been attacked that way, to be served another tenant's cache).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from ..core.messages import HASH_BYTES


class BlockHasher:
    """``salt`` is the deployment's: equal on all workers that compare names."""

    def __init__(self, block_size: int, salt: bytes) -> None:
        self.block_size = block_size
        key = hashlib.blake2b(salt, digest_size=hashlib.blake2b.MAX_KEY_SIZE).digest()
        self._keyed = hashlib.blake2b(digest_size=HASH_BYTES, key=key)

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], num_blocks: int) -> None:
        """Appends the names of the blocks ``len(hashes) .. num_blocks - 1`` of this text."""
        first = len(hashes)
        if first >= num_blocks:
            return
        size = self.block_size
        assert num_blocks * size <= len(token_ids)
        chosen = token_ids[first * size : num_blocks * size]
        tokens = struct.pack(f"<{len(chosen)}i", *chosen)
        name = hashes[-1] if hashes else b""
        step = 4 * size  # bytes of a block's tokens
        begin = self._keyed.copy
        for start in range(0, len(tokens), step):
            digest = begin()
            digest.update(name + tokens[start : start + step])
            name = digest.digest()
            hashes.append(name)
