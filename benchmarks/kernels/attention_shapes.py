"""What attention is measured with: heads, lengths, chunks. Pure."""

NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 128, 16
CONTEXTS = (1024, 4096, 16384, 131072, 524288)
BATCH_SIZES = (1, 4, 16, 64)
KV_HEADS = (2, 8, 32)
LONG_CONTEXT = 65536
#: Lengths of a ragged batch, relative to each other.
RAGGED = (1, 2, 4, 32, 1, 3, 8, 13)
#: (KV heads, sequences, tokens) of a quick look, each even and ragged.
QUICK = (
    *((8, 1, tokens) for tokens in CONTEXTS),
    (8, 4, 16384),
    *((8, size, tokens) for size in (16, 64) for tokens in (1024, 4096)),
    (8, 64, 16384),
    (2, 1, 16384),
    (2, 1, 131072),
    (2, 16, 4096),
    (32, 1, 4096),
    (32, 16, 4096),
)
#: (new tokens, all tokens) of each sequence.
CHUNKS = {
    "2048 cold": ((2048, 2048),),
    "8192 cold": ((8192, 8192),),
    "512 after 2048": ((512, 2560),),
    "1024 after 16384": ((1024, 17408),),
    "2048 after 32768": ((2048, 34816),),
    "4 x 512 cold": ((512, 512),) * 4,
    "512 after 2048, 64 decode at 2048": ((512, 2560), *((1, 2048),) * 64),
    # Less tiles than there are multiprocessors.
    "256 cold": ((256, 256),),
    "256 after 2048": ((256, 2304),),
    "128 after 65536": ((128, 65664),),
    "256 after 65536": ((256, 65792),),
    "320 after 65536": ((320, 65856),),
    "640 after 65536": ((640, 66176),),
    "512 after 131072": ((512, 131584),),
    "192 after 65536, 4 x 256 cold": ((192, 65728), *((256, 256),) * 4),
    "128 after 65536, 64 decode at 2048": ((128, 65664), *((1, 2048),) * 64),
}
#: Not in a quick look.
LONG_CHUNKS = ("8192 cold", "2048 after 32768")


def ragged_lengths(batch_size: int, mean: int) -> list[int]:
    """Of that mean, about."""
    weights = [RAGGED[i % len(RAGGED)] for i in range(batch_size)]
    return [max(1, mean * batch_size * weight // sum(weights)) for weight in weights]
