"""Files for `--image`: which are read, how they are sent, and what is said of the others."""

import argparse
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli import exit_codes
from orchestrator.cli.images import ImageArgument, read_images
from orchestrator.cli.main import main
from protos import inference_pb2 as pb
from tests.support.fake_gateway import FakeGateway, running
from tests.support.image_files import exif_of, picture, saved
from workers.images.limits import ImageLimits

PNG_BYTES = saved(picture(), "PNG")
JPEG_BYTES = saved(picture(), "JPEG")
PNG = pb.Image(data=PNG_BYTES, media_type="image/png")
JPEG = pb.Image(data=JPEG_BYTES, media_type="image/jpeg")


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with running(FakeGateway()) as fake:
        yield fake


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A PNG and a JPEG."""
    png, jpeg = tmp_path / "one.png", tmp_path / "two with blanks.jpg"
    png.write_bytes(PNG_BYTES)
    jpeg.write_bytes(JPEG_BYTES)
    return str(png), str(jpeg)


def asked(*parts: pb.Image | str) -> pb.ChatMessage:
    """By the user."""
    return pb.ChatMessage(
        role="user",
        parts=[
            pb.ContentPart(text=part) if isinstance(part, str) else pb.ContentPart(image=part)
            for part in parts
        ],
    )


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


def test_chat_sends_pictures_before_the_text(gateway: FakeGateway, files: tuple[str, str]) -> None:
    one, two = files
    arguments = ["chat", "What is it?", "--image", two, "--image", one, "--address", gateway.address]
    assert main(arguments) == exit_codes.OK
    assert list(gateway.requests[0].chat.messages) == [asked(JPEG, PNG, "What is it?")]


def test_generate_sends_pictures_beside_the_text(gateway: FakeGateway, files: tuple[str, str]) -> None:
    arguments = ["generate", "a <image> b <image>", "--address", gateway.address]
    assert main([*arguments, "--image", files[0], "--image", files[1]]) == exit_codes.OK
    assert gateway.requests[0].text == "a <image> b <image>"
    assert list(gateway.requests[0].images) == [PNG, JPEG]


def test_pictures_of_a_conversation_stay_with_their_message(
    gateway: FakeGateway,
    files: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = files
    typed = f"first\n/image {two}\n/image  {one} \nsecond\nthird\n/image {one}\n/reset\nfourth\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
    assert main(["chat", "--image", one, "--address", gateway.address]) == exit_codes.OK
    answer = pb.ChatMessage(role="assistant", content="Paris.")
    first, second = asked(PNG, "first"), asked(JPEG, PNG, "second")
    third, fourth = (pb.ChatMessage(role="user", content=text) for text in ("third", "fourth"))
    assert [list(request.chat.messages) for request in gateway.requests] == [
        [first],
        [first, answer, second],
        [first, answer, second, answer, third],
        [fourth],
    ]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"({two!r}, 29 x 17 pixels, goes with the next message)",
        f"({one!r}, 29 x 17 pixels, goes with the next message)",
        f"({one!r}, 29 x 17 pixels, goes with the next message)",
        "(forgotten)",
    ]


def test_a_conversation_goes_on_after_a_picture_that_cannot_be_read(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = b"/image\n/image nowhere.png\n/image \xff.png\nhello\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    assert main(["chat", "--address", gateway.address]) == exit_codes.OK
    assert list(gateway.requests[0].chat.messages) == [pb.ChatMessage(role="user", content="hello")]
    assert capsys.readouterr().err.splitlines() == [
        "which picture? /image FILE",
        "'nowhere.png' cannot be read: No such file or directory",
        "'\\udcff.png' cannot be read: No such file or directory",
    ]


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_a_file_that_cannot_be_sent_is_a_usage_error(
    gateway: FakeGateway, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "x", "--image", "nowhere.png", "--address", gateway.address]) == exit_codes.USAGE
    assert capsys.readouterr().err == "'nowhere.png' cannot be read: No such file or directory\n"
    assert gateway.requests == []


def test_pictures_do_not_go_with_token_ids(
    gateway: FakeGateway, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--token-ids", "1", "--image", files[0], "--address", gateway.address]
    assert main(arguments) == exit_codes.USAGE
    assert capsys.readouterr().err == "--image needs a PROMPT with a placeholder, not --token-ids\n"
