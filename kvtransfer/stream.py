"""The way between two ends: messages both ways, each arriving whole or not at all."""

from typing import Protocol


class MessageStream(Protocol):
    """One end of a stream. One task reads and one writes; cancelling either breaks the stream.

    A broken stream raises ConnectionError. After `write` has raised it, `read` still gives what had
    arrived before, and then says how the stream ended.
    """

    async def read(self) -> bytes | None:
        """The next message; None when the other end has closed and nothing is left."""
        ...

    async def write(self, *messages: bytes) -> None:
        """Returns when the stream has taken the messages, at least one, which may be before they have arrived.

        They are read one by one. Small ones that are ready together are to be written together, where each write costs.
        """
        ...

    async def close(self) -> None:
        """Nothing more will be written. Closing twice, or what is broken, does nothing."""
        ...


class MessageChannel(Protocol):
    """The way to one receiver, shared by all transfers to it."""

    def open(self) -> MessageStream:
        """A new stream. One that cannot be established breaks at its first use."""
        ...
