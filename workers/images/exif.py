"""Which way up a picture is, by its EXIF data. Pure."""

import struct

UPRIGHT = 1
ORIENTATIONS = range(1, 9)
#: Those by which width and height change places.
TURNED = range(5, 9)

MAX_ENTRIES = 1024
_TAG_ORIENTATION = 0x0112
_PREFIX = b"Exif\0\0"
#: Types of TIFF by which a small number may be written, with struct's letter.
_NUMBERS = {1: "B", 3: "H", 4: "I"}


def orientation(exif: bytes) -> int:
    """1 to 8, as EXIF counts them; 1, upright, where nothing else is said or what is said makes no sense.

    exif: a TIFF header and its first directory, with or without the prefix that JPEG has before it.
    Source: TIFF 6.0 section 2, Exif 2.3 section 4.6.4 (tag 0x0112).
    """
    tiff = exif.removeprefix(_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return UPRIGHT
    try:
        return _first_directory(tiff, order)
    except struct.error:
        return UPRIGHT


def _first_directory(tiff: bytes, order: str) -> int:
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (num_entries,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(min(num_entries, MAX_ENTRIES)):
        place = at + 2 + 12 * entry
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, place)
        if tag != _TAG_ORIENTATION:
            continue
        if kind not in _NUMBERS or count != 1:
            return UPRIGHT
        (value,) = struct.unpack_from(order + _NUMBERS[kind], tiff, place + 8)
        return int(value) if value in ORIENTATIONS else UPRIGHT
    return UPRIGHT
