"""Small files of every kind of picture, and ways to break them."""

import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from workers.errors import ImageRejected
from workers.images.decode import decode
from workers.images.header import read_header
from workers.images.limits import ImageLimits

LIMITS = ImageLimits()
#: Mutations write sizes too; small pictures keep them fast.
FUZZ_LIMITS = ImageLimits(max_pixels=2**18)

#: Modes of Pillow that each format can be saved in.
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
}


def picture(mode: str = "RGB", width: int = 29, height: int = 17) -> Image.Image:
    """Not symmetric in any way."""
    rows, cols = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, cols * 255 // width, (rows * cols * 7) % 256], axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((rows * width + cols).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((cols * 255 // width).astype(np.uint8)))
    return image.convert(mode)


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The bytes of its file."""
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png_chunk(name: bytes, payload: bytes) -> bytes:
    """One chunk with its checksum."""
    body = name + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))


def png_of_size(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A grey PNG that claims this size; pixels: as they are before they are compressed."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def exif_of(orientation: int) -> Image.Exif:
    """Only that."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def seeds() -> list[bytes]:
    """A file of every format, mode and layout that is taken."""
    files = [saved(picture(mode), image_format) for image_format, modes in MODES.items() for mode in modes]
    rgb, alpha = picture(), picture("RGBA")
    frames = [picture("P"), picture("P").transpose(Image.Transpose.ROTATE_180)]
    turned = exif_of(6)
    return [
        *files,
        saved(rgb, "JPEG", progressive=True, exif=turned, comment=b"hello", icc_profile=b"colours" * 9),
        saved(rgb, "JPEG", subsampling=0, optimize=True, restart_marker_rows=1),
        saved(rgb, "PNG", exif=turned, icc_profile=b"colours" * 9),
        saved(picture("P"), "PNG", transparency=bytes(range(256))),
        saved(rgb, "PNG", save_all=True, append_images=[alpha.convert("RGB")]),
        saved(rgb, "WEBP", lossless=True, exif=turned),
        saved(alpha, "WEBP", save_all=True, append_images=[alpha.rotate(90)]),
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"hello", transparency=3),
        saved(frames[0], "GIF", interlace=True),
    ]


def mutations(files: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Broken copies: bytes and numbers overwritten, pieces cut, doubled, moved and exchanged between files."""
    draw = random.Random(seed)
    for _ in range(count):
        data = bytearray(draw.choice(files))
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            _mutate(data, files, draw)
        yield bytes(data)


def _mutate(data: bytearray, files: list[bytes], draw: random.Random) -> None:
    # Structure is at the beginning, so half of what is done is done there.
    reach = len(data) if draw.random() < 0.5 else min(len(data), 64)
    at = draw.randrange(reach + 1) if reach else 0
    kind = draw.randrange(7)
    length = draw.choice((1, 2, 4, 9, 40))
    if kind == 0 and at < len(data):
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at : at + 1] = bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, draw.randrange(256)))])
    elif kind == 2:
        number = draw.choice((0, 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1))
        data[at : at + 4] = struct.pack(draw.choice(("<I", ">I")), number)
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = data[at : at + length] * draw.choice((1, 2, 30))
    elif kind == 5:
        del data[at:]
    else:
        other = draw.choice(files)
        start = draw.randrange(len(other))
        data[at : at + length] = other[start : start + length]


def is_taken(data: bytes, limits: ImageLimits = FUZZ_LIMITS) -> bool:
    """Read it as a worker does: True with pixels as promised, False when it is refused. All else fails."""
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        try:
            header = read_header(data, "", limits)
            pixels = decode(data, header)
        except ImageRejected:
            return False
        finally:
            assert not leaked, [str(warning.message) for warning in leaked]
    assert pixels.shape == (header.height, header.width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return True
