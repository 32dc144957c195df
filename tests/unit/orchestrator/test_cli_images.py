"""Files for `--image`: which are read, and what is said of the others."""

import argparse
import os
import threading
from pathlib import Path

import pytest

from orchestrator.cli.images import ImageArgument, read_images
from tests.support.image_files import exif_of, picture, saved
from workers.images.limits import ImageLimits

PNG_BYTES = saved(picture(), "PNG")


def refusal(names: list[str], limits: ImageLimits | None = None) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        read_images(names, limits)
    return str(caught.value)


def test_files_are_read_in_order_with_the_type_of_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "no ending"
    jpeg = saved(picture(), "JPEG", exif=exif_of(6))
    # The name lies.
    first.write_bytes(jpeg)
    second.write_bytes(PNG_BYTES)
    assert read_images([str(first), str(second)]) == (
        ImageArgument(str(first), jpeg, "image/jpeg", 17, 29),
        ImageArgument(str(second), PNG_BYTES, "image/png", 29, 17),
    )
    assert read_images([]) == ()


def test_a_pipe_is_read_as_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(PNG_BYTES,))
    writer.start()
    assert read_images([str(pipe)])[0].data == PNG_BYTES
    writer.join()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.png")
    assert refusal([missing]) == f"{missing!r} cannot be read: No such file or directory"
    assert refusal([str(tmp_path)]) == f"{str(tmp_path)!r} is a folder; name the files in it"
    assert "cannot be read" in refusal(["a\0b"])
    assert "cannot be read" in refusal(["x" * 5000])


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    good, text, empty = tmp_path / "good.png", tmp_path / "text.png", tmp_path / "empty.png"
    good.write_bytes(PNG_BYTES)
    text.write_text("hello")
    empty.write_bytes(b"")
    assert refusal([str(good), str(text)]).startswith(f"{str(text)!r}: it is text and no picture")
    assert refusal([str(empty)]).startswith(f"{str(empty)!r}: it is empty")


def test_limits_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(PNG_BYTES)
    name, size = str(file), len(PNG_BYTES)
    assert "which are allowed" in refusal([name], ImageLimits(max_bytes=size - 1))
    assert "pixels" in refusal([name], ImageLimits(max_side=28))
    assert "together" in refusal([name] * 2, ImageLimits(max_bytes=size, max_total_bytes=2 * size - 1))
    assert refusal(["no such file"] * 33) == "33 images, and 32 are allowed"


def test_a_device_without_end_is_refused() -> None:
    assert "has more than 1 MiB" in refusal(["/dev/zero"], ImageLimits(max_bytes=2**20))
