"""Messages as JSON for programs, with the names of the .proto."""

from typing import Any

from google.protobuf.message import Message


def fields(message: Message) -> dict[str, Any]:
    """Numbers and texts of a message by name; of those that may be absent only the ones that are set."""
    return {
        field.name: getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
        if field.message_type is None and (not field.has_presence or message.HasField(field.name))
    }
