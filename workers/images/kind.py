"""What a file is, by its first bytes. Pure.

The first bytes alone decide, so a file that is two things at once is the one that it begins as.
"""

import codecs
from enum import StrEnum

from workers.errors import ImageFault, ImageRejected

MAX_TEXT_LOOK = 1024
TAKEN = "PNG, JPEG, WebP or GIF"


class ImageFormat(StrEnum):
    """The formats that are taken."""

    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WebP"
    GIF = "GIF"

    @property
    def media_type(self) -> str:
        """As in image/png."""
        return f"image/{self.value.lower()}"


MEDIA_TYPES = {known.media_type: known for known in ImageFormat} | {"image/jpg": ImageFormat.JPEG}

#: Pictures that are not taken, and what else is often sent for one.
_OTHERS = (
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"II+\0", "a TIFF picture"),
    (b"MM\0+", "a TIFF picture"),
    (b"8BPS", "a PSD picture"),
    (b"\0\0\x01\0", "an ICO picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"\x8aMNG", "an MNG picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
)
#: The brand of an ISO media file, after `ftyp`.
_BRANDS = {
    b"avif": "an AVIF picture",
    b"avis": "an AVIF picture",
    b"heic": "a HEIC picture",
    b"heix": "a HEIC picture",
    b"hevc": "a HEIC picture",
    b"mif1": "a HEIF picture",
    b"msf1": "a HEIF picture",
}
#: How base64 of a JPEG, a PNG, a GIF or a WebP begins.
_BASE64 = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR")


def format_of(data: bytes) -> ImageFormat:
    """The format of this file. Raises ImageRejected, which names what it is where that can be told."""
    if not data:
        raise ImageRejected("it is empty; send the bytes of the file", ImageFault.EMPTY)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ImageFormat.PNG
    if data.startswith(b"\xff\xd8\xff"):
        return ImageFormat.JPEG
    if data.startswith((b"GIF87a", b"GIF89a")):
        return ImageFormat.GIF
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ImageFormat.WEBP
    raise _refusal(data)


def check_media_type(media_type: str, found: ImageFormat) -> None:
    """Raises ImageRejected where the file was sent as something else; "" says nothing, parameters are ignored."""
    said = media_type.partition(";")[0].strip().lower()
    if not said or MEDIA_TYPES.get(said) is found:
        return
    raise ImageRejected(
        f"it was sent as {_shown(media_type)} and is {found.value}; send {found.media_type}, or no media type",
        ImageFault.MEDIA_TYPE,
    )


def _refusal(data: bytes) -> ImageRejected:
    text = _as_text(data[:MAX_TEXT_LOOK])
    if text is not None and text.startswith((b"data:", *_BASE64)):
        return ImageRejected(
            "it is base64 text; decode it and send the bytes of the file", ImageFault.NOT_AN_IMAGE
        )
    if text is not None and b"<svg" in text.lower():
        return _not_taken("an SVG picture")
    if data[4:8] == b"ftyp":
        return _not_taken(_BRANDS.get(data[8:12], "a video"))
    for magic, what in _OTHERS:
        if data.startswith(magic) and not (text is not None and magic == b"BM"):
            return _not_taken(what)
    if text is not None:
        return ImageRejected(f"it is text and no picture; send {TAKEN}", ImageFault.NOT_AN_IMAGE)
    return ImageRejected(f"it is no picture that is known here; send {TAKEN}", ImageFault.NOT_AN_IMAGE)


def _not_taken(what: str) -> ImageRejected:
    return ImageRejected(f"it is {what}, which is not taken; convert it to {TAKEN}", ImageFault.FORMAT)


def _as_text(begin: bytes) -> bytes | None:
    """`begin` without byte order mark and white space before it where it reads as UTF-8; else None."""
    try:
        # A decoder that expects more does not mind a character that is cut at the end.
        codecs.getincrementaldecoder("utf-8")().decode(begin)
    except UnicodeDecodeError:
        return None
    if any(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in begin):
        return None
    return begin.removeprefix(codecs.BOM_UTF8).lstrip()


def _shown(media_type: str) -> str:
    return repr(media_type if len(media_type) <= 60 else media_type[:57] + "...")
