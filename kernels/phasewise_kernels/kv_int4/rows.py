"""The size of a row, for those who have no torch."""

#: Of the smallest heads that the kernels multiply; also what makes scales lie at multiples of their eight bytes.
MIN_HEAD_DIM = 32
SCALES_BYTES = 8


def is_supported(head_dim: int) -> bool:
    """A power of two, as the rotation needs."""
    return head_dim >= MIN_HEAD_DIM and head_dim & (head_dim - 1) == 0


def row_bytes(head_dim: int) -> int:
    """Of K or V of one head of a token."""
    return head_dim // 2 + SCALES_BYTES
