"""What a `World` is like: the two workers' pools, the durations, and how prefill proceeds."""

import random
from dataclasses import dataclass, replace
from itertools import pairwise

from kvtransfer.codecs.codec import CodecId
from kvtransfer.kv_range import KvRange
from kvtransfer.layout import KvLayout

LEASE_S = 9.0
RESUME_S = 4.0
TIMEOUT_S = 40.0
FIRST_INCARNATION = 6
TOKEN_IDS = (11, 12)
#: Tokens that the sequence may grow by.
NUM_MORE_TOKENS = 2
NUM_POOL_BLOCKS = 48
#: Why a receiver asks for a chunk that it has heard nothing of.
NOT_ARRIVED = "it has not arrived"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the two workers are like."""

    sender_layout: KvLayout
    receiver_layout: KvLayout
    num_tokens: int
    max_chunk_bytes: int
    credits: int
    #: "grpc": payload in the chunks; "shm": the receiver copies in place.
    transport: str
    codec: CodecId
    #: More than one: somebody says when all of them are whole.
    num_parts: int = 1

    @staticmethod
    def draw(rng: random.Random) -> "Shape":
        """Any shape that fits together: block sizes and heads differ, chunks of one token or of everything."""
        layout = KvLayout("d", "float16", rng.randint(1, 3), rng.randint(1, 3), 2, 1, "")
        receiver = replace(layout, block_size=rng.randint(1, 3), head_lo=rng.randint(0, 1), head_hi=2)
        is_in_place = rng.random() < 0.4
        return Shape(
            sender_layout=layout,
            receiver_layout=receiver,
            num_tokens=rng.randint(1, 7),
            max_chunk_bytes=layout.token_bytes * rng.choice((1, 1, 2, 3, 8)),
            credits=rng.randint(1, 3),
            transport="shm" if is_in_place else "grpc",
            codec=CodecId.FP8 if rng.random() < 0.2 else CodecId.NONE,
            num_parts=2 if rng.random() < 0.2 else 1,
        )


def prefill_order(num_layers: int, num_tokens: int, rng: random.Random) -> list[KvRange]:
    """All of the KV, in the ranges in which prefill happens to finish it."""
    layer_cuts = sorted({0, num_layers, rng.randint(0, num_layers)})
    token_cuts = sorted({0, num_tokens, rng.randint(0, num_tokens), rng.randint(0, num_tokens)})
    ranges = [
        KvRange(layer_lo, layer_hi, token_lo, token_hi)
        for layer_lo, layer_hi in pairwise(layer_cuts)
        for token_lo, token_hi in pairwise(token_cuts)
    ]
    rng.shuffle(ranges)
    return ranges
