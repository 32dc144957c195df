"""What a picture is, by its header: which files are taken, and how the others are refused."""

import struct

import pytest
from PIL import Image

from tests.support.image_files import (
    LIMITS,
    MODES,
    exif_of,
    picture,
    png_chunk,
    png_of_size,
    saved,
)
from workers.errors import ImageFault, ImageRejected
from workers.images import outline
from workers.images.exif import orientation
from workers.images.header import read_header, read_headers
from workers.images.kind import ImageFormat
from workers.images.limits import ImageLimits

PNG_BYTES = saved(picture(), "PNG")
GIF_BYTES = saved(picture("P"), "GIF")


def refusal(data: bytes, media_type: str = "", limits: ImageLimits = LIMITS) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        read_header(data, media_type, limits)
    return caught.value


@pytest.mark.parametrize("image_format", MODES)
def test_format_and_size_are_those_of_the_file(image_format: str) -> None:
    header = read_header(saved(picture(), image_format), "", LIMITS)
    assert (header.format.value.upper(), header.width, header.height) == (image_format, 29, 17)
    assert header.media_type == f"image/{image_format.lower()}"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_size_is_the_upright_one(image_format: str, turn: int) -> None:
    header = read_header(saved(picture(), image_format, exif=exif_of(turn)), "", LIMITS)
    assert header.orientation == turn
    assert (header.width, header.height) == ((29, 17) if turn < 5 else (17, 29))


def test_exif_after_the_pixels_of_a_png_counts() -> None:
    end = PNG_BYTES.rindex(b"IEND") - 4
    turned = PNG_BYTES[:end] + png_chunk(b"eXIf", exif_of(8).tobytes()) + PNG_BYTES[end:]
    assert read_header(turned, "", LIMITS).orientation == 8


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_orientation_is_read_in_either_byte_order_and_any_width(order: str, kind: int) -> None:
    magic = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I"}[kind], 6)
    other = struct.pack(order + "HHII", 0x010F, 3, 1, 0)
    directory = struct.pack(order + "H", 2) + other + struct.pack(order + "HHI", 0x0112, kind, 1) + value
    exif = magic + struct.pack(order + "I", 8) + directory
    assert orientation(exif) == orientation(b"Exif\0\0" + exif) == 6
    assert [orientation(exif[:length]) for length in range(len(exif) - 4)] == [1] * (len(exif) - 4)


def test_orientation_that_makes_no_sense_is_upright() -> None:
    good = exif_of(6).tobytes()
    assert orientation(good) == 6
    assert orientation(good.replace(b"\x06", b"\x09")) == 1
    assert orientation(b"Exif\0\0II*\0\xff\xff\xff\xff") == 1
    assert orientation(b"") == 1


