"""Several messages as one, for ways on which each costs a call. Pure.

    0        4      5
    | crc32c | kind | length of a message, 4 bytes | message | length | message | ...

The CRC32C covers what follows it; all little-endian. Messages as `wire` makes them have another kind at the same place.
"""

import struct
from collections.abc import Sequence

import google_crc32c

#: Next to those of `wire`.
KIND_BUNDLE = 3
_CRC = struct.Struct("<I")
_LENGTH = struct.Struct("<I")
_FIRST = _CRC.size + 1


def bundled(messages: Sequence[bytes]) -> bytes:
    """One message that carries these, at least one and in order. One alone stays as it is."""
    if len(messages) == 1:
        return messages[0]
    parts = [part for message in messages for part in (_LENGTH.pack(len(message)), message)]
    body = b"".join((bytes([KIND_BUNDLE]), *parts))
    return _CRC.pack(google_crc32c.value(body)) + body


def unbundled(message: bytes) -> list[bytes]:
    """The messages that it carries; itself, when it is none of `bundled`, or is damaged: `wire.decode` says what it is."""
    if len(message) <= _FIRST or message[_CRC.size] != KIND_BUNDLE:
        return [message]
    if google_crc32c.value(message[_CRC.size :]) != _CRC.unpack_from(message)[0]:
        return [message]
    found, at = [], _FIRST
    while at + _LENGTH.size <= len(message):
        begin = at + _LENGTH.size
        at = begin + _LENGTH.unpack_from(message, at)[0]
        found.append(message[begin:at])
    return found if at == len(message) else [message]
