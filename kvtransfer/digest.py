"""What binds the bytes of a hand-off to what they are KV of. Pure.

Checksums say that each chunk is as it was sent. The digest says that all of them together are the KV of these tokens
at these positions, of this model, in this order: it is made on both sides, from what each side knows by itself.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout

DIGEST_BYTES = 16


def token_digest(token_ids: Sequence[int], first_position: int = 0) -> bytes:
    """Of the tokens of a sequence at their positions, the first of which is `first_position`."""
    text = f"{first_position}+{len(token_ids)}:".encode()
    return hashlib.blake2b(text + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def content_digest(tokens: bytes, keys: Sequence[bytes]) -> bytes:
    """Of tokens some of which stand for content beside them, as pictures do.

    tokens: `token_digest`. keys: what names each piece of content, in order.
    """
    digest = hashlib.blake2b(tokens, digest_size=DIGEST_BYTES)
    for key in keys:
        digest.update(len(key).to_bytes(4, "little") + key)
    return digest.digest()


def transfer_digest(
    layout: KvLayout, tokens: bytes, heads: tuple[int, int], chunks: Iterable[tuple[KvRange, int, int]]
) -> bytes:
    """Of a whole transfer.

    layout: the sender's. tokens: `token_digest`. heads: KV heads that were sent. chunks: range, codec and checksum of
    each, in the order of their sequence numbers.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    named = (
        layout.model_digest,
        layout.position_encoding,
        layout.dtype,
        *map(str, (layout.num_layers, layout.num_kv_heads, layout.head_dim, *heads)),
    )
    for part in named:
        digest.update(f"{len(part)}:{part}".encode())
    digest.update(tokens)
    for where, codec, checksum in chunks:
        numbers = (where.layer_lo, where.layer_hi, where.token_lo, where.token_hi, codec, checksum)
        digest.update(array("Q", numbers).tobytes())
    return digest.digest()
