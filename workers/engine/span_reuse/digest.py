"""Tells KV that is an approximation from KV of the same tokens that is exact, across a hand-off. Pure."""

import hashlib

from kvtransfer.digest import DIGEST_BYTES


def approximate_digest(tokens: bytes) -> bytes:
    """In place of `token_digest` when KV of these tokens was partly taken from other contexts.

    Whoever receives it knows it by that, and keeps it out of the prefix cache.
    """
    return hashlib.blake2b(b"approximate:" + tokens, digest_size=DIGEST_BYTES).digest()
