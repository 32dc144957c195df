"""The specification of copies with a checksum."""

from collections.abc import Sequence

#: Castagnoli's polynomial, its bits reversed.
POLYNOMIAL = 0x82F63B78


def crc32c_reference(data: bytes, checksum: int = 0) -> int:
    """CRC32C of `data`, after bytes whose CRC32C is `checksum`, bit by bit. Source: RFC 3720, section 12.1."""
    state = checksum ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def copy_pieces_reference(
    source: bytes,
    source_offsets: Sequence[int],
    target: bytearray,
    target_offsets: Sequence[int],
    lengths: Sequence[int],
    checksum: int = 0,
) -> int:
    """Piece by piece: source[offset : offset + length] goes to the offset of `target`. Returns the CRC32C over all."""
    for source_offset, target_offset, length in zip(source_offsets, target_offsets, lengths, strict=True):
        piece = source[source_offset : source_offset + length]
        target[target_offset : target_offset + length] = piece
        checksum = crc32c_reference(piece, checksum)
    return checksum
