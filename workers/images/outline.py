"""What the structure of a picture's file says, without its pixels. Pure.

A file is walked once, from segment to segment: size, which way up, and which parts the pixels need. The decoder is given
those parts alone: comments, colour profiles, previews, later pictures and frames never reach it. Each walk is bounded, for a
hostile file may consist of millions of empty segments.
"""

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

from workers.errors import ImageFault, ImageRejected
from workers.images import exif
from workers.images.kind import ImageFormat

#: Far above what encoders write: chunks of 8 KiB of a picture of 64 MiB.
MAX_SEGMENTS = 8192
#: Blocks of up to 255 bytes before the first frame of a GIF.
MAX_GIF_BLOCKS = 32768
#: Passes over the pixels of one progressive JPEG; encoders write about ten.
MAX_SCANS = 100

_SOI, _EOI, _SOS, _APP1, _APP14, _COM = 0xD8, 0xD9, 0xDA, 0xE1, 0xEE, 0xFE
#: Start of frame: all but DHT, JPG and DAC, which stand among them.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
#: Markers without a length after them: TEM and the restarts.
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
#: Application segments but JFIF's and Adobe's, and comments.
_LEFT_OUT = frozenset({*range(_APP1, 0xF0), _COM}) - {_APP14}
#: A marker with a length after it, among the coded pixels.
_NEXT_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


class Outline(NamedTuple):
    """width, height: as stored, not turned. parts: from, to; what the decoder needs of the file, in order."""

    width: int
    height: int
    orientation: int
    parts: tuple[tuple[int, int], ...]


def outline(data: bytes, found: ImageFormat) -> Outline:
    """Walk a file of this format. Raises ImageRejected when its structure is broken."""
    try:
        return _WALKS[found](data)
    except (struct.error, IndexError):
        raise damaged(f"this {found.value} ends before its pixels") from None


def needed(data: bytes, parts: tuple[tuple[int, int], ...]) -> bytes:
    """The file that the decoder gets."""
    if parts == ((0, len(data)),):
        return data
    view = memoryview(data)
    return b"".join(view[lo:hi] for lo, hi in parts)


def damaged(what: str) -> ImageRejected:
    """A file that is broken."""
    return ImageRejected(f"{what}: it is damaged; save or send it anew", ImageFault.DAMAGED)


def check_scans(data: bytes) -> None:
    """Raises ImageRejected where a JPEG has more than MAX_SCANS scans: each costs a pass over all pixels, even when empty.

    data: as `needed` gives it.
    """
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return
    # Rare: some may stand within other segments, or behind the end.
    num_scans, at = 0, 2
    for _ in range(MAX_SEGMENTS):
        found = _NEXT_SEGMENT.search(data, at)
        if found is None or data[found.end() - 1] == _EOI:
            return
        at = found.end()
        num_scans += data[at - 1] == _SOS
        if at + 2 > len(data):
            return
        if num_scans > MAX_SCANS:
            break
        at += struct.unpack_from(">H", data, at)[0]
    raise _too_many("JPEG", "scans")


def _png(data: bytes) -> Outline:
    """Chunks: length, name, payload, checksum. IHDR, PLTE and IDAT make the pixels; eXIf may come after them."""
    length, name, width, height = struct.unpack_from(">I4sII", data, 8)
    if name != b"IHDR" or length != 13:
        raise damaged("this PNG does not begin with its header")
    parts = [(0, 33)]
    turned = exif.UPRIGHT
    at = 33
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if name == b"IHDR":
            raise damaged("this PNG has two headers")
        if name in (b"PLTE", b"IDAT", b"IEND"):
            parts.append((at, min(end, len(data))))
        elif name == b"eXIf" and turned == exif.UPRIGHT:
            turned = exif.orientation(data[at + 8 : at + 8 + length])
        if name == b"IEND":
            break
        at = end
    else:
        raise _too_many("PNG", "chunks")
    return Outline(width, height, turned, _joined(parts))


