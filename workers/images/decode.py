"""The pixels of a picture. Pillow decodes; nothing else of it is used.

The classes of its four formats are called themselves. `Image.open` would load and try others: a JPEG with a second picture
behind it becomes an MPO, and whatever it does not know makes it import all that it has.

Colours are those that transformers' `load_image` gives, bit for bit: Pillow's conversion to RGB after turning upright. So
transparency is dropped, not laid over white; grey of 16 bits is cut at 255; CMYK is converted without its colour profile.
"""

import logging
from io import BytesIO
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from workers.errors import ImageFault, ImageRejected
from workers.images import exif
from workers.images.header import ImageHeader
from workers.images.kind import ImageFormat
from workers.images.outline import check_scans, damaged, needed

logger = logging.getLogger(__name__)

_OPEN: Final[dict[ImageFormat, type[ImageFile.ImageFile]]] = {
    ImageFormat.PNG: PngImagePlugin.PngImageFile,
    ImageFormat.JPEG: JpegImagePlugin.JpegImageFile,
    ImageFormat.WEBP: WebPImagePlugin.WebPImageFile,
    ImageFormat.GIF: GifImagePlugin.GifImageFile,
}

#: The most that decoding holds at once for each pixel, the array that it returns among it. A progressive JPEG keeps the
#: coefficients of all its components; WebP draws on two canvases and copies.
PEAK_BYTES_PER_PIXEL: Final = {
    ImageFormat.PNG: 8,
    ImageFormat.JPEG: 13,
    ImageFormat.WEBP: 21,
    ImageFormat.GIF: 6,
}
#: Rows are converted in strips of so many pixels.
STRIP_PIXELS = 2**18
#: Buffers of the codecs, and one strip.
FIXED_BYTES = 8 * 2**20


def peak_bytes(header: ImageHeader) -> int:
    """Bytes that `decode` allocates at most at one time: for the file's copy, the codec and the array."""
    num_file_bytes = sum(hi - lo for lo, hi in header.parts)
    return num_file_bytes + header.num_pixels * PEAK_BYTES_PER_PIXEL[header.format] + FIXED_BYTES


def decode(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    """Pixels of the first frame: [height, width, 3] uint8 RGB, upright, contiguous and writable.

    header: what `read_header` said of the same data. Raises ImageRejected, whatever is wrong with the file.
    """
    try:
        return _decode(data, header)
    except ImageRejected:
        raise
    except MemoryError:
        refusal = ImageRejected(
            f"there is not enough memory for its {header.width} x {header.height} pixels; scale it down",
            ImageFault.TOO_LARGE,
        )
    except Exception as error:
        # A broken file makes a decoder raise anything at all.
        logger.debug("image_decode_failed", exc_info=True)
        refusal = damaged(f"its pixels cannot be decoded ({_why(error)})")
    # Outside of the handler: as its context the decoder's error would keep all pixels alive.
    raise refusal


def _decode(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    file = needed(data, header.parts)
    if header.format is ImageFormat.JPEG:
        check_scans(file)
    with _OPEN[header.format](BytesIO(file)) as image:
        del file
        width, height = header.width, header.height
        stored = (height, width) if header.orientation in exif.TURNED else (width, height)
        if image.size != stored:
            raise damaged(f"its pixels are {image.size[0]} x {image.size[1]}, other than its header says")
        image.load()
        upright = np.empty((height, width, 3), dtype=np.uint8)
        _copy(image, as_stored(upright, header.orientation))
    return upright


def _copy(image: Image.Image, out: NDArray[np.uint8]) -> None:
    """Pixels as RGB, strip by strip, so that no second picture is made on the way."""
    width, height = image.size
    num_rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        strip = image.crop((0, top, width, bottom))
        out[top:bottom] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def as_stored(upright: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The same memory, seen as the file has it: [stored height, stored width, 3].

    Source: Exif 2.3 section 4.6.4, which says where the stored first row and first column are when upright.
    """
    stored = upright.swapaxes(0, 1) if orientation in exif.TURNED else upright
    if orientation in (3, 4, 6, 7):
        stored = stored[::-1]
    if orientation in (2, 3, 7, 8):
        stored = stored[:, ::-1]
    return stored


def _why(error: Exception) -> str:
    """What the decoder says, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
