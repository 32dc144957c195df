"""What a picture is, read without decoding it: cheap enough for the gateway. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.errors import ImageFault, ImageRejected
from workers.images import exif
from workers.images.kind import ImageFormat, check_media_type, format_of
from workers.images.limits import MIB, ImageLimits
from workers.images.outline import outline


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """A file that may be decoded. width, height: pixels, upright.

    orientation: 1 to 8, how it is stored, as EXIF counts. parts: from, to, of the bytes that the pixels need.
    """

    format: ImageFormat
    width: int
    height: int
    orientation: int
    parts: tuple[tuple[int, int], ...]

    @property
    def num_pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def media_type(self) -> str:
        """By its content."""
        return self.format.media_type


def read_header(data: bytes, media_type: str, limits: ImageLimits) -> ImageHeader:
    """Format and size of a file. media_type: what it was sent as, "" when nothing is said.

    What passes may still be damaged further on. Raises ImageRejected.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(
            f"it has {_mib(len(data))} MiB, and {_mib(limits.max_bytes)} MiB are allowed; send a smaller file"
        )
    found = format_of(data)
    check_media_type(media_type, found)
    seen = outline(data, found)
    width, height = seen.width, seen.height
    if width == 0 or height == 0:
        raise ImageRejected(f"it has {width} x {height} pixels, so nothing is to be seen", ImageFault.EMPTY)
    if max(width, height) > limits.max_side:
        raise _too_large(
            f"it has {width} x {height} pixels, and {limits.max_side} on a side are allowed; scale it down"
        )
    if width * height > limits.max_pixels:
        raise _too_large(
            f"it has {width} x {height} = {width * height} pixels, and {limits.max_pixels} are allowed; scale it down"
        )
    if seen.orientation in exif.TURNED:
        width, height = height, width
    return ImageHeader(found, width, height, seen.orientation, seen.parts)


def read_headers(files: Sequence[tuple[bytes, str]], limits: ImageLimits) -> list[ImageHeader]:
    """Those of all pictures of one request, each with what it was sent as. Raises ImageRejected, which says which one."""
    if len(files) > limits.max_images:
        raise ImageRejected(
            f"the request has {len(files)} pictures, and {limits.max_images} are allowed; send fewer",
            ImageFault.TOO_MANY,
        )
    num_bytes = sum(len(data) for data, _ in files)
    if num_bytes > limits.max_total_bytes:
        raise _too_large(
            f"the pictures of the request have {_mib(num_bytes)} MiB together, and {_mib(limits.max_total_bytes)} MiB"
            " are allowed; send smaller or fewer ones"
        )
    headers = []
    for number, (data, media_type) in enumerate(files, start=1):
        try:
            headers.append(read_header(data, media_type, limits))
        except ImageRejected as error:
            raise error.of(number) from None
    return headers


def _too_large(problem: str) -> ImageRejected:
    return ImageRejected(problem, ImageFault.TOO_LARGE)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:.4g}"