@pytest.mark.parametrize(
    ("data", "fault", "says"),
    [
        (b"", ImageFault.EMPTY, "empty"),
        (b"hello, what is in this picture?\n", ImageFault.NOT_AN_IMAGE, "text and no picture"),
        ("Grüße\n".encode() * 500, ImageFault.NOT_AN_IMAGE, "text and no picture"),
        (b"BMW is a car\n", ImageFault.NOT_AN_IMAGE, "text and no picture"),
        (b"data:image/png;base64,iVBORw0KGgo", ImageFault.NOT_AN_IMAGE, "base64"),
        (b"iVBORw0KGgoAAAANSUhEUg", ImageFault.NOT_AN_IMAGE, "base64"),
        (b"\x00\x01\x02\x03" * 9, ImageFault.NOT_AN_IMAGE, "no picture that is known"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", ImageFault.NOT_AN_IMAGE, "no picture that is known"),
        (b'<?xml version="1.0"?><svg/>', ImageFault.FORMAT, "SVG"),
        (b"II*\0\x08\0\0\0", ImageFault.FORMAT, "TIFF"),
        (b"8BPS\x00\x01", ImageFault.FORMAT, "PSD"),
        (b"\0\0\0\x1cftypheic", ImageFault.FORMAT, "HEIC"),
        (b"\0\0\0\x1cftypavif", ImageFault.FORMAT, "AVIF"),
        (b"\0\0\0\x1cftypisom", ImageFault.FORMAT, "video"),
        (b"%PDF-1.7\n\xff\xff", ImageFault.FORMAT, "PDF"),
        (saved(picture(), "BMP"), ImageFault.FORMAT, "BMP"),
        (saved(picture(), "TIFF"), ImageFault.FORMAT, "TIFF"),
        (saved(picture(), "PPM"), ImageFault.NOT_AN_IMAGE, "no picture that is known"),
    ],
)
def test_what_is_no_picture_that_we_take_is_refused_by_name(
    data: bytes, fault: ImageFault, says: str
) -> None:
    error = refusal(data)
    assert error.fault is fault
    assert says in str(error)


@pytest.mark.parametrize("media_type", ["", "image/png", "IMAGE/PNG", "image/png; charset=binary"])
def test_media_type_of_the_content_is_taken(media_type: str) -> None:
    assert read_header(PNG_BYTES, media_type, LIMITS).format is ImageFormat.PNG


def test_the_other_name_of_jpeg_is_taken() -> None:
    assert read_header(saved(picture(), "JPEG"), "image/jpg", LIMITS).format is ImageFormat.JPEG


@pytest.mark.parametrize("media_type", ["image/jpeg", "text/plain", "image/tiff", "png", "x" * 9999])
def test_another_media_type_is_refused(media_type: str) -> None:
    error = refusal(PNG_BYTES, media_type)
    assert error.fault is ImageFault.MEDIA_TYPE
    assert "image/png" in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels_are_refused(size: tuple[int, int]) -> None:
    assert refusal(png_of_size(*size)).fault is ImageFault.EMPTY
    gif = bytearray(GIF_BYTES)
    frame = gif.index(b",", 13 + 768)
    struct.pack_into("<HH", gif, frame + 5, *size)
    assert refusal(bytes(gif)).fault is ImageFault.EMPTY


@pytest.mark.parametrize("size", [(2**31, 2**31), (2**32 - 1, 1), (16385, 1), (16384, 4097)])
def test_a_decompression_bomb_is_refused_by_its_size(size: tuple[int, int]) -> None:
    error = refusal(png_of_size(*size))
    assert error.fault is ImageFault.TOO_LARGE
    assert f"{size[0]} x {size[1]}" in str(error)


def test_a_gif_frame_that_sticks_out_of_the_screen_counts() -> None:
    gif = bytearray(GIF_BYTES)
    frame = gif.index(b",", 13 + 768)
    struct.pack_into("<HH", gif, frame + 1, 65535, 65535)
    assert refusal(bytes(gif)).fault is ImageFault.TOO_LARGE


def test_photos_of_telephones_are_taken() -> None:
    assert read_header(png_of_size(4032, 3024), "", LIMITS).num_pixels == 12_192_768
    assert read_header(png_of_size(8192, 8192), "", LIMITS).num_pixels == LIMITS.max_pixels


def test_bytes_are_limited_before_anything_is_read() -> None:
    limits = ImageLimits(max_bytes=len(PNG_BYTES) - 1)
    assert refusal(PNG_BYTES, limits=limits).fault is ImageFault.TOO_LARGE
    assert read_header(PNG_BYTES, "", ImageLimits(max_bytes=len(PNG_BYTES)))


def test_the_picture_that_is_wrong_is_named() -> None:
    with pytest.raises(ImageRejected, match=r"^image 2: it is empty") as caught:
        read_headers([(PNG_BYTES, ""), (b"", "")], LIMITS)
    assert caught.value.number == 2
    assert len(read_headers([(PNG_BYTES, "")] * LIMITS.max_images, LIMITS)) == LIMITS.max_images


def test_ten_thousand_pictures_are_refused_at_once() -> None:
    with pytest.raises(ImageRejected, match="10000 pictures, and 32 are allowed") as caught:
        read_headers([(PNG_BYTES, "")] * 10_000, LIMITS)
    assert caught.value.fault is ImageFault.TOO_MANY


def test_bytes_of_all_pictures_are_limited_together() -> None:
    limits = ImageLimits(max_bytes=len(PNG_BYTES), max_total_bytes=2 * len(PNG_BYTES))
    assert read_headers([(PNG_BYTES, "")] * 2, limits)
    with pytest.raises(ImageRejected, match="together") as caught:
        read_headers([(PNG_BYTES, "")] * 3, limits)
    assert caught.value.fault is ImageFault.TOO_LARGE


@pytest.mark.parametrize(
    "changes",
    [
        {"max_images": 0},
        {"max_bytes": -1},
        {"max_pixels": 10**9},
        {"max_side": 65536},
        {"max_total_bytes": 2**20},
        {"max_bytes": 2**31},
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, int]) -> None:
    LIMITS.validate()
    with pytest.raises(ValueError, match=r"^max_\w+ is -?\d+; allowed: "):
        ImageLimits(**changes).validate()


@pytest.mark.parametrize("image_format", MODES)
def test_a_header_that_is_cut_anywhere_is_refused_or_right(image_format: str) -> None:
    data = saved(picture(), image_format)
    whole = read_header(data, "", LIMITS)
    for length in range(min(len(data), 900)):
        try:
            cut = read_header(data[:length], "", LIMITS)
        except ImageRejected:
            continue
        assert (cut.width, cut.height) == (whole.width, whole.height)


@pytest.mark.parametrize(
    "data",
    [
        PNG_BYTES[:33] + png_chunk(b"teSt", b"") * outline.MAX_SEGMENTS,
        b"\xff\xd8" + b"\xff\xe3\x00\x02" * (outline.MAX_SEGMENTS + 1),
        b"GIF89a\x05\0\x05\0\0\0\0!\xfe" + b"\x01a" * (outline.MAX_GIF_BLOCKS + 1),
        b"GIF89a\x05\0\x05\0\0\0\0" + b"!\xfe\0" * (outline.MAX_GIF_BLOCKS + 1),
        b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10) + b"JUNK\0\0\0\0" * outline.MAX_SEGMENTS,
    ],
    ids=["PNG", "JPEG", "GIF blocks", "GIF extensions", "WebP"],
)
def test_millions_of_empty_segments_are_not_walked(data: bytes) -> None:
    error = refusal(data)
    assert error.fault is ImageFault.TOO_LARGE
    assert "too many" in str(error)


