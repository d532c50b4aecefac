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

HASH_BYTES = 16


class BlockHasher:
    """``salt`` is the deployment's: equal on all workers that compare names."""

    def __init__(self, block_size: int, salt: bytes) -> None:
        self.block_size = block_size
        self._key = hashlib.blake2b(salt, digest_size=hashlib.blake2b.MAX_KEY_SIZE).digest()
        self._tokens = struct.Struct(f"<{block_size}i")

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], num_blocks: int) -> None:
        """Appends the names of the blocks ``len(hashes) .. num_blocks - 1`` of this text."""
        size = self.block_size
        assert num_blocks * size <= len(token_ids)
        for index in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else b""
            tokens = self._tokens.pack(*token_ids[index * size : (index + 1) * size])
            digest = hashlib.blake2b(parent + tokens, digest_size=HASH_BYTES, key=self._key)
            hashes.append(digest.digest())