def _jpeg(data: bytes) -> Outline:
    """Segments: FF, marker, length, payload, until the scans, which go on to the end.

    Of the application segments JFIF and Adobe say what the colours are; the others are left out.
    """
    parts = [(0, 2)]
    size: tuple[int, int] | None = None
    turned: int | None = None
    at = 2
    for _ in range(MAX_SEGMENTS):
        # Encoders may pad before a marker; decoders skip what else stands there.
        at = data.find(b"\xff", at)
        if at < 0:
            break
        at = _last_ff(data, at)
        marker = data[at + 1]
        if marker == 0 or marker == _SOI or marker in _BARE:
            at += 2
            continue
        if marker == _EOI:
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        if length < 2 or end > len(data):
            break
        if marker == _SOS:
            if size is None:
                break
            return Outline(*size, turned or exif.UPRIGHT, _joined([*parts, (at, len(data))]))
        if marker in _SOF:
            if size is not None:
                raise damaged("this JPEG has two frame headers")
            size = _jpeg_size(data, at)
        elif marker == _APP1 and turned is None and data.startswith(b"Exif\0\0", at + 4):
            turned = exif.orientation(data[at + 4 : end])
        if marker not in _LEFT_OUT:
            parts.append((at, end))
        at = end
    else:
        raise _too_many("JPEG", "segments")
    raise damaged("this JPEG ends before its pixels")


def _jpeg_size(data: bytes, at: int) -> tuple[int, int]:
    bits, height, width, num_components = struct.unpack_from(">BHHB", data, at + 4)
    if bits != 8 or num_components not in (1, 3, 4):
        raise ImageRejected(
            f"it is a JPEG of {num_components} components of {bits} bits, which is not taken; save it as PNG, or as"
            " a JPEG of 8 bits",
            ImageFault.FORMAT,
        )
    return width, height


def _last_ff(data: bytes, at: int) -> int:
    """The last of the FF bytes that begin at `at`."""
    step = 4096
    while True:
        run = data[at : at + step]
        rest = run.lstrip(b"\xff")
        if rest or len(run) < step:
            return at + len(run) - len(rest) - 1
        at += step - 1


def _gif(data: bytes) -> Outline:
    """Screen, palette, extensions, the first frame's descriptor, and its pixels, which go on to the end.

    Of the extensions the one that names the transparent colour is needed: it fills what the frame leaves free.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    parts = [(0, at)]
    blocks_left = MAX_GIF_BLOCKS
    while blocks_left > 0:
        introducer = data[at : at + 1]
        if introducer == b",":
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
            # A frame may stick out of the screen, which then grows.
            size = max(width, left + frame_width), max(height, top + frame_height)
            if frame_width == 0 or frame_height == 0:
                size = 0, 0
            return Outline(*size, exif.UPRIGHT, _joined([*parts, (at, len(data))]))
        if introducer in (b"", b";"):
            break
        blocks_left -= 1
        if introducer != b"!":
            # Some encoders pad; decoders skip what stands there.
            at += 1
            continue
        begin, label = at, data[at + 1]
        at += 2
        while blocks_left > 0 and (length := data[at]) != 0:
            at += 1 + length
            blocks_left -= 1
        at += 1
        if label == 0xF9:
            parts.append((begin, at))
    else:
        raise _too_many("GIF", "blocks before its first frame")
    raise damaged("this GIF has no frame")


def _webp(data: bytes) -> Outline:
    """RIFF chunks: name, length, payload, padded to even. The decoder finds its way through all of them itself."""
    width, height = _webp_size(data)
    turned = exif.UPRIGHT
    # Only a file of several chunks begins so.
    at = 12 if data[12:16] == b"VP8X" else len(data)
    for _ in range(MAX_SEGMENTS):
        if at + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            turned = exif.orientation(data[at + 8 : at + 8 + length])
            break
        at += 8 + length + (length & 1)
    else:
        raise _too_many("WebP", "chunks")
    return Outline(width, height, turned, ((0, len(data)),))


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of the canvas. Source: RFC 9649, sections 2.5 to 2.7; RFC 6386, section 9.1."""
    name = data[12:16]
    if name == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if name == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if name == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if len(data) < 30:
        raise damaged("this WebP ends before its pixels")
    raise damaged("this WebP does not begin with a picture")


def _too_many(what: str, parts: str) -> ImageRejected:
    return ImageRejected(f"this {what} has too many {parts}; save it anew", ImageFault.TOO_LARGE)


def _joined(parts: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours as one."""
    found: list[tuple[int, int]] = []
    for lo, hi in parts:
        if found and found[-1][1] == lo:
            lo = found.pop()[0]
        found.append((lo, hi))
    return tuple(found)


_WALKS: dict[ImageFormat, Callable[[bytes], Outline]] = {
    ImageFormat.PNG: _png,
    ImageFormat.JPEG: _jpeg,
    ImageFormat.GIF: _gif,
    ImageFormat.WEBP: _webp,
}
