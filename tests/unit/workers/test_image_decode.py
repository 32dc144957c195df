"""From a file to pixels: every format and mode, equal to what transformers loads, and refusals of what is broken."""

import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from tests.support.image_files import (
    LIMITS,
    MODES,
    exif_of,
    is_taken,
    mutations,
    picture,
    png_chunk,
    png_of_size,
    saved,
    seeds,
)
from workers.errors import ImageFault, ImageRejected
from workers.images import decode as decode_module
from workers.images import outline
from workers.images.decode import as_stored, decode
from workers.images.header import ImageHeader, read_header

EVERY_MODE = [(image_format, mode) for image_format, modes in MODES.items() for mode in modes]


def decoded(data: bytes) -> NDArray[np.uint8]:
    return decode(data, read_header(data, "", LIMITS))


def by_transformers(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        # Pillow warns of palettes whose colours are transparent by degrees.
        warnings.simplefilter("ignore")
        found: NDArray[np.uint8] = convert_to_rgb(load_image(Image.open(BytesIO(data))), return_numpy=True)
    return found


def refusal(data: bytes) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        decoded(data)
    return caught.value


@pytest.mark.parametrize(("image_format", "mode"), EVERY_MODE)
def test_every_mode_is_decoded_as_transformers_does(image_format: str, mode: str) -> None:
    data = saved(picture(mode), image_format)
    pixels = decoded(data)
    assert pixels.shape == (17, 29, 3)
    np.testing.assert_array_equal(pixels, by_transformers(data))
    assert is_taken(data)


@pytest.mark.parametrize("data", seeds())
def test_every_layout_of_a_file_is_decoded_as_transformers_does(data: bytes) -> None:
    np.testing.assert_array_equal(decoded(data), by_transformers(data))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(image_format: str, orientation: int) -> None:
    data = saved(picture(), image_format, exif=exif_of(orientation))
    np.testing.assert_array_equal(decoded(data), by_transformers(data))


def test_the_stored_picture_is_a_view_of_the_upright_one() -> None:
    upright = np.zeros((2, 3, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        stored = as_stored(upright, orientation)
        assert stored.shape == ((2, 3, 3) if orientation < 5 else (3, 2, 3))
        assert np.shares_memory(stored, upright)


def test_more_than_one_strip_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(picture(), "PNG", exif=exif_of(7))
    whole = decoded(data)
    for strip_pixels in (1, 29 * 3, 29 * 16):
        monkeypatch.setattr(decode_module, "STRIP_PIXELS", strip_pixels)
        np.testing.assert_array_equal(decoded(data), whole)


def test_pixels_of_a_lossless_file_are_the_picture() -> None:
    expected = np.asarray(picture())
    for data in (saved(picture(), "PNG"), saved(picture(), "WEBP", lossless=True)):
        np.testing.assert_array_equal(decoded(data), expected)


def test_transparency_is_dropped() -> None:
    picture_with_alpha = picture("RGBA")
    colours = np.asarray(picture_with_alpha)[..., :3]
    np.testing.assert_array_equal(decoded(saved(picture_with_alpha, "PNG")), colours)


def test_colours_of_16_bits_keep_the_upper_8() -> None:
    rows = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000
    samples = np.stack([rows, rows + 77, rows + 300], axis=-1).astype(">u2")
    scanlines = b"".join(b"\0" + samples[row].tobytes() for row in range(2))
    header = bytes.fromhex("00000003 00000002 10 02 00 00 00")
    file = png_of_size(1, 1)[:8] + png_chunk(b"IHDR", header)
    file += png_chunk(b"IDAT", zlib.compress(scanlines)) + png_chunk(b"IEND", b"")
    np.testing.assert_array_equal(decoded(file), samples >> 8)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF"])
def test_of_an_animation_the_first_frame_is_taken(image_format: str) -> None:
    red, blue = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (8, 4), "blue")
    data = saved(red, image_format, save_all=True, append_images=[blue], lossless=True)
    pixels = decoded(data)
    assert (pixels[..., 0] > 240).all()
    assert (pixels[..., 2] < 16).all()


def test_a_gif_frame_smaller_than_its_screen_lies_on_the_transparent_colour() -> None:
    data = bytearray(saved(picture("P"), "GIF", transparency=3))
    data[6:10] = (40).to_bytes(2, "little") + (30).to_bytes(2, "little")
    pixels = decoded(bytes(data))
    assert pixels.shape == (30, 40, 3)
    np.testing.assert_array_equal(pixels, by_transformers(bytes(data)))


def test_profiles_comments_and_second_pictures_do_not_reach_the_decoder() -> None:
    rgb = picture()
    plain = saved(rgb, "JPEG")
    # What a telephone writes: EXIF, a profile, an index of pictures, and another picture behind.
    app2 = b"\xff\xe2" + (2 + 84).to_bytes(2, "big") + b"MPF\0" + bytes(80)
    rich = plain[:2] + app2 + plain[2:] + saved(rgb.rotate(180), "JPEG")
    np.testing.assert_array_equal(decoded(rich), decoded(plain))
    header = read_header(rich, "", LIMITS)
    assert b"MPF" not in outline.needed(rich, header.parts)
    text = png_chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(2**22)))
    bomb = saved(rgb, "PNG")
    bomb = bomb[:33] + text * 200 + bomb[33:]
    np.testing.assert_array_equal(decoded(bomb), np.asarray(rgb))


