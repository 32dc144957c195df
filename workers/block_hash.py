"""Names of KV blocks by what they hold: equal names mean equal KV. Pure.

A block's hash covers everything that its KV depends on within one worker: the model, the tokenizer, the tenant's salt and
all tokens from the start of the sequence, each block's hash being chained to the one before it. Of workers that keep weights
or KV in other dtypes equal names mean KV that is nearly equal: see `kvtransfer.layout.inexactness`.
"""

import hashlib
from array import array
from collections.abc import Sequence

#: Bytes of a hash. Two different prefixes share one with probability 2**-128.
HASH_BYTES = 16


def root_hash(model_digest: str, tokenizer_digest: str, salt: str) -> bytes:
    """What the first block of a sequence is chained to. Another salt shares nothing."""
    parts = (model_digest, tokenizer_digest, salt)
    # JSON-like separation by length: no two different triples spell the same bytes.
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def block_hash(parent: bytes, token_ids: Sequence[int], contents: Sequence[bytes] = ()) -> bytes:
    """The hash of a full block.

    parent: the hash of the block before it, or `root_hash`. contents: digests of the images whose
    placeholder tokens lie in this block, in order.
    """
    data = parent + array("I", token_ids).tobytes()
    for content in contents:
        data += len(content).to_bytes(4, "little") + content
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def chain_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The hashes of all full blocks of these tokens, without contents, each the child of the one before it.

    parent: as for `block_hash`, of the first. block_size: in tokens.
    """
    data, blake2b, num_bytes = array("I", token_ids).tobytes(), hashlib.blake2b, 4 * block_size
    names = []
    for end in range(num_bytes, len(data) + 1, num_bytes):
        parent = blake2b(parent + data[end - num_bytes : end], digest_size=HASH_BYTES).digest()
        names.append(parent)
    return names
