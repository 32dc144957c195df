"""Pictures for `--image FILE`: the files, read and checked as a gateway would check them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from protos import inference_pb2 as pb
from workers.errors import ImageRejected
from workers.images.header import read_header, read_headers
from workers.images.limits import ImageLimits

_REDUCTION_FIELDS = {
    "merge": "merge_threshold",
    "global": "global_threshold",
    "individual": "individual_threshold",
    "keys": "key_fraction",
}


class ImageArgument(NamedTuple):
    """One picture. media_type: by its content, whatever its name ends in."""

    name: str
    data: bytes
    media_type: str
    width: int
    height: int


def add_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """--image, any number of times. what: they are for."""
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help=f"a picture (PNG, JPEG, WebP, GIF) {what}; may be given several times",
    )


def reduction(text: str) -> pb.ImageReduction:
    """`off`, or numbers by name with commas between them. Raises ValueError; ranges are the gateway's to check."""
    message = pb.ImageReduction()
    for part in text.split(",") if text != "off" else ():
        name, _, value = part.partition("=")
        field = _REDUCTION_FIELDS.get(name.strip())
        if field is None:
            raise ValueError(name)
        setattr(message, field, float(value))
    return message


def to_pb(images: Sequence[ImageArgument]) -> list[pb.Image]:
    """As they are sent."""
    return [pb.Image(data=image.data, media_type=image.media_type) for image in images]


def read_images(names: Sequence[str], limits: ImageLimits | None = None) -> tuple[ImageArgument, ...]:
    """The pictures in these files, in order.

    Raises argparse.ArgumentTypeError, which names the file and says what to do.
    """
    limits = limits or ImageLimits()
    if len(names) > limits.max_images:
        # Before any of them is read.
        raise argparse.ArgumentTypeError(f"{len(names)} images, and {limits.max_images} are allowed")
    images = tuple(_read(name, limits) for name in names)
    try:
        read_headers([(image.data, image.media_type) for image in images], limits)
    except ImageRejected as error:
        raise argparse.ArgumentTypeError(error.problem) from None
    return images


def _read(name: str, limits: ImageLimits) -> ImageArgument:
    try:
        with Path(name).open("rb") as file:
            # One byte more tells that there is more; a device would go on for ever.
            data = file.read(limits.max_bytes + 1)
    except IsADirectoryError:
        raise argparse.ArgumentTypeError(f"{name!r} is a folder; name the files in it") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise argparse.ArgumentTypeError(f"{name!r} cannot be read: {why}") from error
    if len(data) > limits.max_bytes:
        raise argparse.ArgumentTypeError(
            f"{name!r} has more than {limits.max_bytes / 2**20:g} MiB, which are allowed; scale the picture down"
        )
    try:
        header = read_header(data, "", limits)
    except ImageRejected as error:
        raise argparse.ArgumentTypeError(f"{name!r}: {error.problem}") from None
    return ImageArgument(name, data, header.media_type, header.width, header.height)