def test_a_corrupt_profile_of_a_jpeg_is_no_reason_to_refuse_it() -> None:
    plain = saved(picture(), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60
    bad = plain[:2] + b"\xff\xe1" + (2 + len(exif)).to_bytes(2, "big") + exif + plain[2:]
    assert is_taken(bad)


@pytest.mark.parametrize("data", seeds())
def test_a_file_cut_anywhere_is_refused_or_whole(data: bytes) -> None:
    whole = decoded(data)
    assert not is_taken(data[: len(data) // 2])
    for length in range(0, len(data), 97):
        if is_taken(data[:length]):
            assert decoded(data[:length]).shape == whole.shape


def test_a_truncated_photo_says_what_to_do() -> None:
    for image_format in MODES:
        data = saved(picture(), image_format)
        error = refusal(data[: len(data) * 2 // 3])
        assert error.fault is ImageFault.DAMAGED
        assert "damaged; save or send it anew" in str(error)


def test_other_pixels_than_the_header_says_are_refused() -> None:
    data = saved(picture(), "PNG")
    header = read_header(data, "", LIMITS)
    other = ImageHeader(header.format, 30, 17, 1, header.parts)
    with pytest.raises(ImageRejected, match="29 x 17, other than its header says"):
        decode(data, other)


@pytest.mark.parametrize(
    "error", [SyntaxError("x"), OverflowError(), ValueError("y" * 999), RecursionError(), EOFError()]
)
def test_whatever_a_decoder_raises_becomes_a_refusal(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "crop", fail)
    refused = refusal(saved(picture(), "PNG"))
    assert refused.fault is ImageFault.DAMAGED
    assert len(str(refused)) < 250
    assert refused.__context__ is None


def test_no_memory_for_one_picture_is_a_refusal_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "crop", fail)
    assert refusal(saved(picture(), "PNG")).fault is ImageFault.TOO_LARGE


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = saved(picture(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    error = refusal(data[:-2] + scan * outline.MAX_SCANS + data[-2:])
    assert error.fault is ImageFault.TOO_LARGE
    assert "too many scans" in str(error)


def test_what_looks_like_scans_behind_the_end_of_a_jpeg_does_not_count() -> None:
    data = saved(picture(), "JPEG", progressive=True)
    np.testing.assert_array_equal(decoded(data + b"\xff\xda\0\0" * 500), decoded(data))


def test_thousands_of_broken_files_are_decoded_or_refused() -> None:
    # The same by the hundred thousand: tests/fuzz/broken_images.py.
    taken = [is_taken(data) for data in mutations(seeds(), 3000, seed=7)]
    assert 100 < sum(taken) < 2000


PEAKS = """
import sys
import numpy as np
from workers.images.decode import decode, peak_bytes
from workers.images.header import read_header
from workers.images.limits import ImageLimits

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

small = open(sys.argv[1], "rb").read()
decode(small, read_header(small, "", ImageLimits()))
for name in sys.argv[2:]:
    data = open(name, "rb").read()
    header = read_header(data, "", ImageLimits())
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    pixels = decode(data, header)
    print(resident("VmHWM") - before, peak_bytes(header), pixels.nbytes)
    del pixels
print(*sorted(name for name in sys.modules if name.endswith("ImagePlugin")))
"""
FOUR_PLUGINS = "PIL.GifImagePlugin PIL.JpegImagePlugin PIL.PngImagePlugin PIL.WebPImagePlugin"


def test_decoding_needs_no_more_memory_than_is_counted_and_no_other_plugin(tmp_path: Path) -> None:
    large = picture("RGB", 2000, 1500)
    files = {
        "small.png": saved(picture(), "PNG"),
        "rgb.png": saved(large, "PNG", compress_level=1),
        "cmyk.jpg": saved(large.convert("CMYK"), "JPEG", progressive=True, subsampling=0),
        "lossless.webp": saved(large, "WEBP", lossless=True, method=0, quality=0),
        "palette.gif": saved(large.convert("P"), "GIF"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name in files)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, plugins = found.stdout.splitlines()
    assert plugins == FOUR_PLUGINS
    assert len(lines) == len(files) - 1
    for name, line in zip(list(files)[1:], lines, strict=True):
        peak, counted, result = map(int, line.split())
        assert result <= peak <= counted, f"{name}: {peak} bytes at most, {counted} counted"


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\1\0\0WEBPVP8X"]),
    rest=st.binary(max_size=300),
)
def test_any_bytes_are_decoded_or_refused(start: bytes, rest: bytes) -> None:
    is_taken(start + rest)


@settings(max_examples=200, deadline=None)
@given(
    file=st.sampled_from(seeds()),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), max_size=6),
)
def test_any_edits_of_a_file_are_decoded_or_refused(
    file: bytes, edits: list[tuple[float, int, bytes]]
) -> None:
    data = bytearray(file)
    for place, num_gone, new in edits:
        at = int(place * len(data))
        data[at : at + num_gone] = new
    is_taken(bytes(data))