def test_padding_between_jpeg_segments_is_skipped() -> None:
    data = saved(picture(), "JPEG")
    padded = data[:2] + b"\xff" * 100_000 + data[2:]
    assert read_header(padded, "", LIMITS).width == 29


@pytest.mark.parametrize("bits", [12, 16])
def test_a_jpeg_of_more_bits_is_refused_by_name(bits: int) -> None:
    data = bytearray(saved(picture(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = bits
    assert refusal(bytes(data)).fault is ImageFault.FORMAT


def test_structure_that_is_said_twice_is_refused() -> None:
    jpeg = saved(picture(), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    twice = jpeg[:frame] + jpeg[frame : frame + 19] + jpeg[frame:]
    assert refusal(twice).fault is ImageFault.DAMAGED
    assert refusal(PNG_BYTES[:33] + PNG_BYTES[8:]).fault is ImageFault.DAMAGED


def test_headers_are_read_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("Pillow was called")

    files = [saved(picture(), image_format) for image_format in MODES]
    for name in ("open", "new", "frombytes"):
        monkeypatch.setattr(Image, name, fail)
    monkeypatch.setattr(Image.core, "new", fail)
    assert [read_header(data, "", LIMITS).width for data in files] == [29] * len(files)


def test_a_file_is_what_it_begins_as() -> None:
    hidden = [b"PK\x03\x04", b"<html><script>", GIF_BYTES, saved(picture(), "TIFF")]
    for other in hidden:
        assert read_header(PNG_BYTES + other, "", LIMITS).format is ImageFormat.PNG
    assert refusal(b"\n" + PNG_BYTES).fault is ImageFault.NOT_AN_IMAGE


def test_a_header_costs_the_same_for_large_files() -> None:
    # Work is counted in segments, not in bytes: the longest file that is allowed is one segment here.
    payload = bytes(LIMITS.max_bytes - len(PNG_BYTES) - 12)
    large = PNG_BYTES[:33] + png_chunk(b"teSt", payload) + PNG_BYTES[33:]
    assert len(large) == LIMITS.max_bytes
    assert read_header(large, "", LIMITS).parts == ((0, 33), (len(large) - len(PNG_BYTES) + 33, len(large)))
