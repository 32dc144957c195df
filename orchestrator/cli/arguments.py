"""Types of arguments that several verbs take.

argparse puts the name of a type into "invalid ... value", so each has one that says what is allowed.
"""

import argparse
import math
import sys
from pathlib import Path


def number(text: str) -> float:
    """A finite number above 0. Raises ValueError."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def count(text: str) -> int:
    """1 or more, of 31 bits. Raises ValueError."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise ValueError
    return value


def count_or_zero(text: str) -> int:
    """0 or more, of 31 bits. Raises ValueError."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise ValueError
    return value


def integer(text: str) -> int:
    """A number of 32 bits. Raises ValueError."""
    value = int(text)
    if not -(2**31) <= value < 2**31:
        raise ValueError
    return value


def seed(text: str) -> int:
    """A number of 64 bits. Raises ValueError."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise ValueError
    return value


def token_id(text: str) -> int:
    """A number of 32 bits; whether the model has such a token is for the gateway to say. Raises ValueError."""
    return integer(text)


def token_ids(text: str) -> list[int]:
    """Token ids with commas between them. Raises ValueError."""
    return [token_id(part) for part in text.split(",")]


def token_bias(text: str) -> tuple[int, float]:
    """A token id and what is added to its logit. Raises ValueError."""
    token, _, bias = text.partition("=")
    return token_id(token), float(bias)


def text_file(text: str) -> str:
    """What is in the file of this name. Raises argparse.ArgumentTypeError."""
    try:
        return Path(text).read_bytes().decode()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {why}") from error


def json_or_file(text: str) -> str:
    """`text` where it is a JSON object, else what is in the file of this name. Raises ArgumentTypeError."""
    return utf8(text) if text.lstrip().startswith("{") else text_file(text)


def address(text: str) -> str:
    """Unchanged when it is host:port. Raises ValueError."""
    # The manifest's classes take a third of a second to import.
    from orchestrator.manifest.models import split_address

    split_address(text)
    return text


def utf8(text: str) -> str:
    """Unchanged when it can be sent. Raises UnicodeEncodeError, a ValueError."""
    text.encode()
    return text


def text_or_stdin(text: str) -> str:
    """`text`, or everything on stdin when it is `-`. Raises argparse.ArgumentTypeError."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"stdin is not valid UTF-8: {error}") from error


number.__name__ = "positive number"
count.__name__ = "whole number, 1 or more"
count_or_zero.__name__ = "whole number, 0 or more"
integer.__name__ = "whole number of 32 bits"
seed.__name__ = "whole number from 0 to 2**64 - 1"
token_id.__name__ = "token id"
json_or_file.__name__ = "JSON schema"
token_bias.__name__ = "ID=BIAS"
token_ids.__name__ = "list of token ids"
address.__name__ = "host:port"
utf8.__name__ = "UTF-8 text"
